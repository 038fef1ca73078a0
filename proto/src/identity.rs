//! Who speaks: identities in certificates and the role each has.

use std::fmt;
use std::str::FromStr;

use crate::ids::check_name;

/// What an operator may do. Each includes the ones before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// May look.
    Viewer,
    /// May change the fleet: cordon, drain, configure.
    Operator,
    /// May change the control plane itself: bootstrap, membership, overrides.
    Admin,
}

/// What a process is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// A control node.
    Control,
    /// A balancer.
    Balancer,
    /// A worker agent.
    Agent,
    /// A person or a job with the CLI.
    Operator(Level),
}

impl Role {
    /// Every role, for tables and tests.
    pub const ALL: [Self; 6] = [
        Self::Control,
        Self::Balancer,
        Self::Agent,
        Self::Operator(Level::Viewer),
        Self::Operator(Level::Operator),
        Self::Operator(Level::Admin),
    ];
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Control => "control",
            Self::Balancer => "balancer",
            Self::Agent => "agent",
            Self::Operator(Level::Viewer) => "operator/viewer",
            Self::Operator(Level::Operator) => "operator/operator",
            Self::Operator(Level::Admin) => "operator/admin",
        })
    }
}

impl FromStr for Role {
    type Err = IdentityError;

    fn from_str(text: &str) -> Result<Self, IdentityError> {
        Self::ALL
            .into_iter()
            .find(|role| role.to_string() == text)
            .ok_or_else(|| IdentityError::Role {
                text: text.chars().take(64).collect(),
            })
    }
}

/// Why a name is not an identity.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not `spiffe://<trust domain>/<role>/<name>`.
    #[error("{uri:?} is not of the form spiffe://<trust domain>/<role>/<name>")]
    Form {
        /// What was found, cut to 200 characters.
        uri: String,
    },
    /// No such role.
    #[error(
        "no role {text:?}: use control, balancer, agent, operator/viewer, operator/operator or operator/admin"
    )]
    Role {
        /// What was found, cut to 64 characters.
        text: String,
    },
}

/// One identity: `spiffe://<trust domain>/<role>/<name>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// The cell and the CA that vouches for it, such as `prod.1a2b3c4d`.
    pub trust_domain: String,
    /// What it is.
    pub role: Role,
    /// Which one, unique in its role.
    pub name: String,
}

impl Identity {
    /// The identity without its trust domain, as logs and the audit show it: `agent/w1`.
    #[must_use]
    pub fn short(&self) -> String {
        format!("{}/{}", self.role, self.name)
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "spiffe://{}/{}/{}",
            self.trust_domain, self.role, self.name
        )
    }
}

impl FromStr for Identity {
    type Err = IdentityError;

    fn from_str(uri: &str) -> Result<Self, IdentityError> {
        let wrong = || IdentityError::Form {
            uri: uri.chars().take(200).collect(),
        };
        let rest = uri.strip_prefix("spiffe://").ok_or_else(wrong)?;
        let (trust_domain, path) = rest.split_once('/').ok_or_else(wrong)?;
        let (role, name) = path.rsplit_once('/').ok_or_else(wrong)?;
        check_name("trust domain", trust_domain).map_err(|_| wrong())?;
        check_name("name", name).map_err(|_| wrong())?;
        Ok(Self {
            trust_domain: trust_domain.into(),
            role: role.parse()?,
            name: name.into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_print_as_they_parse() {
        for role in Role::ALL {
            let one = Identity {
                trust_domain: "prod.1a2b3c4d".into(),
                role,
                name: "x-1".into(),
            };
            assert_eq!(one.to_string().parse(), Ok(one));
        }
    }

    #[test]
    fn what_is_not_an_identity_is_refused() {
        for bad in [
            "",
            "spiffe://",
            "spiffe://td/agent",
            "spiffe://td/agent/",
            "spiffe:///agent/w1",
            "spiffe://td/root/w1",
            "spiffe://td/agent/w1/x",
            "spiffe://td/operator/alice",
            "https://td/agent/w1",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }
}

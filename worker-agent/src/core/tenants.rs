//! Whose requests an engine gets that keeps no caches apart.
//!
//! Where prompts that begin alike share an engine's cache, whoever sends them, a tenant could learn by the time
//! to a first token what another one asked. Such an engine serves one tenant.

/// Whose requests are taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Tenants {
    /// Everybody's.
    #[default]
    All,
    /// Those of whoever is served first, for as long as the agent runs.
    First(Option<String>),
    /// Those of this one.
    Only(String),
}

impl Tenants {
    /// Whether a request of this tenant may be taken.
    pub(super) fn admits(&self, tenant: &str) -> bool {
        match self {
            Self::All | Self::First(None) => true,
            Self::First(Some(whose)) | Self::Only(whose) => whose == tenant,
        }
    }

    /// A request of this tenant was taken.
    pub(super) fn took(&mut self, tenant: &str) {
        if let Self::First(whose @ None) = self {
            *whose = Some(tenant.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(mut tenants: Tenants, offered: &[(&str, bool)]) {
        for (tenant, admitted) in offered {
            assert_eq!(tenants.admits(tenant), *admitted, "{tenants:?} {tenant}");
            if *admitted {
                tenants.took(tenant);
            }
        }
    }

    #[test]
    fn an_engine_with_one_cache_serves_one_tenant() {
        check(Tenants::All, &[("a", true), ("b", true)]);
        check(
            Tenants::First(None),
            &[("a", true), ("b", false), ("a", true)],
        );
        check(Tenants::Only("b".into()), &[("a", false), ("b", true)]);
    }
}

//! Ids as distinct types, so that a wrong argument does not compile and a log line reads well.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::wire;

/// An id that does not have the form of its kind.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// The bytes of a 16-byte id have another length.
    #[error("{kind} has {found} bytes, expected 16")]
    Length {
        /// Which id.
        kind: &'static str,
        /// Bytes found.
        found: usize,
    },
    /// The text is not 32 hexadecimal digits.
    #[error("{kind} {text:?} is not 32 hexadecimal digits")]
    Hex {
        /// Which id.
        kind: &'static str,
        /// What was given, cut to 64 characters.
        text: String,
    },
    /// A required id is missing or zero.
    #[error("{kind} is missing")]
    Missing {
        /// Which id.
        kind: &'static str,
    },
    /// A name contains something else than `a-z A-Z 0-9 . _ -`, or is empty or too long.
    #[error(
        "{kind} {text:?} is not a name: use 1 to 64 of a-z A-Z 0-9 . _ - and start with a letter or digit"
    )]
    Name {
        /// Which name.
        kind: &'static str,
        /// What was given, cut to 64 characters.
        text: String,
    },
}

macro_rules! id16 {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 16]);

        impl $name {
            /// The id as it stands on the wire.
            ///
            /// # Errors
            ///
            /// Returns [`IdError::Length`] unless there are 16 bytes.
            pub fn from_wire(bytes: &[u8]) -> Result<Self, IdError> {
                bytes.try_into().map(Self).map_err(|_| IdError::Length {
                    kind: $kind,
                    found: bytes.len(),
                })
            }

            /// The id for the wire.
            #[must_use]
            pub fn to_wire(self) -> bytes::Bytes {
                bytes::Bytes::copy_from_slice(&self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let wrong = || IdError::Hex { kind: $kind, text: text.chars().take(64).collect() };
                if text.len() != 32 || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
                    return Err(wrong());
                }
                u128::from_str_radix(text, 16)
                    .map(|number| Self(number.to_be_bytes()))
                    .map_err(|_| wrong())
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
                to.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
                String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

id16! {
    /// One control plane and all that it agrees on; drawn at `forebay init`.
    ClusterId, "cluster id"
}
id16! {
    /// One disk of one control node; drawn when it is first started on an empty directory.
    StoreId, "store id"
}
id16! {
    /// One client of the control plane, for exactly-once commands.
    ClientId, "client id"
}

macro_rules! number_id {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

number_id! {
    /// A worker, numbered by the log at its first registration; printed as `w7`. Never reused.
    WorkerId, u32, "w"
}
number_id! {
    /// A control node's Raft id; printed as `n1`. Zero is nobody.
    NodeId, u64, "n"
}
number_id! {
    /// Position in the log at which facts changed; printed as `r812`. Zero is before the first.
    Revision, u64, "r"
}

/// One start of one worker; printed as `w7.812.3`. Higher `(grant, start)` wins.
///
/// Every event, booking, placement and report carries it, so what a dead process sent cannot pass
/// for the living.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation {
    /// Which worker.
    pub worker: WorkerId,
    /// Log index of the registration that an agent with an empty disk was granted.
    pub grant: u64,
    /// Starts counted on the agent's own disk since that grant.
    pub start: u32,
}

impl Incarnation {
    /// The incarnation as it stands on the wire.
    ///
    /// # Errors
    ///
    /// Returns [`IdError::Missing`] when it is absent or has no grant.
    pub fn from_wire(wire: Option<&wire::Incarnation>) -> Result<Self, IdError> {
        match wire {
            Some(wire) if wire.grant > 0 => Ok(Self {
                worker: WorkerId(wire.worker),
                grant: wire.grant,
                start: wire.start,
            }),
            _ => Err(IdError::Missing {
                kind: "incarnation",
            }),
        }
    }

    /// The incarnation for the wire.
    #[must_use]
    pub fn to_wire(self) -> wire::Incarnation {
        wire::Incarnation {
            worker: self.worker.0,
            grant: self.grant,
            start: self.start,
        }
    }
}

impl fmt::Display for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.worker, self.grant, self.start)
    }
}

/// Checks the name of a worker, a node, a balancer, a pool or an operator.
///
/// # Errors
///
/// Returns [`IdError::Name`] unless it has 1 to 64 of `a-z A-Z 0-9 . _ -` and starts with a letter
/// or digit.
pub fn check_name(kind: &'static str, name: &str) -> Result<(), IdError> {
    let fits = (1..=64).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if fits {
        Ok(())
    } else {
        Err(IdError::Name {
            kind,
            text: name.chars().take(64).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn incarnation(worker: u32, grant: u64, start: u32) -> Incarnation {
        Incarnation {
            worker: WorkerId(worker),
            grant,
            start,
        }
    }

    #[test]
    fn a_later_start_or_a_later_grant_wins() {
        assert!(incarnation(7, 812, 3) > incarnation(7, 812, 2));
        assert!(incarnation(7, 900, 0) > incarnation(7, 812, 9));
        assert_eq!(incarnation(7, 812, 3).to_string(), "w7.812.3");
    }

    #[test]
    fn an_incarnation_without_a_grant_is_none() {
        assert!(Incarnation::from_wire(Some(&wire::Incarnation::default())).is_err());
        let one = incarnation(1, 2, 3);
        assert_eq!(Incarnation::from_wire(Some(&one.to_wire())), Ok(one));
    }

    #[test]
    fn sixteen_byte_ids_print_and_parse_as_hexadecimal() {
        let id = ClusterId(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(
            "+123456789abcdef0123456789abcdef"
                .parse::<ClusterId>()
                .is_err()
        );
        assert!(ClusterId::from_wire(b"short").is_err());
    }

    #[test]
    fn names_are_what_fits_a_certificate_a_metric_and_a_file() {
        for good in ["w1", "gpu-7.rack_3", "A"] {
            assert_eq!(check_name("worker", good), Ok(()), "{good}");
        }
        for bad in ["", "-w", "a/b", "a b", "ü", &"x".repeat(65)] {
            assert!(check_name("worker", bad).is_err(), "{bad}");
        }
    }
}

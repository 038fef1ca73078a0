//! From an API key to whom it belongs. Keys are kept and compared as SHA-256 hashes only.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::core::error::{ApiError, Code};
use crate::core::limits::{Allowance, Meter};

/// Keys in one file.
pub(crate) const MAX_KEYS: usize = 65_536;

/// On whose behalf a request runs.
#[derive(Clone, Debug)]
pub(crate) struct Principal {
    pub(crate) tenant: Arc<str>,
    /// May see which worker served it, and at which attempt.
    pub(crate) debug: bool,
    /// Models that it may ask; empty: all.
    models: Arc<[String]>,
    /// The zone that its requests must stay in.
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) meter: Arc<Meter>,
}

impl Principal {
    /// Whether its key may ask this model.
    pub(crate) fn may_ask(&self, model: &str) -> bool {
        self.models.is_empty() || self.models.iter().any(|allowed| allowed == model)
    }
}

/// Why a keys file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read.
    #[error("cannot read the keys file {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// It is not what a keys file looks like.
    #[error(
        "{path} is not a keys file: {problem}; it needs entries of the form `[[keys]]`, `sha256 = \"64 hex digits of the key's SHA-256\"`, `tenant = \"name\"`"
    )]
    Form {
        /// The file.
        path: PathBuf,
        /// What is wrong with it; never a value from it.
        problem: String,
    },
}

/// Checks the text of a keys file, and counts its keys; `path` is for messages.
///
/// # Errors
///
/// Says why a balancer would not take it.
pub fn count_keys(path: &Path, text: &str) -> Result<usize, KeysError> {
    Keys::parse(path, text).map(|keys| keys.count())
}

/// Who may ask.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    /// Sorted by hash.
    known: Vec<([u8; 32], Principal)>,
    /// Development: any key, and none, is this tenant.
    anyone: Option<Principal>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    keys: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    sha256: String,
    tenant: String,
    #[serde(default)]
    debug: bool,
    #[serde(default)]
    models: Vec<String>,
    zone: Option<String>,
    requests_per_minute: Option<u32>,
    max_parallel: Option<u32>,
}

impl Keys {
    /// Any key, and none, is `tenant`.
    pub(crate) fn anyone(tenant: &str) -> Self {
        Self {
            known: Vec::new(),
            anyone: Some(Principal {
                tenant: tenant.into(),
                debug: true,
                models: Arc::default(),
                zone: None,
                meter: Arc::default(),
            }),
        }
    }

    /// Reads a keys file's text. `path` is for messages.
    pub(crate) fn parse(path: &Path, text: &str) -> Result<Self, KeysError> {
        let wrong = |problem: String| KeysError::Form {
            path: path.into(),
            problem,
        };
        let file: File = toml::from_str(text).map_err(|error| wrong(error.message().to_owned()))?;
        if file.keys.is_empty() {
            return Err(wrong("it has no keys, so nobody could ask".into()));
        }
        if file.keys.len() > MAX_KEYS {
            return Err(wrong(format!("it has more than {MAX_KEYS} keys")));
        }
        let mut known = Vec::with_capacity(file.keys.len());
        for (i, entry) in file.keys.into_iter().enumerate() {
            let hash = unhex(&entry.sha256)
                .ok_or_else(|| wrong(format!("keys[{i}].sha256 is not 64 hex digits")))?;
            forebay_proto::ids::check_name("tenant", &entry.tenant)
                .map_err(|_| wrong(format!("keys[{i}].tenant is not a name")))?;
            if entry.zone.as_deref() == Some("") {
                let problem = format!("keys[{i}].zone is empty: leave it out for any zone");
                return Err(wrong(problem));
            }
            if entry.requests_per_minute == Some(0) || entry.max_parallel == Some(0) {
                let problem = format!("keys[{i}] may ask nothing: a limit of 0 is none");
                return Err(wrong(problem));
            }
            let principal = Principal {
                tenant: entry.tenant.into(),
                debug: entry.debug,
                models: entry.models.into(),
                zone: entry.zone.map(Into::into),
                meter: Meter::new(Allowance {
                    requests_per_minute: entry.requests_per_minute,
                    max_parallel: entry.max_parallel,
                }),
            };
            known.push((hash, principal));
        }
        known.sort_by_key(|(hash, _)| *hash);
        if known.windows(2).any(|pair| pair[0].0 == pair[1].0) {
            return Err(wrong("a hash appears twice".into()));
        }
        Ok(Self {
            known,
            anyone: None,
        })
    }

    /// Goes on counting where `before` stopped, for keys whose limits are still the same.
    pub(crate) fn continuing(mut self, before: &Self) -> Self {
        for (hash, principal) in &mut self.known {
            let same = |(known, _): &([u8; 32], Principal)| known.cmp(hash);
            if let Ok(at) = before.known.binary_search_by(same) {
                let meter = &before.known[at].1.meter;
                if meter.allowance() == principal.meter.allowance() {
                    principal.meter = meter.clone();
                }
            }
        }
        self
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.known.len()
    }

    /// Falls back to `tenant` for any key that is not in the file, and for none.
    pub(crate) fn or_anyone(mut self, tenant: &str) -> Self {
        self.anyone = Self::anyone(tenant).anyone;
        self
    }

    /// Whose request this is, by its `authorization` header.
    pub(crate) fn principal(&self, authorization: Option<&[u8]>) -> Result<Principal, ApiError> {
        let found = authorization.and_then(bearer).and_then(|key| {
            let hash: [u8; 32] = Sha256::digest(key).into();
            self.lookup(&hash)
        });
        found
            .or(self.anyone.as_ref())
            .cloned()
            .ok_or_else(|| ApiError::new(Code::InvalidApiKey, NO_KEY))
    }

    /// Finds a hash in a time that tells nothing about it: buckets are told apart by a prefix of a
    /// SHA-256, which no caller can steer towards a stored one, and the rest in constant time.
    fn lookup(&self, hash: &[u8; 32]) -> Option<&Principal> {
        let from = self
            .known
            .partition_point(|(known, _)| known[..PREFIX] < hash[..PREFIX]);
        let mut found = None;
        for (known, principal) in &self.known[from..] {
            if known[..PREFIX] != hash[..PREFIX] {
                break;
            }
            if same(known, hash) {
                found = Some(principal);
            }
        }
        found
    }
}

const PREFIX: usize = 2;

const NO_KEY: &str =
    "the API key is missing or unknown: send `Authorization: Bearer KEY` with a key of this fleet";

fn bearer(header: &[u8]) -> Option<&[u8]> {
    let (scheme, key) = header.split_at_checked(7)?;
    (scheme.eq_ignore_ascii_case(b"bearer ") && !key.is_empty()).then(|| key.trim_ascii())
}

/// Compares without an early way out.
fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let differences = a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b));
    std::hint::black_box(differences) == 0
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high << 4 | low).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(key: &str) -> String {
        let digest = Sha256::digest(key.as_bytes());
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn keys(text: &str) -> Result<Keys, String> {
        Keys::parse(Path::new("keys.toml"), text).map_err(|error| error.to_string())
    }

    fn two() -> Keys {
        let text = format!(
            "[[keys]]\nsha256 = \"{}\"\ntenant = \"a\"\n[[keys]]\nsha256 = \"{}\"\ntenant = \"b\"\ndebug = true\n",
            hex("key-a"),
            hex("key-b"),
        );
        keys(&text).unwrap()
    }

    fn who(keys: &Keys, header: Option<&str>) -> Option<String> {
        let principal = keys.principal(header.map(str::as_bytes)).ok()?;
        Some(format!("{} {}", principal.tenant, principal.debug))
    }

    #[test]
    fn a_key_is_its_tenant_and_everything_else_is_nobody() {
        let keys = two();
        assert_eq!(who(&keys, Some("Bearer key-a")).unwrap(), "a false");
        assert_eq!(who(&keys, Some("bearer key-b ")).unwrap(), "b true");
        for wrong in ["Bearer key-c", "Bearer ", "Basic key-a", "key-a", ""] {
            assert_eq!(who(&keys, Some(wrong)), None, "{wrong}");
        }
        assert_eq!(who(&keys, None), None);
    }

    #[test]
    fn a_key_may_be_for_some_models_only() {
        let text = format!(
            "[[keys]]\nsha256 = \"{}\"\ntenant = \"a\"\nmodels = [\"m\"]\n",
            hex("k")
        );
        let principal = keys(&text).unwrap().principal(Some(b"Bearer k")).unwrap();
        assert!(principal.may_ask("m") && !principal.may_ask("n"));
        assert!(Keys::anyone("dev").principal(None).unwrap().may_ask("n"));
        assert_eq!(principal.zone, None);
        let pinned = keys(&format!("{text}zone = \"eu\"\n")).unwrap();
        let pinned = pinned.principal(Some(b"Bearer k")).unwrap();
        assert_eq!(pinned.zone.as_deref(), Some("eu"));
        let nowhere = keys(&format!("{text}zone = \"\"\n")).unwrap_err();
        assert!(nowhere.contains("keys[0].zone is empty"));
        let none = format!("{text}requests_per_minute = 0\n");
        assert!(keys(&none).unwrap_err().contains("keys[0] may ask nothing"));
    }

    #[test]
    fn a_new_reading_of_the_file_gives_no_allowance_anew() {
        let file = |limit| {
            let hash = hex("k");
            let text =
                format!("[[keys]]\nsha256 = \"{hash}\"\ntenant = \"a\"\nmax_parallel = {limit}\n");
            keys(&text).unwrap()
        };
        let ask = |keys: &Keys| {
            let principal = keys.principal(Some(b"Bearer k")).unwrap();
            principal.meter.ask(forebay_proto::Now::default()).0
        };
        let before = file(1);
        let running = ask(&before).unwrap();
        let after = file(1).continuing(&before);
        assert!(ask(&after).is_err(), "the request from before still runs");
        assert!(ask(&file(2).continuing(&before)).is_ok(), "a new limit");
        drop(running);
        assert!(ask(&after).is_ok());
    }

    #[test]
    fn in_development_anyone_is_the_given_tenant() {
        let keys = Keys::anyone("dev");
        assert_eq!(who(&keys, None).unwrap(), "dev true");
        assert_eq!(who(&keys, Some("Bearer x")).unwrap(), "dev true");
        let both = two().or_anyone("dev");
        assert_eq!(who(&both, Some("Bearer key-a")).unwrap(), "a false");
        assert_eq!(who(&both, Some("Bearer x")).unwrap(), "dev true");
    }

    #[test]
    fn a_bad_file_is_refused_with_what_to_do_and_none_of_its_values() {
        for (text, problem) in [
            ("", "no keys"),
            ("keys = 3", "invalid type"),
            (
                "[[keys]]\nsha256 = \"secret\"\ntenant = \"a\"",
                "keys[0].sha256",
            ),
            ("[[keys]]\ntenant = \"a\"", "sha256"),
        ] {
            let said = keys(text).unwrap_err();
            assert!(
                said.contains(problem) && said.contains("[[keys]]"),
                "{said}"
            );
            assert!(!said.contains("secret"), "{said}");
        }
        let tenant = format!("[[keys]]\nsha256 = \"{}\"\ntenant = \"a b\"", hex("k"));
        assert!(keys(&tenant).unwrap_err().contains("keys[0].tenant"));
        let twice = format!("[[keys]]\nsha256 = \"{}\"\ntenant = \"a\"\n", hex("k"));
        assert!(keys(&twice.repeat(2)).unwrap_err().contains("twice"));
    }
}

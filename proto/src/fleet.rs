//! What several parts hold of the facts as checked types: a worker's own description, and members.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::Message;
use serde::{Deserialize, Serialize};

use crate::ids::{IdError, NodeId, StoreId, check_name};
use crate::wire::Label;
use crate::wire::fleet as wire;

/// An encoded [`WorkerSpec`], with whatever fields this version does not know.
pub const MAX_SPEC_BYTES: usize = 4 << 10;

/// Bytes of one free text in a spec.
const MAX_TEXT_BYTES: usize = 256;

/// Entries of one list in a spec.
const MAX_LIST: usize = 256;

/// One node of the control plane.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its Raft id.
    pub id: NodeId,
    /// Its name, as in its certificate.
    pub name: String,
    /// `host:port` of its control endpoint.
    pub address: String,
    /// The disk that answers to this id.
    pub store_id: StoreId,
    /// It follows and has no vote.
    pub learner: bool,
}

impl Member {
    /// The member as it stands on the wire.
    ///
    /// # Errors
    ///
    /// Returns [`IdError`] when an id or the name does not have the form of its kind.
    pub fn from_wire(wire: &wire::Member) -> Result<Self, IdError> {
        if wire.id == 0 {
            return Err(IdError::Missing { kind: "node id" });
        }
        check_name("node", &wire.name)?;
        Ok(Self {
            id: NodeId(wire.id),
            name: wire.name.clone(),
            address: wire.address.clone(),
            store_id: StoreId::from_wire(&wire.store_id)?,
            learner: wire.learner,
        })
    }

    /// The member for the wire.
    #[must_use]
    pub fn to_wire(&self) -> wire::Member {
        wire::Member {
            id: self.id.0,
            name: self.name.clone(),
            address: self.address.clone(),
            store_id: self.store_id.to_wire(),
            learner: self.learner,
        }
    }
}

/// What a worker is, as its own agent declares it. The default says nothing, and is refused where it is checked.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerSpec {
    /// The set of interchangeable workers it belongs to.
    pub pool: String,
    /// `host:port` on which the agent accepts balancers.
    pub advertise: String,
    /// Kind of engine, such as `vllm`.
    pub engine: String,
    /// Models it serves, at least one.
    pub models: Vec<String>,
    /// Revision of the model's weights; empty when not told.
    pub revision: String,
    /// Type of its GPUs; empty when not told.
    pub gpu_type: String,
    /// Number of its GPUs.
    pub gpu_count: u32,
    /// Tokens its KV cache holds; 0 when not told.
    pub kv_tokens: u64,
    /// Longest context it takes; 0 when not told.
    pub max_context_tokens: u32,
    /// Adapters it has loaded.
    pub adapters: Vec<String>,
    /// Where it stands; empty when not told.
    pub zone: String,
    /// Free labels.
    pub labels: BTreeMap<String, String>,
    /// Requests the engine runs at once, at least one.
    pub slots: u32,
}

/// What is wrong with a worker's spec, and where.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {problem}")]
pub struct SpecError {
    /// Where, such as `spec.models[1]`.
    pub path: String,
    /// What, and what to do.
    pub problem: String,
}

impl SpecError {
    fn at(path: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            problem: problem.into(),
        }
    }
}

impl WorkerSpec {
    /// Decodes and checks a spec as it is stored.
    ///
    /// # Errors
    ///
    /// Returns the first problem with its place.
    pub fn from_wire(bytes: &[u8]) -> Result<Self, SpecError> {
        if bytes.len() > MAX_SPEC_BYTES {
            let problem = format!("has {} bytes, at most {MAX_SPEC_BYTES} fit", bytes.len());
            return Err(SpecError::at("spec", problem));
        }
        let wire = wire::WorkerSpec::decode(bytes)
            .map_err(|_| SpecError::at("spec", "does not decode"))?;
        check(&wire)?;
        let mut labels = BTreeMap::new();
        for (i, Label { key, value }) in wire.labels.into_iter().enumerate() {
            if labels.insert(key, value).is_some() {
                let path = format!("spec.labels[{i}]");
                return Err(SpecError::at(path, "repeats a key"));
            }
        }
        Ok(Self {
            pool: wire.pool,
            advertise: wire.advertise,
            engine: wire.engine,
            models: wire.models,
            revision: wire.revision,
            gpu_type: wire.gpu_type,
            gpu_count: wire.gpu_count,
            kv_tokens: wire.kv_tokens,
            max_context_tokens: wire.max_context_tokens,
            adapters: wire.adapters,
            zone: wire.zone,
            labels,
            slots: wire.slots,
        })
    }

    /// The spec for the wire.
    #[must_use]
    pub fn to_wire(&self) -> Bytes {
        wire::WorkerSpec {
            pool: self.pool.clone(),
            advertise: self.advertise.clone(),
            engine: self.engine.clone(),
            models: self.models.clone(),
            revision: self.revision.clone(),
            gpu_type: self.gpu_type.clone(),
            gpu_count: self.gpu_count,
            kv_tokens: self.kv_tokens,
            max_context_tokens: self.max_context_tokens,
            adapters: self.adapters.clone(),
            zone: self.zone.clone(),
            labels: self
                .labels
                .iter()
                .map(|(key, value)| Label {
                    key: key.clone(),
                    value: value.clone(),
                })
                .collect(),
            slots: self.slots,
        }
        .encode_to_vec()
        .into()
    }

    /// Whether it serves this model.
    #[must_use]
    pub fn serves(&self, model: &str) -> bool {
        self.models.iter().any(|served| served == model)
    }
}

fn check(spec: &wire::WorkerSpec) -> Result<(), SpecError> {
    check_name("pool", &spec.pool)
        .map_err(|error| SpecError::at("spec.pool", error.to_string()))?;
    check_address(&spec.advertise).map_err(|problem| SpecError::at("spec.advertise", problem))?;
    if spec.models.is_empty() {
        let problem = "is empty: name at least one model that the engine serves";
        return Err(SpecError::at("spec.models", problem));
    }
    for (list, entries) in [("models", &spec.models), ("adapters", &spec.adapters)] {
        check_length(list, entries.len())?;
        for (i, entry) in entries.iter().enumerate() {
            check_text(&format!("{list}[{i}]"), entry, 1)?;
            if entries[..i].contains(entry) {
                return Err(SpecError::at(format!("spec.{list}[{i}]"), "appears twice"));
            }
        }
    }
    check_length("labels", spec.labels.len())?;
    for (i, label) in spec.labels.iter().enumerate() {
        check_text(&format!("labels[{i}].key"), &label.key, 1)?;
        check_text(&format!("labels[{i}].value"), &label.value, 0)?;
    }
    for (field, text) in [
        ("engine", &spec.engine),
        ("revision", &spec.revision),
        ("gpu_type", &spec.gpu_type),
        ("zone", &spec.zone),
    ] {
        check_text(field, text, 0)?;
    }
    for (field, value, low, high) in [
        ("slots", u64::from(spec.slots), 1, 65_536),
        ("gpu_count", u64::from(spec.gpu_count), 0, 1_024),
        ("kv_tokens", spec.kv_tokens, 0, 1 << 40),
    ] {
        if !(low..=high).contains(&value) {
            let problem = format!("is {value}, must be {low} to {high}");
            return Err(SpecError::at(format!("spec.{field}"), problem));
        }
    }
    Ok(())
}

fn check_length(field: &str, length: usize) -> Result<(), SpecError> {
    if length > MAX_LIST {
        let problem = format!("has {length} entries, at most {MAX_LIST} are allowed");
        return Err(SpecError::at(format!("spec.{field}"), problem));
    }
    Ok(())
}

fn check_text(field: &str, text: &str, least: usize) -> Result<(), SpecError> {
    let problem = if text.len() < least {
        "is empty".to_owned()
    } else if text.len() > MAX_TEXT_BYTES {
        format!(
            "has {} bytes, at most {MAX_TEXT_BYTES} are allowed",
            text.len()
        )
    } else if text.chars().any(char::is_control) {
        "contains a control character".to_owned()
    } else {
        return Ok(());
    };
    Err(SpecError::at(format!("spec.{field}"), problem))
}

/// Checks that an address is `host:port` with a port to connect to.
///
/// # Errors
///
/// Returns what is wrong with it and the form to use.
pub fn check_address(address: &str) -> Result<(), String> {
    let fits = address.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        let plain = bracketed || !host.contains(':');
        (1..=255).contains(&host.len())
            && plain
            && host.bytes().all(|b| b.is_ascii_graphic() && b != b'/')
            && port.parse::<u16>().is_ok_and(|port| port > 0)
    });
    if fits {
        Ok(())
    } else {
        let cut: String = address.chars().take(64).collect();
        Err(format!(
            "{cut:?} is not host:port, such as 10.0.0.7:7420 or [2001:db8::7]:7420"
        ))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spec() -> WorkerSpec {
        WorkerSpec {
            pool: "default".into(),
            advertise: "127.0.0.1:7420".into(),
            engine: "vllm".into(),
            models: vec!["m".into()],
            revision: String::new(),
            gpu_type: "H100".into(),
            gpu_count: 8,
            kv_tokens: 1 << 20,
            max_context_tokens: 131_072,
            adapters: vec![],
            zone: "a".into(),
            labels: BTreeMap::from([("rack".into(), "3".into())]),
            slots: 64,
        }
    }

    fn problem(change: impl FnOnce(&mut WorkerSpec)) -> String {
        let mut spec = spec();
        change(&mut spec);
        WorkerSpec::from_wire(&spec.to_wire())
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn a_spec_reads_back_as_it_was_written() {
        assert_eq!(WorkerSpec::from_wire(&spec().to_wire()), Ok(spec()));
    }

    #[test]
    fn a_bad_spec_is_refused_with_its_place() {
        assert!(problem(|s| s.pool = "a/b".into()).starts_with("spec.pool: "));
        assert!(problem(|s| s.advertise = "host".into()).starts_with("spec.advertise: "));
        assert!(problem(|s| s.models.clear()).starts_with("spec.models: is empty"));
        assert!(problem(|s| s.models = vec!["m".into(); 2]).contains("models[1]: appears twice"));
        assert!(problem(|s| s.models = vec![String::new()]).contains("models[0]: is empty"));
        assert!(problem(|s| s.engine = "a\nb".into()).contains("control character"));
        assert!(problem(|s| s.zone = "z".repeat(257)).contains("at most 256"));
        assert!(problem(|s| s.slots = 0).contains("must be 1 to"));
        assert!(
            problem(|s| s.models = (0..40).map(|i| format!("{i:0200}")).collect())
                .contains("at most 4096 fit")
        );
    }

    #[test]
    fn an_address_names_a_host_and_a_port() {
        for good in ["h:1", "10.0.0.7:7420", "[::1]:7420", "gpu-7.example:65535"] {
            assert_eq!(check_address(good), Ok(()), "{good}");
        }
        for bad in ["", "h", ":1", "h:", "h:0", "h:65536", "::1:80", "a b:1"] {
            assert!(check_address(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = WorkerSpec::from_wire(&bytes);
        }
    }
}

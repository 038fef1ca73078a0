//! The `manifest.json` beside a trace, of which the block size and the quantum of its timestamps matter here.

use serde::Deserialize;

#[derive(Deserialize)]
struct Manifest {
    traces: Vec<Listed>,
}

#[derive(Deserialize)]
struct Listed {
    file: String,
    #[serde(flatten)]
    entry: Entry,
}

/// What a manifest says of one trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub(super) struct Entry {
    /// Tokens in one block.
    pub(super) block_size: u32,
    /// Arrivals are rounded to this.
    #[serde(default)]
    pub(super) quantum_ms: u32,
}

/// What the manifest says of `file`, if it lists it.
pub(super) fn entry_of(manifest: &[u8], file: &str) -> Result<Option<Entry>, serde_json::Error> {
    let manifest: Manifest = serde_json::from_slice(manifest)?;
    let mut traces = manifest.traces.into_iter();
    Ok(traces
        .find(|listed| listed.file == file)
        .map(|listed| listed.entry))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_by_its_name() {
        let manifest =
            br#"{"format":1,"traces":[{"name":"a","file":"a.jsonl.gz","block_size":64}]}"#;
        let entry = entry_of(manifest, "a.jsonl.gz").unwrap().unwrap();
        assert_eq!((entry.block_size, entry.quantum_ms), (64, 0));
        assert_eq!(entry_of(manifest, "b.jsonl.gz").unwrap(), None);
        assert!(entry_of(b"{}", "a.jsonl.gz").is_err());
    }
}

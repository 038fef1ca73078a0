//! The `manifest.json` beside a trace, of which only the block size matters here.

use serde::Deserialize;

#[derive(Deserialize)]
struct Manifest {
    traces: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    file: String,
    block_size: u32,
}

/// The block size that the manifest gives for `file`, if it lists it.
pub(super) fn block_size_of(manifest: &[u8], file: &str) -> Result<Option<u32>, serde_json::Error> {
    let manifest: Manifest = serde_json::from_slice(manifest)?;
    Ok(manifest
        .traces
        .into_iter()
        .find(|entry| entry.file == file)
        .map(|entry| entry.block_size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_by_its_name() {
        let manifest =
            br#"{"format":1,"traces":[{"name":"a","file":"a.jsonl.gz","block_size":64}]}"#;
        assert_eq!(block_size_of(manifest, "a.jsonl.gz").unwrap(), Some(64));
        assert_eq!(block_size_of(manifest, "b.jsonl.gz").unwrap(), None);
        assert!(block_size_of(b"{}", "a.jsonl.gz").is_err());
    }
}

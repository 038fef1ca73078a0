//! The id under which a request is known to its client, to logs and to the engine.

/// Whether a client's own id may be used: 1 to 128 of `A-Z a-z 0-9 . _ -`, so that it cannot forge a
/// log line or a header.
pub(crate) fn acceptable(id: &[u8]) -> bool {
    (1..=128).contains(&id.len())
        && id
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

/// The client's id where it is acceptable, else one made from `luck`.
pub(crate) fn choose(given: Option<&[u8]>, luck: u128) -> String {
    given
        .filter(|id| acceptable(id))
        .and_then(|id| std::str::from_utf8(id).ok())
        .map_or_else(|| format!("req-{luck:032x}"), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_harmless_ids_are_taken_over() {
        assert_eq!(choose(Some(b"a.B_9-"), 7), "a.B_9-");
        let minted = "req-00000000000000000000000000000007";
        for bad in [b"".as_slice(), b"a b", b"a\nb", b"\xc3\xbc", &[b'x'; 129]] {
            assert_eq!(choose(Some(bad), 7), minted);
        }
        assert_eq!(choose(None, 7), minted);
        assert!(acceptable(minted.as_bytes()));
    }
}

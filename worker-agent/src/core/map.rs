//! The cache's map as a file: what a restarted agent goes on from.
//!
//! Fingerprints and counts of tokens, nothing else. It names the engine's process, because it says
//! something of no other; and it ends with a checksum, because it is not waited for until it is on disk:
//! what tears it takes the engine down as well.

use forebay_scheduler::residency::{Kept, KeptItem, MAX_CHUNKS};

use super::kv::KeptExact;

const MAGIC: &[u8; 8] = b"FBCACHE2";
const MAX_ENGINE_BYTES: usize = 512;
/// Kind, fingerprint, tokens to the end, own tokens.
const ITEM_BYTES: usize = 1 + 8 + 4 + 4;
const CHECKSUM_BYTES: usize = 4;
/// Magic, length of the name, ratio, capacity, number of items.
const FIXED_BYTES: usize = 8 + 2 + 8 + 8 + 4;
/// No map is longer.
pub const MAX_MAP_BYTES: usize =
    FIXED_BYTES + MAX_ENGINE_BYTES + MAX_CHUNKS * ITEM_BYTES + MAX_EXACT_BYTES + CHECKSUM_BYTES;
/// Of what is known by events: where there is more, it is not kept.
const MAX_EXACT_BYTES: usize = 64 << 20;

/// What is in an engine's cache.
#[derive(Clone, Debug, PartialEq)]
pub struct Map {
    /// The process whose cache it is.
    pub engine: String,
    /// Tokens in a byte of its prompts, where that was learnt.
    pub ratio: Option<f64>,
    /// What it holds, as far as its shadow goes.
    pub kept: Kept,
    /// What it holds by its events, where they are followed.
    pub exact: Option<KeptExact>,
}

/// Bytes are no map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Another program's, or of another version.
    #[error("it is none, or of another version")]
    Foreign,
    /// Cut off, or changed on the disk.
    #[error("it is damaged")]
    Damaged,
}

impl Map {
    /// As bytes, [`MAX_MAP_BYTES`] at most. An engine with a longer name than fits has no map.
    #[must_use]
    pub fn encode(&self) -> Option<Vec<u8>> {
        let items = &self.kept.items;
        if self.engine.len() > MAX_ENGINE_BYTES || items.len() > MAX_CHUNKS {
            return None;
        }
        let mut bytes = Vec::with_capacity(FIXED_BYTES + items.len() * ITEM_BYTES + 64);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&u16::try_from(self.engine.len()).ok()?.to_le_bytes());
        bytes.extend_from_slice(self.engine.as_bytes());
        bytes.extend_from_slice(&self.ratio.unwrap_or(f64::NAN).to_le_bytes());
        bytes.extend_from_slice(&self.kept.capacity.to_le_bytes());
        bytes.extend_from_slice(&u32::try_from(items.len()).ok()?.to_le_bytes());
        for item in items {
            let (kind, chunk, tokens, own) = match *item {
                KeptItem::Tokens(tokens) => (TOKENS, 0, tokens, 0),
                KeptItem::Chunk {
                    chunk,
                    tokens,
                    own,
                    counted,
                } => (
                    if counted { COUNTED } else { ESTIMATED },
                    chunk,
                    tokens,
                    own,
                ),
            };
            bytes.push(kind);
            bytes.extend_from_slice(&chunk.to_le_bytes());
            bytes.extend_from_slice(&tokens.to_le_bytes());
            bytes.extend_from_slice(&own.to_le_bytes());
        }
        if let Some(exact) = &self.exact {
            let before = bytes.len();
            exact.encode(&mut bytes);
            if bytes.len() - before > MAX_EXACT_BYTES {
                bytes.truncate(before);
            }
        }
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        Some(bytes)
    }

    /// Reads a map.
    ///
    /// # Errors
    ///
    /// Returns why it is of no use. Arbitrary bytes never panic.
    pub fn decode(bytes: &[u8]) -> Result<Self, MapError> {
        if bytes.len() > MAX_MAP_BYTES || !bytes.starts_with(MAGIC) {
            return Err(MapError::Foreign);
        }
        let (body, checksum) = bytes
            .split_last_chunk::<CHECKSUM_BYTES>()
            .ok_or(MapError::Damaged)?;
        if crc32c::crc32c(body) != u32::from_le_bytes(*checksum) {
            return Err(MapError::Damaged);
        }
        Self::read(&mut &body[MAGIC.len()..]).ok_or(MapError::Damaged)
    }

    fn read(rest: &mut &[u8]) -> Option<Self> {
        let length = u16::from_le_bytes(take(rest)?);
        let (engine, after) = rest.split_at_checked(length.into())?;
        *rest = after;
        let engine = String::from_utf8(engine.to_vec()).ok()?;
        let ratio = f64::from_le_bytes(take(rest)?);
        let capacity = f64::from_le_bytes(take(rest)?);
        let count = usize::try_from(u32::from_le_bytes(take(rest)?)).ok()?;
        if count > MAX_CHUNKS || rest.len() < count * ITEM_BYTES {
            return None;
        }
        let mut items = Vec::with_capacity(count);
        for _ in 0..count {
            let [kind] = take(rest)?;
            let chunk = u64::from_le_bytes(take(rest)?);
            let tokens = u32::from_le_bytes(take(rest)?);
            let own = u32::from_le_bytes(take(rest)?);
            items.push(match kind {
                TOKENS => KeptItem::Tokens(tokens),
                ESTIMATED | COUNTED => KeptItem::Chunk {
                    chunk,
                    tokens,
                    own,
                    counted: kind == COUNTED,
                },
                _ => return None,
            });
        }
        let exact = match rest.is_empty() {
            true => None,
            false => Some(KeptExact::decode(rest)?),
        };
        rest.is_empty().then_some(Self {
            engine,
            ratio: Some(ratio).filter(|ratio| ratio.is_finite() && *ratio > 0.0),
            kept: Kept { capacity, items },
            exact,
        })
    }
}

pub(super) fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (taken, after) = rest.split_first_chunk()?;
    *rest = after;
    Some(*taken)
}

const ESTIMATED: u8 = 0;
const COUNTED: u8 = 1;
const TOKENS: u8 = 2;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn item() -> impl Strategy<Value = KeptItem> {
        prop_oneof![
            any::<u32>().prop_map(KeptItem::Tokens),
            any::<(u64, u32, u32, bool)>().prop_map(|(chunk, tokens, own, counted)| {
                KeptItem::Chunk {
                    chunk,
                    tokens,
                    own,
                    counted,
                }
            }),
        ]
    }

    fn map() -> impl Strategy<Value = Map> {
        let kept = (0.0..1e9, proptest::collection::vec(item(), 0..50));
        let exact = proptest::option::of(KeptExact::any());
        ("[ -~]{0,80}", proptest::option::of(0.01..1.0), kept, exact).prop_map(
            |(engine, ratio, (capacity, items), exact)| Map {
                engine,
                ratio,
                kept: Kept { capacity, items },
                exact,
            },
        )
    }

    proptest! {
        #[test]
        fn a_map_is_read_as_it_was_written(map in map()) {
            prop_assert_eq!(Map::decode(&map.encode().unwrap()), Ok(map));
        }

        #[test]
        fn one_that_was_cut_or_changed_is_noticed(map in map(), at in any::<prop::sample::Index>(), with in 1..=255_u8) {
            let whole = map.encode().unwrap();
            let at = at.index(whole.len());
            prop_assert!(Map::decode(&whole[..at]).is_err());
            let mut changed = whole;
            changed[at] ^= with;
            prop_assert!(Map::decode(&changed).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), kv_tokens in any::<u32>()) {
            let mut sealed = MAGIC.to_vec();
            sealed.extend_from_slice(&bytes);
            let _ = Map::decode(&sealed);
            sealed.extend_from_slice(&crc32c::crc32c(&sealed).to_le_bytes());
            if let Ok(map) = Map::decode(&sealed) {
                let _ = forebay_scheduler::residency::Shadow::restored(kv_tokens.into(), &map.kept);
                let mut exact = crate::core::kv::Exact::new([0; 16], kv_tokens.into(), true);
                exact.begin(map.exact.as_ref());
            }
        }
    }
}

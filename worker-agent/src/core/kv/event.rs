//! What an engine says of its cache: batches of events in msgpack, as vLLM and SGLang write them.
//!
//! Batches and events may be arrays or maps; keys and positions that are not known are passed over, and an
//! event of another kind says nothing. Hashes are numbers, signed or not, or bytes, of which the last eight
//! count, as in vLLM's own numbers. Nothing that a message claims is believed before its bytes are there.

use super::msgpack::{Item, Reader, Unreadable};

/// Larger messages are none: the blocks of 100,000 tokens are less than a MB.
pub const MAX_BATCH_BYTES: usize = 4 << 20;
const MAX_EVENTS: usize = 1 << 16;
const MAX_FIELDS: u32 = 256;
/// Room that is made for a list before its items are there.
const FIRST_ITEMS: usize = 4_096;

/// A batch of events: at most one for each step of the engine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// When the engine wrote it, in seconds by its clock; 0 when it does not say.
    pub at: f64,
    /// What happened, in its order.
    pub events: Vec<Event>,
}

/// What happened to blocks.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Blocks are full, and found by their hashes from now on.
    Stored(Stored),
    /// One copy of each of these is gone.
    Removed {
        /// By which they were found.
        hashes: Vec<u64>,
        /// Where they were.
        place: Place,
    },
    /// The cache is empty.
    Cleared,
}

/// Which of an engine's caches is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// It is the GPU's, not a tier behind it.
    pub gpu: bool,
    /// Of a hybrid model, the group of layers.
    pub group: u32,
}

/// Blocks that follow one another in a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// By which each is found.
    pub hashes: Vec<u64>,
    /// The block before the first of them; none: they begin a prompt.
    pub parent: Option<u64>,
    /// Their tokens, so many for each.
    pub tokens: Vec<u32>,
    /// Tokens of one block.
    pub block_tokens: u32,
    /// For each block, what it was hashed with beyond its tokens: a scope's salt, an adapter's name, an
    /// image. Fewer than blocks: the others have nothing.
    pub extras: Vec<Vec<Vec<u8>>>,
    /// The adapter that they were computed with.
    pub adapter: Option<String>,
    /// Where they are.
    pub place: Place,
}

impl Batch {
    /// What it takes in memory, in bytes, about.
    pub(super) fn bytes(&self) -> usize {
        let of_stored = |stored: &Stored| {
            let extras = stored.extras.iter().flatten();
            let extras: usize = extras.map(|extra| extra.len() + size_of::<Vec<u8>>()).sum();
            let lists = stored.extras.len() * size_of::<Vec<Vec<u8>>>();
            size_of_val(&*stored.hashes) + size_of_val(&*stored.tokens) + extras + lists
        };
        let of_event = |event: &Event| match event {
            Event::Stored(stored) => of_stored(stored),
            Event::Removed { hashes, .. } => size_of_val(&**hashes),
            Event::Cleared => 0,
        };
        self.events.iter().map(of_event).sum::<usize>() + size_of_val(&*self.events)
    }

    /// Reads a payload.
    ///
    /// # Errors
    ///
    /// The payload is no batch. Arbitrary bytes never panic.
    pub fn decode(payload: &[u8]) -> Result<Self, Unreadable> {
        if payload.len() > MAX_BATCH_BYTES {
            return Err(Unreadable);
        }
        let mut reader = Reader::new(payload);
        let mut batch = Self::default();
        match reader.item()? {
            Item::Array(length) => {
                for at in 0..length {
                    match at {
                        0 => batch.at = reader.number()?,
                        1 => batch.read_events(&mut reader)?,
                        _ => reader.skip()?,
                    }
                }
                if length < 2 {
                    return Err(Unreadable);
                }
            }
            Item::Map(length) => {
                let mut found = false;
                for _ in 0..length {
                    match reader.text()? {
                        b"ts" => batch.at = reader.number()?,
                        b"events" => {
                            batch.read_events(&mut reader)?;
                            found = true;
                        }
                        _ => reader.skip()?,
                    }
                }
                if !found {
                    return Err(Unreadable);
                }
            }
            _ => return Err(Unreadable),
        }
        reader.end()?;
        Ok(batch)
    }

    fn read_events(&mut self, reader: &mut Reader<'_>) -> Result<(), Unreadable> {
        let Item::Array(length) = reader.item()? else {
            return Err(Unreadable);
        };
        for _ in 0..length {
            if self.events.len() >= MAX_EVENTS {
                return Err(Unreadable);
            }
            self.events.extend(event(reader)?);
        }
        Ok(())
    }
}

/// `None` where it is of a kind that says nothing here.
fn event(reader: &mut Reader<'_>) -> Result<Option<Event>, Unreadable> {
    let mut raw = Raw::default();
    match reader.item()? {
        Item::Array(length) if (1..=MAX_FIELDS).contains(&length) => {
            raw.kind = reader.text()?.to_vec();
            let names = positions(&raw.kind);
            for at in 1..length as usize {
                match names.get(at - 1) {
                    Some(name) => raw.field(name, reader)?,
                    None => reader.skip()?,
                }
            }
        }
        Item::Map(length) if length <= MAX_FIELDS => {
            for _ in 0..length {
                let name = reader.text()?;
                raw.field(name, reader)?;
            }
        }
        _ => return Err(Unreadable),
    }
    raw.event()
}

/// Fields of an event that is an array, behind its kind.
fn positions(kind: &[u8]) -> &'static [&'static [u8]] {
    match kind {
        b"BlockStored" => &[
            b"block_hashes",
            b"parent_block_hash",
            b"token_ids",
            b"block_size",
            b"lora_id",
            b"medium",
            b"lora_name",
            b"extra_keys",
            b"group_idx",
            b"kv_cache_spec_kind",
        ],
        b"BlockRemoved" => &[b"block_hashes", b"medium", b"group_idx"],
        _ => &[],
    }
}

#[derive(Default)]
struct Raw {
    kind: Vec<u8>,
    hashes: Option<Vec<u64>>,
    parent: Option<u64>,
    tokens: Vec<u32>,
    block_tokens: Option<u32>,
    elsewhere: bool,
    group: u32,
    extras: Vec<Vec<Vec<u8>>>,
    salt: Option<Vec<u8>>,
    adapter: Option<String>,
}

impl Raw {
    fn field(&mut self, name: &[u8], reader: &mut Reader<'_>) -> Result<(), Unreadable> {
        match name {
            b"type" => self.kind = reader.text()?.to_vec(),
            b"block_hashes" => self.hashes = Some(list(reader, Reader::hash)?),
            b"parent_block_hash" => self.parent = reader.nullable(Reader::hash)?,
            b"token_ids" => self.tokens = list(reader, Reader::small)?,
            b"block_size" => self.block_tokens = Some(reader.small()?),
            b"medium" => {
                let medium = reader.nullable(Reader::text)?;
                self.elsewhere = medium.is_some_and(|medium| medium != b"GPU");
            }
            b"group_idx" => self.group = reader.nullable(Reader::small)?.unwrap_or(0),
            b"extra_keys" => {
                let extras = reader.nullable(|reader| {
                    list(reader, |reader| {
                        let keys = reader.nullable(|reader| list(reader, Reader::plain))?;
                        Ok(keys.unwrap_or_default())
                    })
                })?;
                self.extras = extras.unwrap_or_default();
            }
            b"cache_salt" => self.salt = reader.nullable(Reader::text)?.map(<[u8]>::to_vec),
            b"lora_name" => {
                let name = reader.nullable(Reader::text)?;
                self.adapter = name.map(|name| String::from_utf8_lossy(name).into_owned());
            }
            _ => reader.skip()?,
        }
        Ok(())
    }

    fn event(self) -> Result<Option<Event>, Unreadable> {
        let place = Place {
            gpu: !self.elsewhere,
            group: self.group,
        };
        match self.kind.as_slice() {
            b"BlockStored" => {
                let mut extras = self.extras;
                if let Some(salt) = self.salt
                    && extras.is_empty()
                    && self.parent.is_none()
                {
                    // SGLang says it beside the blocks.
                    extras.push(vec![salt]);
                }
                Ok(Some(Event::Stored(Stored {
                    hashes: self.hashes.ok_or(Unreadable)?,
                    parent: self.parent,
                    tokens: self.tokens,
                    block_tokens: self.block_tokens.filter(|n| *n > 0).ok_or(Unreadable)?,
                    extras,
                    adapter: self.adapter,
                    place,
                })))
            }
            b"BlockRemoved" => Ok(Some(Event::Removed {
                hashes: self.hashes.ok_or(Unreadable)?,
                place,
            })),
            b"AllBlocksCleared" => Ok(Some(Event::Cleared)),
            _ => Ok(None),
        }
    }
}

/// Grows with the items that are there, not with the number that is claimed.
fn list<'a, T>(
    reader: &mut Reader<'a>,
    mut one: impl FnMut(&mut Reader<'a>) -> Result<T, Unreadable>,
) -> Result<Vec<T>, Unreadable> {
    let Item::Array(length) = reader.item()? else {
        return Err(Unreadable);
    };
    let mut items = Vec::with_capacity(reader.left().min(length as usize).min(FIRST_ITEMS));
    for _ in 0..length {
        items.push(one(reader)?);
    }
    Ok(items)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let (pairs, _) = hex.as_bytes().as_chunks::<2>();
        let byte = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16);
        pairs.iter().map(|pair| byte(pair).unwrap()).collect()
    }

    fn variants() -> Vec<(String, Vec<u8>)> {
        let lines = include_str!("samples/kv-layout-variants.jsonl").lines();
        let field = |line: &str, name: &str| {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            value[name].as_str().unwrap().to_owned()
        };
        lines
            .map(|line| (field(line, "layout"), bytes(&field(line, "payload_hex"))))
            .collect()
    }

    #[test]
    fn every_layout_says_the_same() {
        let place = Place {
            gpu: true,
            group: 0,
        };
        let variants = variants();
        assert_eq!(variants.len(), 4);
        for (at, (layout, payload)) in variants.iter().enumerate() {
            let batch = Batch::decode(payload).unwrap();
            assert_eq!(batch.at, 1_700_000_000.5, "{layout}");
            let salted = at > 0;
            let stored = Stored {
                hashes: vec![11, 9_223_372_036_854_775_813],
                parent: None,
                tokens: vec![1, 2, 300, 70_000],
                block_tokens: 2,
                extras: if salted {
                    vec![vec![b"tenant-a".to_vec()], vec![]]
                } else {
                    vec![]
                },
                adapter: None,
                place,
            };
            let removed = Event::Removed {
                hashes: vec![11],
                place,
            };
            let expected = [Event::Stored(stored), removed, Event::Cleared];
            assert_eq!(batch.events, expected, "{layout}");
        }
    }

    #[test]
    fn a_captured_removal_is_read() {
        let payload = bytes(
            "93cb41dac0d21d9c99c09184a474797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391cfbf41ff72dd7ab02da66d656469756da3475055a967726f75705f6964780000",
        );
        assert_eq!(payload.len(), 76);
        let batch = Batch::decode(&payload).unwrap();
        let [Event::Removed { hashes, place }] = batch.events.as_slice() else {
            panic!("{batch:?}")
        };
        assert_eq!(hashes, &[0xbf41_ff72_dd7a_b02d]);
        assert!(place.gpu && place.group == 0);
    }

    #[test]
    fn hashes_are_numbers_or_bytes() {
        let removed = |hash: &[u8]| {
            let mut payload = bytes("92c091");
            payload.extend(bytes("82a474797065ac426c6f636b52656d6f766564"));
            payload.extend(bytes("ac626c6f636b5f68617368657391"));
            payload.extend(hash);
            let batch = Batch::decode(&payload).unwrap();
            match &batch.events[0] {
                Event::Removed { hashes, .. } => hashes[0],
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(removed(&[0x07]), 7);
        assert_eq!(removed(&bytes("cfffffffffffffffff")), u64::MAX);
        assert_eq!(removed(&bytes("d3fffffffffffffffe")), u64::MAX - 1);
        assert_eq!(removed(&[0xff]), u64::MAX, "a small negative number");
        assert_eq!(removed(&bytes("d180fe")), (-32_514_i64).cast_unsigned());
        let mut whole = bytes("c420");
        whole.extend((0..32).collect::<Vec<u8>>());
        assert_eq!(removed(&whole), 0x1819_1a1b_1c1d_1e1f);
        assert_eq!(removed(&bytes("c4020102")), 0x0102);
    }

    #[test]
    fn what_is_not_known_is_passed_over() {
        // A batch of a future kind of event, and a removal with a field more, on another medium.
        let mut payload = bytes("95cb3ff0000000000000");
        payload.extend(bytes("93"));
        payload.extend(bytes("81a474797065a7426c6f636b5a21"));
        payload.extend(bytes("93a9426c6f636b4d6f766501c0"));
        payload.extend(bytes("95ac426c6f636b52656d6f7665649107a343505501c3"));
        payload.extend(bytes("00c3a178"));
        let batch = Batch::decode(&payload).unwrap();
        let place = Place {
            gpu: false,
            group: 1,
        };
        let hashes = vec![7];
        assert_eq!(batch.events, [Event::Removed { hashes, place }]);
    }

    #[test]
    fn what_is_cut_off_or_goes_on_is_none() {
        for (layout, payload) in variants() {
            for cut in 0..payload.len() {
                assert_eq!(Batch::decode(&payload[..cut]), Err(Unreadable), "{layout}");
            }
            let longer = [payload.as_slice(), &[0]].concat();
            assert_eq!(Batch::decode(&longer), Err(Unreadable), "{layout}");
        }
    }

    #[test]
    fn a_length_is_believed_when_its_items_are_there() {
        // Four thousand million events, in seven bytes.
        assert_eq!(Batch::decode(&bytes("92c0ddffffffff")), Err(Unreadable));
        // Arrays in arrays, deeper than any stack.
        let mut deep = bytes("9390");
        deep.insert(1, 0xc0);
        deep.extend(std::iter::repeat_n(0x91, 1 << 20));
        deep.push(0xc0);
        let _ = Batch::decode(&deep);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(payload in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Batch::decode(&payload);
        }

        #[test]
        fn damaged_batches_never_panic(which in 0..4_usize, at in any::<prop::sample::Index>(), with: u8, cut in any::<prop::sample::Index>()) {
            let (_, mut payload) = variants().swap_remove(which);
            let at = at.index(payload.len());
            payload[at] = with;
            let _ = Batch::decode(&payload);
            let _ = Batch::decode(&payload[..cut.index(payload.len())]);
        }
    }
}

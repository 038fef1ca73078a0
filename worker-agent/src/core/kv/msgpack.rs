//! As much of msgpack as events of a cache need, without recursion.

/// Bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it is no batch of cache events")]
pub struct Unreadable;

/// One item; of arrays and maps, their length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Item<'a> {
    Nil,
    Bool,
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(&'a [u8]),
    Bytes(&'a [u8]),
    Array(u32),
    Map(u32),
    Extension,
}

/// Reads items one after another.
pub(super) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Bytes that are left.
    pub(super) const fn left(&self) -> usize {
        self.rest.len()
    }

    /// Nothing may follow.
    pub(super) const fn end(&self) -> Result<(), Unreadable> {
        match self.rest {
            [] => Ok(()),
            _ => Err(Unreadable),
        }
    }

    pub(super) fn item(&mut self) -> Result<Item<'a>, Unreadable> {
        let [tag] = self.take()?;
        Ok(match tag {
            0x00..=0x7f => Item::Unsigned(tag.into()),
            0x80..=0x8f => Item::Map((tag & 0x0f).into()),
            0x90..=0x9f => Item::Array((tag & 0x0f).into()),
            0xa0..=0xbf => Item::Text(self.bytes((tag & 0x1f).into())?),
            0xc0 => Item::Nil,
            0xc1 => return Err(Unreadable),
            0xc2 | 0xc3 => Item::Bool,
            0xc4..=0xc6 => {
                let length = self.length(tag - 0xc4)?;
                Item::Bytes(self.bytes(length)?)
            }
            0xc7..=0xc9 => {
                let length = self.length(tag - 0xc7)?;
                self.extension(length)?
            }
            0xca => Item::Float(f32::from_be_bytes(self.take()?).into()),
            0xcb => Item::Float(f64::from_be_bytes(self.take()?)),
            0xcc => Item::Unsigned(u8::from_be_bytes(self.take()?).into()),
            0xcd => Item::Unsigned(u16::from_be_bytes(self.take()?).into()),
            0xce => Item::Unsigned(u32::from_be_bytes(self.take()?).into()),
            0xcf => Item::Unsigned(u64::from_be_bytes(self.take()?)),
            0xd0 => Item::Signed(i8::from_be_bytes(self.take()?).into()),
            0xd1 => Item::Signed(i16::from_be_bytes(self.take()?).into()),
            0xd2 => Item::Signed(i32::from_be_bytes(self.take()?).into()),
            0xd3 => Item::Signed(i64::from_be_bytes(self.take()?)),
            0xd4..=0xd8 => self.extension(1 << (tag - 0xd4))?,
            0xd9..=0xdb => {
                let length = self.length(tag - 0xd9)?;
                Item::Text(self.bytes(length)?)
            }
            0xdc => Item::Array(u16::from_be_bytes(self.take()?).into()),
            0xdd => Item::Array(u32::from_be_bytes(self.take()?)),
            0xde => Item::Map(u16::from_be_bytes(self.take()?).into()),
            0xdf => Item::Map(u32::from_be_bytes(self.take()?)),
            0xe0..=0xff => Item::Signed(tag.cast_signed().into()),
        })
    }

    /// Passes over one item with all that is in it.
    pub(super) fn skip(&mut self) -> Result<(), Unreadable> {
        let mut items = 1_u64;
        while items > 0 {
            items -= 1;
            match self.item()? {
                Item::Array(length) => items += u64::from(length),
                Item::Map(length) => items += 2 * u64::from(length),
                _ => {}
            }
            // Each takes a byte at least.
            if items > self.rest.len() as u64 {
                return Err(Unreadable);
            }
        }
        Ok(())
    }

    /// Whatever `one` reads, or nil.
    pub(super) fn nullable<T>(
        &mut self,
        one: impl FnOnce(&mut Self) -> Result<T, Unreadable>,
    ) -> Result<Option<T>, Unreadable> {
        if self.rest.first() == Some(&0xc0) {
            self.rest = &self.rest[1..];
            return Ok(None);
        }
        one(self).map(Some)
    }

    pub(super) fn text(&mut self) -> Result<&'a [u8], Unreadable> {
        match self.item()? {
            Item::Text(text) => Ok(text),
            _ => Err(Unreadable),
        }
    }

    /// A number of any kind; nil is 0.
    pub(super) fn number(&mut self) -> Result<f64, Unreadable> {
        match self.item()? {
            Item::Float(number) => Ok(number),
            Item::Unsigned(number) => Ok(number as f64),
            Item::Signed(number) => Ok(number as f64),
            Item::Nil => Ok(0.0),
            _ => Err(Unreadable),
        }
    }

    pub(super) fn small(&mut self) -> Result<u32, Unreadable> {
        match self.item()? {
            Item::Unsigned(number) => u32::try_from(number).map_err(|_| Unreadable),
            Item::Signed(number) => u32::try_from(number).map_err(|_| Unreadable),
            _ => Err(Unreadable),
        }
    }

    /// A block's hash, as 64 bits.
    pub(super) fn hash(&mut self) -> Result<u64, Unreadable> {
        match self.item()? {
            Item::Unsigned(number) => Ok(number),
            Item::Signed(number) => Ok(number.cast_unsigned()),
            Item::Bytes(bytes) => {
                let last = &bytes[bytes.len().saturating_sub(8)..];
                let fold = |hash: u64, byte: &u8| (hash << 8) | u64::from(*byte);
                Ok(last.iter().fold(0, fold))
            }
            _ => Err(Unreadable),
        }
    }

    /// A text as its bytes; of anything else, as it is written.
    pub(super) fn plain(&mut self) -> Result<Vec<u8>, Unreadable> {
        let before = self.rest;
        if let Item::Text(text) = self.item()? {
            return Ok(text.to_vec());
        }
        self.rest = before;
        self.skip()?;
        Ok(before[..before.len() - self.rest.len()].to_vec())
    }

    /// A length of 1, 2 or 4 bytes.
    fn length(&mut self, power: u8) -> Result<usize, Unreadable> {
        Ok(match power {
            0 => u8::from_be_bytes(self.take()?).into(),
            1 => u16::from_be_bytes(self.take()?).into(),
            _ => u32::from_be_bytes(self.take()?) as usize,
        })
    }

    fn extension(&mut self, length: usize) -> Result<Item<'a>, Unreadable> {
        self.bytes(length + 1)?;
        Ok(Item::Extension)
    }

    fn bytes(&mut self, length: usize) -> Result<&'a [u8], Unreadable> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(Unreadable)?;
        self.rest = rest;
        Ok(bytes)
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Unreadable> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(Unreadable)?;
        self.rest = rest;
        Ok(*taken)
    }
}

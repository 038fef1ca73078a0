//! A JSON reader that hands out spans: no tree, no copies, one visit of each byte.

/// Deepest nesting that is read.
const MAX_DEPTH: u32 = 128;

/// Why a body cannot be read. Says nothing of what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Not UTF-8.
    #[error("the body is not UTF-8")]
    NotUtf8,
    /// Not the JSON that the API asks for.
    #[error("the body is not what the API asks for")]
    Malformed,
    /// An escape names half a character.
    #[error("a string has an escaped surrogate without its other half")]
    LoneSurrogate,
    /// Too many values inside each other.
    #[error("the body is nested deeper than 128")]
    TooDeep,
    /// More messages, or members of one part, than are read.
    #[error("the body has too many messages")]
    TooMany,
}

/// A value's place in the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its first byte.
    pub from: usize,
    /// Behind its last byte.
    pub to: usize,
}

/// Reads values from a place on.
#[derive(Clone)]
pub struct Scanner<'a> {
    body: &'a [u8],
    at: usize,
}

/// What a value begins as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)] // JSON's own words
pub enum Kind {
    Object,
    Array,
    String,
    Number,
    True,
    False,
    Null,
}

impl<'a> Scanner<'a> {
    /// Reads from the beginning.
    #[must_use]
    pub const fn new(body: &'a [u8]) -> Self {
        Self { body, at: 0 }
    }

    /// Reads inside a span.
    #[must_use]
    pub fn within(body: &'a [u8], span: Span) -> Self {
        Self {
            body: &body[..span.to],
            at: span.from,
        }
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.body.get(self.at) {
            self.at += 1;
        }
    }

    fn peek(&mut self) -> Option<u8> {
        self.space();
        self.body.get(self.at).copied()
    }

    /// What comes next.
    ///
    /// # Errors
    ///
    /// Returns what is wrong where it reads.
    pub fn kind(&mut self) -> Result<Kind, Unreadable> {
        match self.peek() {
            Some(b'{') => Ok(Kind::Object),
            Some(b'[') => Ok(Kind::Array),
            Some(b'"') => Ok(Kind::String),
            Some(b't') => Ok(Kind::True),
            Some(b'f') => Ok(Kind::False),
            Some(b'n') => Ok(Kind::Null),
            Some(b'-' | b'0'..=b'9') => Ok(Kind::Number),
            Some(_) | None => Err(Unreadable::Malformed),
        }
    }

    /// Nothing but space is left.
    ///
    /// # Errors
    ///
    /// Returns what is wrong where it reads.
    pub fn end(&mut self) -> Result<(), Unreadable> {
        match self.peek() {
            None => Ok(()),
            Some(_) => Err(Unreadable::Malformed),
        }
    }

    fn expect(&mut self, byte: u8) -> Result<(), Unreadable> {
        if self.peek() == Some(byte) {
            self.at += 1;
            Ok(())
        } else {
            Err(Unreadable::Malformed)
        }
    }

    /// A string's raw content, between its quotes.
    ///
    /// # Errors
    ///
    /// Returns what is wrong where it reads.
    pub fn string(&mut self) -> Result<Span, Unreadable> {
        self.expect(b'"')?;
        let from = self.at;
        loop {
            let rest = &self.body[self.at..];
            let quote = self.at + memchr::memchr(b'"', rest).ok_or(Unreadable::Malformed)?;
            self.at = quote + 1;
            // Escapes of other characters need no look: an odd number of backslashes escapes this one.
            let before = self.body[from..quote].iter().rev();
            let backslashes = before.take_while(|byte| **byte == b'\\').count();
            if backslashes % 2 == 0 {
                return Ok(Span { from, to: quote });
            }
        }
    }

    fn scalar(&mut self) -> Span {
        let from = self.at;
        let ends = |byte: &u8| matches!(byte, b',' | b']' | b'}' | b' ' | b'\n' | b'\r' | b'\t');
        let rest = &self.body[from..];
        self.at = rest
            .iter()
            .position(ends)
            .map_or(self.body.len(), |at| from + at);
        Span { from, to: self.at }
    }

    /// Passes one value by.
    ///
    /// # Errors
    ///
    /// Returns what is wrong where it reads.
    pub fn skip(&mut self) -> Result<Span, Unreadable> {
        let kind = self.kind()?;
        let from = self.at;
        match kind {
            Kind::String => {
                self.string()?;
            }
            Kind::Object | Kind::Array => self.skip_nested()?,
            Kind::Number | Kind::True | Kind::False | Kind::Null => {
                let span = self.scalar();
                check_scalar(kind, &self.body[span.from..span.to])?;
            }
        }
        Ok(Span { from, to: self.at })
    }

    fn skip_nested(&mut self) -> Result<(), Unreadable> {
        let mut depth = 0_u32;
        loop {
            match self.body.get(self.at) {
                Some(b'{' | b'[') => {
                    depth += 1;
                    if depth > MAX_DEPTH {
                        return Err(Unreadable::TooDeep);
                    }
                    self.at += 1;
                }
                Some(b'}' | b']') => {
                    self.at += 1;
                    depth -= 1;
                    if depth == 0 {
                        return Ok(());
                    }
                }
                Some(b'"') => {
                    self.string()?;
                }
                Some(_) => self.at += 1,
                None => return Err(Unreadable::Malformed),
            }
        }
    }

    /// Enters an object: calls `member` with each key's raw span and a scanner at its value, which
    /// must read exactly that value.
    ///
    /// # Errors
    ///
    /// Returns what is wrong where it reads.
    pub fn object(
        &mut self,
        mut member: impl FnMut(Span, &mut Self) -> Result<(), Unreadable>,
    ) -> Result<(), Unreadable> {
        self.expect(b'{')?;
        if self.peek() == Some(b'}') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.space();
            let key = self.string()?;
            self.expect(b':')?;
            self.space();
            member(key, self)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b'}') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(_) | None => return Err(Unreadable::Malformed),
            }
        }
    }

    /// Enters an array: calls `item` with a scanner at each item, which must read exactly that.
    ///
    /// # Errors
    ///
    /// Returns what is wrong where it reads.
    pub fn array(
        &mut self,
        mut item: impl FnMut(&mut Self) -> Result<(), Unreadable>,
    ) -> Result<(), Unreadable> {
        self.expect(b'[')?;
        if self.peek() == Some(b']') {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.space();
            item(self)?;
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(b']') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(_) | None => return Err(Unreadable::Malformed),
            }
        }
    }
}

fn check_scalar(kind: Kind, text: &[u8]) -> Result<(), Unreadable> {
    let sound = match kind {
        Kind::True => text == b"true",
        Kind::False => text == b"false",
        Kind::Null => text == b"null",
        _ => {
            let number = |byte: &u8| matches!(byte, b'0'..=b'9' | b'-' | b'+' | b'.' | b'e' | b'E');
            text.iter().all(number)
        }
    };
    sound.then_some(()).ok_or(Unreadable::Malformed)
}

/// Hands out a string's content piece by piece, unescaped. What stands between escapes that are close to
/// each other comes together.
///
/// # Errors
///
/// Returns what is wrong with an escape.
pub fn unescape(raw: &[u8], mut piece: impl FnMut(&[u8])) -> Result<(), Unreadable> {
    let (mut rest, mut gathered) = (raw, Gathered::default());
    while let Some(at) = next_escape(rest) {
        if at <= NEAR {
            gathered.room(&mut piece);
            gathered.near(rest, at);
        } else {
            gathered.hand(&mut piece);
            piece(&rest[..at]);
        }
        let (character, used) = escape(&rest[at..])?;
        gathered.room(&mut piece);
        gathered.character(character);
        rest = &rest[at + used..];
    }
    gathered.hand(&mut piece);
    if !rest.is_empty() {
        piece(rest);
    }
    Ok(())
}

/// Up to here, text is copied rather than handed out.
const NEAR: usize = 64;

/// Where the next escape begins. Most are near, or there is none.
fn next_escape(text: &[u8]) -> Option<usize> {
    let (words, _) = text.as_chunks::<8>();
    for (at, word) in words.iter().take(NEAR / 8).enumerate() {
        let differs = u64::from_le_bytes(*word) ^ BACKSLASHES;
        // The lowest high bit that is set stands in the first byte that is zero.
        let zeros = differs.wrapping_sub(LOW) & !differs & (LOW << 7);
        if zeros != 0 {
            return Some(at * 8 + zeros.trailing_zeros() as usize / 8);
        }
    }
    let seen = (words.len() * 8).min(NEAR);
    memchr::memchr(b'\\', &text[seen..]).map(|at| seen + at)
}

/// One in every byte, and a backslash in every byte.
const LOW: u64 = 0x0101_0101_0101_0101;
const BACKSLASHES: u64 = 0x5c5c_5c5c_5c5c_5c5c;

/// Pieces that are handed out together.
struct Gathered {
    bytes: [u8; 256],
    length: usize,
}

impl Default for Gathered {
    fn default() -> Self {
        Self {
            bytes: [0; 256],
            length: 0,
        }
    }
}

impl Gathered {
    /// Makes room for one piece or character.
    #[inline]
    fn room(&mut self, piece: &mut impl FnMut(&[u8])) {
        if self.length + NEAR + 8 > self.bytes.len() {
            self.hand(piece);
        }
    }

    fn hand(&mut self, piece: &mut impl FnMut(&[u8])) {
        if self.length > 0 {
            piece(&self.bytes[..self.length]);
            self.length = 0;
        }
    }

    /// Takes the first bytes of `text`, at most [`NEAR`].
    #[inline]
    fn near(&mut self, text: &[u8], length: usize) {
        // Whole words, though the last of them may be too long: that is written over.
        let (words, _) = text.as_chunks::<8>();
        let whole = length.div_ceil(8);
        if whole <= words.len() {
            for (at, word) in words[..whole].iter().enumerate() {
                let to = self.length + at * 8;
                self.bytes[to..to + 8].copy_from_slice(word);
            }
        } else {
            self.bytes[self.length..self.length + length].copy_from_slice(&text[..length]);
        }
        self.length += length;
    }

    #[inline]
    fn character(&mut self, character: char) {
        let utf8 = character.encode_utf8(&mut self.bytes[self.length..]);
        self.length += utf8.len();
    }
}

/// One escape at the beginning of `text`, and how many bytes it takes.
fn escape(text: &[u8]) -> Result<(char, usize), Unreadable> {
    let simple = |character| Ok((character, 2));
    match text.get(1) {
        Some(b'"') => simple('"'),
        Some(b'\\') => simple('\\'),
        Some(b'/') => simple('/'),
        Some(b'b') => simple('\u{8}'),
        Some(b'f') => simple('\u{c}'),
        Some(b'n') => simple('\n'),
        Some(b'r') => simple('\r'),
        Some(b't') => simple('\t'),
        Some(b'u') => {
            let first = hex(text.get(2..6))?;
            if !(0xd800..0xe000).contains(&first) {
                let character = char::from_u32(first).ok_or(Unreadable::LoneSurrogate)?;
                return Ok((character, 6));
            }
            if first >= 0xdc00 || text.get(6..8) != Some(b"\\u") {
                return Err(Unreadable::LoneSurrogate);
            }
            let second = hex(text.get(8..12))?;
            if !(0xdc00..0xe000).contains(&second) {
                return Err(Unreadable::LoneSurrogate);
            }
            let code = 0x1_0000 + ((first - 0xd800) << 10) + (second - 0xdc00);
            let character = char::from_u32(code).ok_or(Unreadable::LoneSurrogate)?;
            Ok((character, 12))
        }
        Some(_) | None => Err(Unreadable::Malformed),
    }
}

fn hex(digits: Option<&[u8]>) -> Result<u32, Unreadable> {
    let (mut code, mut all) = (0, 0);
    for digit in digits.ok_or(Unreadable::Malformed)? {
        let value = HEX[usize::from(*digit)];
        code = code << 4 | u32::from(value);
        all |= value;
    }
    if all > 15 {
        return Err(Unreadable::Malformed);
    }
    Ok(code)
}

/// The value of a hexadecimal digit; above 15 for what is none.
const HEX: [u8; 256] = {
    let mut table = [16; 256];
    let mut digit = 0;
    while digit < 16 {
        let (lower, upper) = (b"0123456789abcdef", b"0123456789ABCDEF");
        table[lower[digit] as usize] = digit as u8;
        table[upper[digit] as usize] = digit as u8;
        digit += 1;
    }
    table
};

/// Whether a raw string says `text` once it is unescaped.
#[must_use]
pub fn says(raw: &[u8], text: &[u8]) -> bool {
    if memchr::memchr(b'\\', raw).is_none() {
        return raw == text;
    }
    let mut left = text;
    let mut same = true;
    let read = unescape(raw, |piece| match left.strip_prefix(piece) {
        Some(rest) => left = rest,
        None => same = false,
    });
    read.is_ok() && same && left.is_empty()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn unescaped(raw: &[u8]) -> Result<Vec<u8>, Unreadable> {
        let mut text = Vec::new();
        unescape(raw, |piece| text.extend_from_slice(piece)).map(|()| text)
    }

    proptest! {
        /// Against `serde_json`, escapes being as frequent as they like.
        #[test]
        fn strings_are_read_as_others_read_them(
            parts in proptest::collection::vec(
                prop_oneof![
                    "[a-z é水]{0,90}",
                    Just("\\".to_owned()), Just("\"".to_owned()), Just("\n".to_owned()),
                    "[\u{0}-\u{1f}\u{10000}-\u{10fff}]{1,3}",
                ],
                0..40,
            ),
            ascii: bool,
        ) {
            let text = parts.concat();
            let mut written = serde_json::to_string(&text).unwrap();
            if ascii {
                written = written.chars().map(|c| if c.is_ascii() { c.to_string() } else {
                    let mut units = [0; 2];
                    c.encode_utf16(&mut units).iter().map(|unit| format!("\\u{unit:04X}")).collect()
                }).collect();
            }
            let behind = format!("{written},\"x\\\\\"");
            let mut scanner = Scanner::new(behind.as_bytes());
            let span = scanner.string().unwrap();
            prop_assert_eq!(span, Span { from: 1, to: written.len() - 1 });
            prop_assert_eq!(unescaped(&behind.as_bytes()[span.from..span.to]), Ok(text.into_bytes()));
        }
    }

    #[test]
    fn escapes_that_are_none_are_refused() {
        for raw in [r"\u12g4", r"\u123", r"\x", r"\", r"\u 123", r"\u+123"] {
            assert_eq!(
                unescaped(raw.as_bytes()),
                Err(Unreadable::Malformed),
                "{raw}"
            );
        }
        for raw in [r"\ud800", r"\udc00\ud800", r"\ud800\u0041", r"\ud800x"] {
            assert_eq!(
                unescaped(raw.as_bytes()),
                Err(Unreadable::LoneSurrogate),
                "{raw}"
            );
        }
        let open = |text: &str| Scanner::new(text.as_bytes()).string();
        assert_eq!(open(r#""abc\""#), Err(Unreadable::Malformed));
        assert_eq!(open(r#""abc"#), Err(Unreadable::Malformed));
        assert_eq!(open(r#""a\\""#), Ok(Span { from: 1, to: 4 }));
    }
}

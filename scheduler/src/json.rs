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
            let found = memchr::memchr2(b'"', b'\\', rest).ok_or(Unreadable::Malformed)?;
            self.at += found;
            if self.body[self.at] == b'"' {
                let span = Span { from, to: self.at };
                self.at += 1;
                return Ok(span);
            }
            self.at += 2;
            if self.at > self.body.len() {
                return Err(Unreadable::Malformed);
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

/// Hands out a string's content piece by piece, unescaped.
///
/// # Errors
///
/// Returns what is wrong with an escape.
pub fn unescape(raw: &[u8], mut piece: impl FnMut(&[u8])) -> Result<(), Unreadable> {
    let mut rest = raw;
    while let Some(at) = memchr::memchr(b'\\', rest) {
        if at > 0 {
            piece(&rest[..at]);
        }
        let (character, used) = escape(&rest[at..])?;
        let mut utf8 = [0; 4];
        piece(character.encode_utf8(&mut utf8).as_bytes());
        rest = &rest[at + used..];
    }
    if !rest.is_empty() {
        piece(rest);
    }
    Ok(())
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
    let digits = digits.ok_or(Unreadable::Malformed)?;
    digits.iter().try_fold(0, |code, digit| {
        let digit = char::from(*digit).to_digit(16);
        digit
            .map(|digit| code << 4 | digit)
            .ok_or(Unreadable::Malformed)
    })
}

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

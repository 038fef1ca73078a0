//! What the emulated engine says: text that shows every gap, repeat and swap.
//!
//! A token is a space and three characters of `a-z2-7`, chosen by a hash of everything before it:
//! the prompt's canonical bytes, then the tokens already said. Whoever knows the prompt can
//! therefore check an answer that went through any number of relays, and an answer continued
//! elsewhere from `prompt + text so far` goes on exactly where it stopped.
//!
//! The canonical bytes of a completion are the prompt. Those of a chat are, for each message,
//! `FF role FE content`, then `FF "assistant" FE` for the answer, which is left out when the last
//! message is to be continued; UTF-8 contains neither `FF` nor `FE`. The hash is FNV-1a (64 bit)
//! over them, and a token takes the 15 top bits of its mixed state (splitmix64's finaliser).
//!
//! Prompts are kept as hashes alone, so nothing here can leak one.

/// A prompt as its hash and its size: all that the text depends on.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Prompt {
    state: State,
    bytes: u64,
}

impl Prompt {
    /// The prompt of a text completion.
    #[must_use]
    pub fn completion(text: &str) -> Prompt {
        let mut prompt = Prompt::empty();
        prompt.say(text.as_bytes());
        prompt
    }

    /// The prompt of a chat of `(role, content)`, ready for the assistant's answer.
    #[must_use]
    pub fn chat<'a>(messages: impl IntoIterator<Item = (&'a str, &'a str)>) -> Prompt {
        let mut prompt = Prompt::empty();
        for (role, content) in messages {
            prompt.begin_message(role);
            prompt.say(content.as_bytes());
        }
        prompt.begin_message("assistant");
        prompt
    }

    pub(super) fn empty() -> Prompt {
        Prompt {
            state: State::START,
            bytes: 0,
        }
    }

    /// Hashes everything up to here, for the engine's cache.
    pub(super) const fn hash(&self) -> u64 {
        self.state.0
    }

    /// Bytes of content so far.
    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// A scope: prompts of different ones share nothing, and say what they would say without.
    pub(super) fn salted(salt: &str) -> Prompt {
        let mut prompt = Prompt::empty();
        prompt.begin_message(salt);
        prompt
    }

    /// Structure: it changes the text but does not count as prompt.
    pub(super) fn begin_message(&mut self, role: &str) {
        self.state.fold(&[0xff]);
        self.state.fold(role.as_bytes());
        self.state.fold(&[0xfe]);
    }

    /// Content: it changes the text and counts as prompt.
    pub(super) fn say(&mut self, content: &[u8]) {
        self.state.fold(content);
        self.bytes += content.len() as u64;
    }

    /// Its length: four bytes of content are a token, as is what is left.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.bytes.div_ceil(TOKEN_BYTES as u64)
    }

    /// The answer, without end.
    #[must_use]
    pub fn answer(&self) -> Answer {
        Answer(self.state)
    }
}

/// The endless answer to a prompt, token by token.
#[derive(Clone)]
pub struct Answer(State);

impl Iterator for Answer {
    type Item = Token;

    fn next(&mut self) -> Option<Token> {
        let token = self.0.token();
        self.0.fold(&token.0);
        Some(token)
    }
}

/// One token of text: four bytes of ASCII that need no escape in JSON.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token([u8; TOKEN_BYTES]);

impl Token {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("a token is ASCII")
    }

    /// Its id: its bytes as a number.
    #[must_use]
    pub const fn id(&self) -> u32 {
        u32::from_le_bytes(self.0)
    }
}

/// Where an answer first differs from what the engine says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the text is wrong from token {token} (byte {byte}) on")]
pub struct FirstBadPosition {
    /// The token, from 0.
    pub token: u64,
    /// The byte, from 0.
    pub byte: u64,
}

/// Checks a whole answer; returns how many tokens it has.
///
/// A cut at the end cannot be seen here, other than inside a token: compare the count.
///
/// # Errors
///
/// Says where the text first differs.
pub fn verify(prompt: &Prompt, text: &str) -> Result<u64, FirstBadPosition> {
    let mut verifier = Verifier::new(prompt);
    verifier.push(text)?;
    verifier.finish()
}

/// Checks an answer piece by piece, however it is cut.
#[derive(Clone)]
pub struct Verifier {
    answer: Answer,
    token: Token,
    /// Bytes that were right.
    good: u64,
}

impl Verifier {
    /// Starts at the first token of the answer to `prompt`.
    #[must_use]
    pub fn new(prompt: &Prompt) -> Verifier {
        let mut answer = prompt.answer();
        let token = answer.next().expect("an answer has no end");
        Verifier {
            answer,
            token,
            good: 0,
        }
    }

    /// Takes the next piece.
    ///
    /// # Errors
    ///
    /// Says where the text first differs, here or in an earlier piece.
    pub fn push(&mut self, piece: &str) -> Result<(), FirstBadPosition> {
        for byte in piece.bytes() {
            let within = (self.good % TOKEN_BYTES as u64) as usize;
            if self.token.0[within] != byte {
                return Err(self.position());
            }
            self.good += 1;
            if within + 1 == TOKEN_BYTES {
                self.token = self.answer.next().expect("an answer has no end");
            }
        }
        Ok(())
    }

    /// Ends the text; returns how many tokens it had.
    ///
    /// # Errors
    ///
    /// The text must not end inside a token.
    pub fn finish(self) -> Result<u64, FirstBadPosition> {
        if self.good.is_multiple_of(TOKEN_BYTES as u64) {
            Ok(self.good / TOKEN_BYTES as u64)
        } else {
            Err(self.position())
        }
    }

    fn position(&self) -> FirstBadPosition {
        FirstBadPosition {
            token: self.good / TOKEN_BYTES as u64,
            byte: self.good,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct State(u64);

impl State {
    const START: State = State(0xcbf2_9ce4_8422_2325);

    fn fold(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn token(self) -> Token {
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        let letter = |shift: u32| ALPHABET[(mixed >> shift) as usize & 31];
        Token([b' ', letter(59), letter(54), letter(49)])
    }
}

const TOKEN_BYTES: usize = 4;
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said(prompt: &Prompt, tokens: usize) -> Vec<&'static str> {
        let text: Vec<Token> = prompt.answer().take(tokens).collect();
        text.iter()
            .map(|token| &*token.as_str().to_owned().leak())
            .collect()
    }

    fn prompt() -> Prompt {
        Prompt::chat([("system", "be brief"), ("user", "hello")])
    }

    #[test]
    fn an_answer_is_verified_whole() {
        let text = said(&prompt(), 50).concat();
        assert_eq!(verify(&prompt(), &text), Ok(50));
        assert_eq!(verify(&prompt(), ""), Ok(0));
        let bad = FirstBadPosition {
            token: 49,
            byte: 199,
        };
        assert_eq!(verify(&prompt(), &text[..199]), Err(bad));
    }

    #[test]
    fn a_dropped_repeated_or_swapped_token_is_noticed() {
        let good = said(&prompt(), 50);
        for at in 0..49 {
            let mut dropped = good.clone();
            dropped.remove(at);
            let mut repeated = good.clone();
            repeated.insert(at, good[at]);
            let mut swapped = good.clone();
            swapped.swap(at, at + 1);
            for (text, first) in [(dropped, at), (repeated, at + 1), (swapped, at)] {
                let bad = verify(&prompt(), &text.concat()).unwrap_err();
                assert_eq!(bad.token, first as u64);
            }
        }
    }

    #[test]
    fn another_prompt_gives_another_text() {
        let text = said(&prompt(), 20).concat();
        for other in [
            Prompt::chat([("system", "be brief"), ("user", "hello ")]),
            Prompt::chat([("user", "be brief"), ("user", "hello")]),
            Prompt::chat([("system", "be briefhello")]),
            Prompt::completion("be briefhello"),
        ] {
            assert_eq!(verify(&other, &text).unwrap_err().token, 0);
        }
    }

    #[test]
    fn a_continued_answer_goes_on_where_it_stopped() {
        let whole = said(&Prompt::completion("once"), 20);
        let rest = said(
            &Prompt::completion(&format!("once{}", whole[..8].concat())),
            12,
        );
        assert_eq!(rest, whole[8..]);
    }

    #[test]
    fn the_text_never_changes() {
        assert_eq!(
            said(&Prompt::completion("The cache block"), 4).concat(),
            GOLDEN
        );
        assert_eq!(Prompt::completion("The cache block").tokens(), 4);
        assert_eq!(prompt().tokens(), 4);
    }

    const GOLDEN: &str = " 3nm swn pgc hal";

    proptest! {
        #[test]
        fn any_cutting_verifies(cuts in proptest::collection::vec(0_usize..9, 0..40)) {
            let text = said(&prompt(), 30).concat();
            let mut verifier = Verifier::new(&prompt());
            let mut rest = &*text;
            for cut in cuts {
                let (piece, tail) = rest.split_at(cut.min(rest.len()));
                verifier.push(piece).unwrap();
                rest = tail;
            }
            verifier.push(rest).unwrap();
            prop_assert_eq!(verifier.finish(), Ok(30));
        }

        #[test]
        fn no_text_panics(text: String) {
            let _ = verify(&prompt(), &text);
        }
    }
}

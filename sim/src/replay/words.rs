//! Makes up the text of a prompt: plain words, the same for the same seed, of an exact length.

/// Whose text it is. Texts of different owners share no long prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// A KV block, by its id: equal in every request that names it.
    Block(u64),
    /// What a request has to itself, by the request's place in the trace.
    Request(u64),
}

/// Appends `bytes` bytes of ASCII words.
pub(super) fn write(text: &mut String, owner: Owner, bytes: usize) {
    let mut state = match owner {
        Owner::Block(id) => mix(id),
        Owner::Request(index) => mix(mix(index) ^ REQUESTS),
    };
    let end = text.len() + bytes;
    while text.len() < end {
        state = state.wrapping_add(GAMMA);
        let mut draw = mix(state);
        for _ in 0..8 {
            let word = WORDS[(draw & 127) as usize];
            draw >>= 7;
            text.push_str(word);
            text.push(' ');
        }
    }
    text.truncate(end);
}

/// splitmix64's finaliser.
fn mix(mut state: u64) -> u64 {
    state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;
const REQUESTS: u64 = 0x7265_7175_6573_7473;

const WORDS: [&str; 128] = [
    "about", "above", "across", "after", "again", "air", "all", "always", "among", "answer",
    "around", "ask", "away", "back", "base", "bear", "before", "begin", "better", "between",
    "black", "book", "both", "bring", "build", "carry", "cause", "change", "children", "city",
    "clear", "close", "cold", "color", "come", "common", "country", "course", "cover", "cross",
    "deep", "door", "down", "draw", "dry", "each", "earth", "east", "enough", "even", "every",
    "example", "face", "fall", "family", "farm", "father", "feel", "field", "final", "find",
    "fire", "first", "follow", "food", "foot", "form", "found", "friend", "front", "full", "game",
    "gave", "girl", "give", "good", "great", "green", "ground", "group", "grow", "half", "hand",
    "hard", "head", "hear", "help", "high", "hold", "home", "horse", "hour", "house", "hundred",
    "idea", "inch", "island", "keep", "kind", "king", "know", "land", "large", "last", "late",
    "learn", "leave", "letter", "light", "line", "list", "listen", "little", "long", "machine",
    "main", "many", "mark", "money", "morning", "mother", "mountain", "music", "name", "near",
    "never", "night", "north",
];

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn text(owner: Owner, bytes: usize) -> String {
        let mut text = String::new();
        write(&mut text, owner, bytes);
        text
    }

    #[test]
    fn the_text_never_changes() {
        assert_eq!(
            text(Owner::Block(0), 40),
            "east change morning hold bring always do"
        );
    }

    proptest! {
        #[test]
        fn a_text_has_its_length_and_extends_the_shorter_one(id: u64, bytes in 0_usize..5000) {
            let long = text(Owner::Block(id), bytes + 100);
            prop_assert_eq!(long.len(), bytes + 100);
            prop_assert!(long.starts_with(&text(Owner::Block(id), bytes)));
            prop_assert!(long.bytes().all(|b| b == b' ' || b.is_ascii_lowercase()));
        }

        #[test]
        fn texts_of_different_owners_part_soon(a: u64, b: u64) {
            prop_assume!(a != b);
            prop_assert_ne!(text(Owner::Block(a), 64), text(Owner::Block(b), 64));
            prop_assert_ne!(text(Owner::Request(a), 64), text(Owner::Request(b), 64));
            prop_assert_ne!(text(Owner::Block(a), 64), text(Owner::Request(a), 64));
        }
    }
}

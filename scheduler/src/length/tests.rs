//! Lengths that real vocabularies have, and what of them is foreseen.

use proptest::prelude::*;

use super::*;

/// 320 made-up conversations of real texts: what they are about; bytes of each class (no quotes, no
/// media) and canonical bytes of all messages but the last; tokens by the vocabularies of Qwen 3,
/// Llama 3.1 and Gemma 3; and both for the last message. Made by `docs/evidence/prompt_length.py`.
const SAMPLES: &str = include_str!("samples.csv");

struct Sample {
    makeup: Makeup,
    bytes: [f64; 2],
    tokens: [[u32; 3]; 2],
}

/// Bytes by class, canonical bytes, tokens by vocabulary.
fn part(counts: &str, tokens: &str) -> (Worths, f64, [u32; 3]) {
    let numbers: Vec<f64> = counts.split(',').map(|n| n.parse().unwrap()).collect();
    let mut by_class = [0.0; CLASSES];
    by_class[..7].copy_from_slice(&numbers[..7]);
    by_class[Class::Tag as usize] = numbers[7];
    let tokens: Vec<u32> = tokens.split(',').map(|n| n.parse().unwrap()).collect();
    (by_class, numbers[8], [tokens[0], tokens[1], tokens[2]])
}

fn samples() -> Vec<Sample> {
    let read = |line: &str| {
        let fields: Vec<_> = line.split(';').collect();
        let (before, bytes_before, tokens_before) = part(fields[1], fields[2]);
        let (last, bytes_last, tokens_last) = part(fields[3], fields[4]);
        let mut makeup = Makeup::default();
        // As many chunks as counters of 16 bits need.
        for _ in 0..4 {
            makeup.chunks.push(before.map(|count| (count / 4.0) as u16));
        }
        makeup.rest = Counts(last.map(|count| count as u64));
        Sample {
            makeup,
            bytes: [bytes_before, bytes_last],
            tokens: [tokens_before, tokens_last],
        }
    };
    SAMPLES.lines().map(read).collect()
}

struct Errors(Vec<f64>);

impl Errors {
    fn add(&mut self, predicted: f64, actual: f64) {
        self.0.push((predicted / actual - 1.0).abs());
    }

    fn quantiles(&mut self) -> (f64, f64) {
        self.0.sort_by(f64::total_cmp);
        let at = |share: f64| self.0[(self.0.len() as f64 * share) as usize];
        (at(0.5), at(0.95))
    }
}

#[test]
#[allow(clippy::print_stdout)] // the figures of docs/evidence/prompt-length.md
fn classes_foresee_lengths_better_than_bytes() {
    for vocabulary in 0..3 {
        let (mut lengths, mut mean) = (Lengths::default(), 0.29);
        let (mut by_bytes, mut by_class) = (Errors(vec![]), Errors(vec![]));
        let (mut behind_bytes, mut behind_class) = (Errors(vec![]), Errors(vec![]));
        let mut first = Errors(vec![]);
        let (mut judged, mut within) = (0.0, 0.0);
        for (at, sample) in samples().iter().enumerate() {
            let [held, rest] = sample.tokens.map(|by| f64::from(by[vocabulary]));
            let (whole, bytes) = (held + rest, sample.bytes[0] + sample.bytes[1]);
            let cold = lengths.predict(&sample.makeup, 0, 0);
            let warm = lengths.predict(&sample.makeup, 4, sample.tokens[0][vocabulary]);
            if at < 30 {
                first.add(cold.tokens, whole);
            } else {
                by_bytes.add(bytes * mean, whole);
                by_class.add(cold.tokens, whole);
                behind_bytes.add(held + sample.bytes[1] * mean, whole);
                behind_class.add(warm.tokens, whole);
                judged += 1.0;
                within += f64::from(u8::from(whole <= cold.tokens + cold.longer));
            }
            mean += 0.05 * (whole / bytes - mean);
            lengths.learn(&sample.makeup, whole as u32);
        }
        let (bytes, class) = (by_bytes.quantiles(), by_class.quantiles());
        let (warm_bytes, warm_class) = (behind_bytes.quantiles(), behind_class.quantiles());
        let share = within / judged;
        println!(
            "{vocabulary}: p50/p95 by bytes {bytes:.3?}, by class {class:.3?}, first 30 {:.3?}; behind what is held by bytes \
             {warm_bytes:.3?}, by class {warm_class:.3?}; within the 0.95 quantile {share:.3}",
            first.quantiles()
        );
        assert!(class.0 < bytes.0 / 2.0 && class.1 < bytes.1 / 2.0);
        assert!(class.0 < 0.08 && class.1 < 0.25, "{class:?}");
        assert!(warm_class.0 < 0.04 && warm_class.1 < 0.16, "{warm_class:?}");
        assert!(first.quantiles().0 < 0.12);
        assert!((0.9..0.99).contains(&share), "{share}");
    }
}

#[test]
fn what_is_held_was_counted_and_ids_count_themselves() {
    let lengths = Lengths::default();
    let mut makeup = Makeup::default();
    makeup.chunk("a".repeat(256).as_bytes());
    makeup.chunk("a".repeat(256).as_bytes());
    let whole = lengths.predict(&makeup, 2, 77);
    assert_eq!((whole.tokens, whole.longer), (77.0, 0.0));
    let more = lengths.predict(&makeup, 9, 77);
    assert_eq!(more, whole, "held is more than there is");
    let half = lengths.predict(&makeup, 1, 70);
    let rest = half.tokens - 70.0;
    assert!((69.0..72.0).contains(&rest), "{rest}");
    assert!(half.longer > 0.0 && half.longer < rest);
    makeup.given_in_ids(31);
    let ids = lengths.predict(&makeup, 1, 5);
    assert_eq!((ids.tokens, ids.longer), (31.0, 0.0));
    assert_eq!(lengths.predict(&Makeup::default(), 0, 0).tokens, 1.0);
}

#[test]
fn a_conversation_goes_on_as_it_was() {
    let lengths = Lengths::default();
    let mut makeup = Makeup::default();
    for _ in 0..20 {
        makeup.chunk(&[b'a'; 256]);
    }
    makeup.rest().count(&[b'a'; 1_000]);
    let rest = |counted: u32| lengths.predict(&makeup, 20, counted).tokens - f64::from(counted);
    let likely = lengths.predict(&makeup, 20, 1_382);
    assert!(rest(2_000) > 1.3 * rest(1_382));
    assert!(rest(700) < 0.6 * rest(1_382) && rest(1) > 0.49 * rest(1_382));
    assert!(rest(1_000_000) < 2.1 * rest(1_382), "{likely:?}");
}

#[test]
fn one_model_learns_and_nonsense_is_bounded() {
    let mut lengths = Lengths::default();
    let mut text = Makeup::default();
    text.rest()
        .count("some text of 30 letters, so. ".repeat(40).as_bytes());
    (0..300).for_each(|_| lengths.learn(&text, 500));
    let learnt = lengths.predict(&text, 0, 0).tokens;
    assert!((490.0..510.0).contains(&learnt), "{learnt}");
    lengths.learn(&text, 0);
    assert_eq!(lengths.predict(&text, 0, 0).tokens, learnt);
    (0..10_000).for_each(|_| lengths.learn(&text, u32::MAX));
    let most = lengths.predict(&text, 0, 0);
    assert!(most.tokens.is_finite() && most.tokens < 4_000.0, "{most:?}");
    (0..10_000).for_each(|_| lengths.learn(&text, 32));
    assert!(lengths.predict(&text, 0, 0).tokens >= 1.0);
}

fn by_hand(text: &[u8]) -> Counts {
    let mut counts = Counts::default();
    for byte in text {
        counts.one(match byte {
            b'a'..=b'z' => Class::Lower,
            b'A'..=b'Z' => Class::Upper,
            b'0'..=b'9' => Class::Digit,
            0..=b' ' => Class::Space,
            0x21..0x80 => Class::Punctuation,
            0x80..0xc0 | 0xf5..0xfc => continue,
            0xc0..0xe0 => Class::Two,
            0xe0..0xf5 => Class::Three,
            0xfc | 0xfd => Class::Quote,
            0xfe | 0xff => Class::Tag,
        });
    }
    counts
}

proptest! {
    #[test]
    fn every_byte_is_counted_where_it_belongs(
        bytes in proptest::collection::vec(any::<u8>(), 0..1_500), text in ".{0,300}", cut in 0_usize..8,
    ) {
        for bytes in [&bytes[..], text.as_bytes()] {
            let mut counts = Counts::default();
            counts.count(bytes);
            prop_assert_eq!(counts, by_hand(bytes));
            let mut makeup = Makeup::default();
            let chunks = bytes.chunks_exact(128);
            makeup.rest().count(chunks.remainder());
            chunks.for_each(|chunk| makeup.chunk(chunk));
            prop_assert_eq!(makeup.all(), counts);
            let (mut held, rest) = makeup.split(cut);
            held.0.iter_mut().zip(rest.0).for_each(|(held, rest)| *held += rest);
            prop_assert_eq!(held, counts);
            makeup.without_chunks();
            prop_assert_eq!(makeup.split(9).1, counts);
        }
    }

    #[test]
    fn whatever_is_counted_lengths_stay_lengths(
        seen in proptest::collection::vec((".{0,200}", any::<u32>()), 0..40), held in 0_u32..4, counted: u32,
    ) {
        let mut lengths = Lengths::default();
        for (text, tokens) in &seen {
            let mut makeup = Makeup::default();
            text.as_bytes().chunks(64).for_each(|chunk| makeup.chunk(chunk));
            lengths.learn(&makeup, *tokens);
            let length = lengths.predict(&makeup, held, counted);
            prop_assert!(length.tokens.is_finite() && length.tokens >= 1.0);
            prop_assert!(length.longer.is_finite() && length.longer >= 0.0);
            prop_assert!(length.tokens >= f64::from(counted));
        }
    }
}

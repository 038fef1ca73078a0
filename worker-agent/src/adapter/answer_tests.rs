//! Answers of engines, cut anywhere.

use proptest::prelude::*;

use bytes::Bytes;

use super::answer::{Answers, Events, Verdict};
use crate::core::Usage;

const STREAM: &str = concat!(
    "data: {\"choices\":[{\"delta\":{\"content\":\"é \\\"usage\\\" \"}}]}\n\n",
    ": ping\n\n",
    "data: {\"choices\":[{\"delta\":{\"content\":\"x\"},\"finish_reason\":\"stop\"}]}\n\n",
    "data: {\"choices\":[],\"usage\":{\"prompt_tokens\":161,\"total_tokens\":173,\"completion_tokens\":12,\"prompt_tokens_details\":{\"cached_tokens\":160}}}\n\n",
    "data: [DONE]\n\n",
);
const COUNTED: Usage = Usage {
    prompt_tokens: Some(161),
    cached_tokens: Some(160),
    completion_tokens: Some(12),
};

fn relayed(stream: &str, cuts: &[usize], strip: bool) -> (String, Usage) {
    let (out, usage, _) = judged(stream, cuts, strip, false);
    (out, usage)
}

fn judged(stream: &str, cuts: &[usize], strip: bool, says_why: bool) -> (String, Usage, Verdict) {
    let mut events = Events::new(strip, says_why);
    let mut out = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().chain([stream.len()]) {
        out.extend_from_slice(&events.push(Bytes::copy_from_slice(&stream.as_bytes()[from..to])));
        from = to;
    }
    let (rest, verdict) = events.finish();
    out.extend_from_slice(&rest);
    (String::from_utf8(out).unwrap(), events.usage(), verdict)
}

/// Whatever way it is cut, this much of it is passed on, and it is judged so.
fn check(stream: &str, says_why: bool, passed: &str, expected: Verdict) {
    for cuts in [
        vec![],
        (1..stream.len())
            .filter(|at| stream.is_char_boundary(*at))
            .collect(),
    ] {
        let (out, _, verdict) = judged(stream, &cuts, true, says_why);
        assert_eq!((out.as_str(), verdict), (passed, expected), "{stream}");
    }
}

const SAID: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":null}]}\n\n";
const STOPS: &str = "data: {\"choices\":[{\"delta\":{},\"finish_reason\": \"stop\"}]}\n\n";
const DONE: &str = "data: [DONE]\n\n";

#[test]
fn a_finish_reason_is_success_and_done_is_not() {
    let whole = [SAID, STOPS, DONE].concat();
    check(&whole, true, &whole, Verdict::Whole);
    check(&[SAID, DONE].concat(), true, SAID, Verdict::Broken);
    check(SAID, true, SAID, Verdict::Broken);
    check(
        &[SAID, STOPS].concat(),
        true,
        &[SAID, STOPS].concat(),
        Verdict::Whole,
    );
    let speaks = "data: {\"choices\":[{\"delta\":{\"content\":\"\\\"finish_reason\\\":\\\"stop\\\" [DONE]\"},\"finish_reason\":null}]}\n\n";
    check(&[speaks, DONE].concat(), true, speaks, Verdict::Broken);
}

#[test]
fn an_error_inside_a_stream_is_a_failure_though_done_follows() {
    let sigterm = include_str!("../../tests/samples/vllm-stream-error-sigterm.sse");
    check(sigterm, true, "", Verdict::Broken);
    check(sigterm, false, "", Verdict::Broken);
    let behind = [SAID, sigterm].concat();
    check(&behind, true, SAID, Verdict::Broken);
    check("error: {\"code\":500}\n\n", true, "", Verdict::Broken);
    check("event: error\ndata: {}\n\n", true, "", Verdict::Broken);
    let none = "data: {\"error\": null, \"choices\":[{\"finish_reason\":\"stop\"}]}\n\n";
    check(none, true, none, Verdict::Whole);
}

#[test]
fn what_another_ended_is_no_answer() {
    let abort = "data: {\"choices\":[{\"delta\":{},\"finish_reason\":\"abort\"}]}\n\n";
    check(&[SAID, abort, DONE].concat(), true, SAID, Verdict::Broken);
    let mut whole = Answers::default();
    whole.push(&Bytes::from_static(
        br#"{"choices":[{"finish_reason":"abort"}]}"#,
    ));
    assert_eq!(whole.finish().1, Verdict::Broken);
}

#[test]
fn an_engine_that_never_says_why_is_passed_on_as_it_is() {
    let plain = "data: {\"choices\":[{\"text\":\"x\"}]}\n\n";
    let whole = [plain, DONE].concat();
    check(&whole, false, &whole, Verdict::Whole);
}

#[test]
fn streams_of_real_engines_are_whole() {
    for (stream, prompt, cached) in [
        (
            include_str!("../../tests/samples/vllm-chat-stream.sse"),
            161,
            128,
        ),
        (
            include_str!("../../tests/samples/llama-chat-stream.sse"),
            161,
            151,
        ),
        (
            include_str!("../../tests/samples/sglang-chat-stream.sse"),
            161,
            160,
        ),
    ] {
        let (out, usage, verdict) = judged(stream, &[100, 700], true, true);
        assert_eq!(verdict, Verdict::Whole);
        assert_eq!(usage.prompt_tokens, Some(prompt));
        assert_eq!(usage.cached_tokens, Some(cached));
        assert!(!out.contains("total_tokens") && out.ends_with(DONE));
        let (out, ..) = judged(stream, &[], false, true);
        assert_eq!(out, stream);
    }
}

#[test]
fn counts_are_taken_out_unless_they_were_asked_for() {
    let (out, usage) = relayed(STREAM, &[], false);
    assert_eq!((out.as_str(), usage), (STREAM, COUNTED));
    let (out, usage) = relayed(STREAM, &[], true);
    assert_eq!(usage, COUNTED);
    assert!(!out.contains("total_tokens") && out.ends_with("data: [DONE]\n\n"));
    assert_eq!(out.matches("data:").count(), 3);
}

#[test]
fn counts_beside_a_choice_stay() {
    let stream = "data: {\"choices\":[{}],\"usage\":{\"prompt_tokens\":1}}\r\n\r\n";
    let (out, usage) = relayed(stream, &[7, 9], true);
    assert_eq!((out.as_str(), usage.prompt_tokens), (stream, Some(1)));
    assert_eq!(usage.cached_tokens, None, "absent is not zero");
}

#[test]
fn an_event_without_end_is_passed_on() {
    let long = format!("data: {}", "x".repeat(3 << 20));
    let stream = format!("{long}\n\n{STREAM}");
    let cuts: Vec<usize> = (1..30).map(|cut| cut * 100_000).collect();
    let (out, usage, verdict) = judged(&stream, &cuts, true, true);
    assert_eq!((usage, verdict), (COUNTED, Verdict::Whole));
    assert!(out.starts_with(&long) && out.ends_with("data: [DONE]\n\n"));
    let (out, _) = relayed("data: broken off", &[3], true);
    assert_eq!(out, "data: broken off");
}

#[test]
fn a_whole_answer_is_read_as_it_passes() {
    let mut answers = Answers::default();
    let text = r#"{"choices":[{"message":{"content":"x"}}],"usage":{"prompt_tokens":161,"completion_tokens":12,"prompt_tokens_details":{"cached_tokens":160}}}"#;
    for piece in text.as_bytes().chunks(7) {
        answers.push(&Bytes::copy_from_slice(piece));
    }
    assert_eq!(answers.finish(), (COUNTED, Verdict::Whole));
    assert_eq!(
        Answers::default().finish(),
        (Usage::default(), Verdict::Whole)
    );
}

proptest! {
    #[test]
    fn cuts_change_nothing(mut cuts in proptest::collection::vec(0..STREAM.len(), 0..12), strip: bool) {
        cuts.sort_unstable();
        prop_assert_eq!(relayed(STREAM, &cuts, strip), relayed(STREAM, &[], strip));
    }

    #[test]
    fn arbitrary_bytes_pass(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..200_usize) {
        let bytes = Bytes::from(bytes);
        let cut = cut.min(bytes.len());
        let mut events = Events::new(false, false);
        let mut out = events.push(bytes.slice(..cut)).to_vec();
        out.extend_from_slice(&events.push(bytes.slice(cut..)));
        let (rest, verdict) = events.finish();
        prop_assume!(verdict == Verdict::Whole);
        out.extend_from_slice(&rest);
        prop_assert_eq!(&out[..], &bytes[..]);
    }
}

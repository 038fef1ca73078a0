//! Between the messages of `work.proto` and the core's types.

use std::time::Duration;

use forebay_proto::frame::{Frame, Kind};
use forebay_proto::suspect::MAX_SUSPECT_TEXT;
use forebay_proto::wire::{Label, control, fleet, work};
use forebay_proto::{Incarnation, Millis};
use forebay_scheduler::Load;
use forebay_scheduler::model::{Profile, Targets};
use forebay_scheduler::residency::Cursor;

use crate::core::{
    Admitted, End, Ending, EngineDeath, Named, Offer, Prompt, Question, Quote, Recorded,
    RefusalReason, Refused, Work,
};

/// What may be asked of an engine.
const PATHS: [&str; 3] = ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"];
const MAX_MODEL_BYTES: usize = 256;
const MAX_REQUEST_ID_BYTES: usize = 128;
const MAX_SALT_BYTES: usize = 64;
/// A MiB in chunks of 256 bytes.
const MAX_CHUNKS: usize = 4_096;
/// No placement runs longer, whatever its balancer says.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Reads a placement's header; `None` when it does not say what it must.
pub(crate) fn offer(frame: &Frame) -> Option<Offer> {
    let place: work::Place = frame.decode().ok()?;
    let incarnation = Incarnation::from_wire(place.incarnation.as_ref()).ok()?;
    let fits = is_request_id(&place.request_id)
        && (1..=MAX_MODEL_BYTES).contains(&place.model.len())
        && PATHS.contains(&place.path.as_str())
        && place.body_bytes > 0
        && place.chunks.len() <= MAX_CHUNKS
        && is_salt(&place.cache_salt);
    let named = (place.suspect_key != 0).then(|| Named {
        key: place.suspect_key,
        key_epoch: place.suspect_epoch,
        tenant: shown(&place.tenant),
        model: shown(&place.model),
        shape: shown(&place.shape),
        suspected: place.suspected,
    });
    fits.then(|| Offer {
        request_id: place.request_id,
        incarnation,
        model: place.model,
        path: place.path,
        body_bytes: place.body_bytes,
        deadline: Millis(place.deadline_ms.into()).duration().min(LONGEST),
        targets: Targets {
            ttft_ms: promised(place.ttft_target_ms),
            tpot_ms: promised(place.tpot_target_ms),
        },
        expected_ttft: place
            .expected_ttft_ms
            .map(|ms| Millis(ms.into()).duration()),
        must_queue: place.must_queue,
        prompt: Prompt {
            chunks: place.chunks,
            bytes: place.prompt_bytes,
            chunk_bytes: place.chunk_bytes,
            tokens: place.prompt_tokens,
        },
        max_tokens: place.max_tokens,
        stream: place.stream,
        cache_salt: Some(place.cache_salt).filter(|salt| !salt.is_empty()),
        zone: Some(place.zone).filter(|zone| !zone.is_empty()),
        key_epoch: place.key_epoch,
        shadow: place.shadow,
        tenant: place.tenant,
        named,
    })
}

/// As far as others are told of it.
fn shown(text: &str) -> String {
    let end = text.floor_char_boundary(MAX_SUSPECT_TEXT);
    let shown = text[..end].chars().filter(|c| !c.is_control());
    shown.collect()
}

/// Absent: nothing was.
fn promised(ms: Option<u32>) -> f64 {
    ms.map_or(f64::INFINITY, f64::from)
}

/// A question, and its number.
pub(crate) fn question(frame: &Frame) -> Option<(u64, Question)> {
    let asked: work::Question = frame.decode().ok()?;
    let question = Question {
        chunks: asked.chunks,
        prompt_tokens: asked.prompt_tokens,
    };
    Some((asked.id, question))
}

pub(crate) fn quote(id: u64, quote: &Quote) -> Frame {
    let quote = work::Quote {
        id,
        cached_tokens: quote.cached_tokens,
        load: Some(quote.load.to_wire()),
    };
    Frame::message(Kind::Quote, &quote)
}

/// What a balancer that wants to follow the cache holds of it: nothing, perhaps. `None`: no such
/// message.
pub(crate) fn cursor(frame: &Frame) -> Option<Option<Cursor>> {
    let follow: work::Follow = frame.decode().ok()?;
    let held = follow.cache != 0 || follow.seq != 0;
    Some(held.then_some(Cursor {
        cache: follow.cache,
        seq: follow.seq,
    }))
}

/// It goes into the body of the engine's request.
fn is_salt(salt: &str) -> bool {
    salt.len() <= MAX_SALT_BYTES && salt.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// It goes into a header of the engine's request.
fn is_request_id(id: &str) -> bool {
    (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

pub(crate) fn accepted(admitted: &Admitted) -> Frame {
    let accepted = work::Accepted {
        report_seq: admitted.report_seq,
        load: Some(admitted.load.to_wire()),
    };
    Frame::message(Kind::Accepted, &accepted)
}

pub(crate) fn refused(refused: &Refused) -> Frame {
    use work::RefusalReason as Wire;
    let reason = match refused.reason {
        RefusalReason::Fenced => Wire::RefusalFenced,
        RefusalReason::Cordoned => Wire::RefusalCordoned,
        RefusalReason::Draining => Wire::RefusalDraining,
        RefusalReason::Full => Wire::RefusalFull,
        RefusalReason::StaleView => Wire::RefusalStaleView,
        RefusalReason::EngineDown => Wire::RefusalEngineDown,
        RefusalReason::WrongModel => Wire::RefusalWrongModel,
        RefusalReason::Deadline => Wire::RefusalDeadline,
        RefusalReason::BodyBudget => Wire::RefusalBodyBudget,
        RefusalReason::Invalid => Wire::RefusalInvalid,
        RefusalReason::WrongZone => Wire::RefusalWrongZone,
        RefusalReason::WrongTenant => Wire::RefusalWrongTenant,
    };
    let refused = work::Refused {
        reason: reason.into(),
        load: Some(refused.load.to_wire()),
        current: Some(refused.load.incarnation.to_wire()),
    };
    Frame::message(Kind::Refused, &refused)
}

/// The status line and the headers that are relayed.
pub(crate) fn head(status: u16, content_type: Option<&str>) -> Frame {
    let label = |value: &str| Label {
        key: "content-type".into(),
        value: value.into(),
    };
    let head = work::Head {
        status: status.into(),
        headers: content_type.map(label).into_iter().collect(),
    };
    Frame::message(Kind::Head, &head)
}

/// `share`: what is held against it of the engine's death; 0: nothing.
pub(crate) fn trailer(end: End, detail: &str, ending: &Ending, share: u32) -> Frame {
    let wire = match end {
        End::Complete => work::End::Complete,
        End::NotStarted => work::End::NotStarted,
        End::EngineFailed => work::End::EngineFailed,
        End::Timeout => work::End::Timeout,
        End::Cancelled => work::End::Cancelled,
        End::Drained => work::End::Drained,
    };
    let ms = |duration| Millis::from_duration(duration).wire();
    let trailer = work::Trailer {
        end: wire.into(),
        report_seq: ending.report_seq,
        load: Some(ending.load.to_wire()),
        detail: detail.into(),
        queue_ms: ms(ending.queue),
        first_byte_ms: ms(ending.first_byte),
        service_ms: ms(ending.service),
        prompt_tokens: ending.usage.prompt_tokens,
        cached_tokens: ending.usage.cached_tokens,
        completion_tokens: ending.usage.completion_tokens,
        share,
    };
    Frame::message(Kind::Trailer, &trailer)
}

/// What is under way, for a renewal; requests are named only while they are waited for.
pub(crate) fn work_under_way(work: Work, draining: bool) -> control::Work {
    control::Work {
        in_flight: work.in_flight,
        queued: work.queued,
        oldest_ms: Millis::from_duration(work.oldest).0,
        tokens_left: work.tokens_left,
        eta_ms: Millis::from_duration(work.eta).0,
        oldest: if draining {
            work.oldest_ids
        } else {
            Vec::new()
        },
    }
}

/// What was recorded, for the plan of this number.
pub(crate) fn arrivals(wanted: u64, recorded: Recorded) -> control::Arrivals {
    let Profile {
        floor_ms,
        base_ms,
        token_ms,
        context_ms,
        pair_ms,
        chunk_tokens,
    } = recorded.profile;
    control::Arrivals {
        incarnation: Some(recorded.incarnation.to_wire()),
        wanted,
        arrivals: recorded.arrivals,
        one_in: recorded.one_in,
        window_ms: Millis::from_duration(recorded.window).0,
        model: Some(control::Model {
            floor_ms,
            base_ms,
            token_ms,
            context_ms,
            pair_ms,
            chunk_tokens,
        }),
        kv_tokens: recorded.kv_tokens,
    }
}

pub(crate) fn load(load: &Load) -> Frame {
    Frame::message(Kind::Load, &load.to_wire())
}

/// A death of the engine, for the control plane.
pub(crate) fn accusation(of: Incarnation, death: EngineDeath) -> fleet::AccuseRequests {
    let accused = death
        .accused
        .into_iter()
        .map(|(named, share)| fleet::Accused {
            key: named.key,
            key_epoch: named.key_epoch,
            tenant: named.tenant,
            model: named.model,
            shape: named.shape,
            share,
        });
    fleet::AccuseRequests {
        incarnation: Some(of.to_wire()),
        accused: accused.collect(),
        in_flight: death.in_flight,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(change: impl FnOnce(&mut work::Place)) -> bool {
        let mut place = work::Place {
            request_id: "r-1".into(),
            incarnation: Some(forebay_proto::wire::Incarnation {
                worker: 1,
                grant: 2,
                start: 3,
            }),
            model: "m".into(),
            path: "/v1/chat/completions".into(),
            body_bytes: 10,
            deadline_ms: 1_000,
            ..work::Place::default()
        };
        change(&mut place);
        offer(&Frame::message(Kind::Place, &place)).is_some()
    }

    #[test]
    fn a_header_says_who_what_where_and_how_much() {
        assert!(check(|_| {}));
        assert!(check(|p| p.path = "/v1/completions".into()));
        assert!(check(|p| p.path = "/v1/embeddings".into()));
        assert!(!check(|p| p.request_id.clear()));
        assert!(!check(|p| p.request_id = "a\r\nx: y".into()));
        assert!(!check(|p| p.request_id = "a".repeat(129)));
        assert!(!check(|p| p.incarnation = None));
        assert!(!check(|p| p.model.clear()));
        assert!(!check(|p| p.model = "m".repeat(257)));
        assert!(!check(|p| p.path = "/v1/load_lora_adapter".into()));
        assert!(!check(|p| p.path = "/v1/chat/completions?x".into()));
        assert!(!check(|p| p.body_bytes = 0), "an unknown size");
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = offer(&Frame::new(Kind::Place, bytes.into()));
        }
    }
}

//! Packing: each struct is taken apart whole, so that a new field cannot be forgotten.

use std::time::Duration;

use forebay_proto::Incarnation;

use super::super::{Asked, Considered, Filtered, Outcome, Receipt, Versions};
use super::{BUSY, CHOSEN, NO_CAPACITY, UNKNOWN_MODEL};
use crate::model::{Backlog, Profile, Residuals};
use crate::pick::{Draws, NoChoice};
use crate::policy::Candidate;
use crate::wait::Queueing;

pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    pub(super) fn receipt(&mut self, receipt: &Receipt) {
        let Receipt {
            policy,
            versions:
                Versions {
                    facts_revision,
                    index_version,
                },
            asked,
            draws,
            eligible,
            in_flight,
            filtered,
            considered,
            drawn,
            outcome,
        } = receipt;
        self.text(policy);
        self.number(facts_revision.0);
        self.number(*index_version);
        self.asked(asked);
        let Draws { policy, ties } = draws;
        for draw in policy.iter().chain([ties]) {
            self.0.extend(draw.to_le_bytes());
        }
        self.count(*eligible);
        self.number(*in_flight);
        self.filtered(filtered);
        self.count(considered.len());
        for one in considered {
            self.considered(one);
        }
        self.count(drawn.len());
        for (incarnation, bookings) in drawn {
            self.incarnation(*incarnation);
            self.count(*bookings);
        }
        match outcome {
            Outcome::Chosen(incarnation) => {
                self.0.push(CHOSEN);
                self.incarnation(*incarnation);
            }
            Outcome::Nobody(NoChoice::UnknownModel) => self.0.push(UNKNOWN_MODEL),
            Outcome::Nobody(NoChoice::NoCapacity) => self.0.push(NO_CAPACITY),
            Outcome::Nobody(NoChoice::Busy) => self.0.push(BUSY),
        }
    }

    fn asked(&mut self, asked: &Asked) {
        let Asked {
            model,
            prompt_tokens,
            longer_tokens,
            ttft_ms,
            tpot_ms,
            conversation,
            head,
            turn,
            tried,
            apart,
            zone,
            family,
        } = asked;
        self.text(model);
        self.float(*prompt_tokens);
        self.float(*longer_tokens);
        self.option(*ttft_ms, Self::float);
        self.option(*tpot_ms, Self::float);
        self.option(*conversation, |writer, key| {
            writer.0.extend(key.to_le_bytes());
        });
        self.0.extend(head.to_le_bytes());
        self.number(*turn);
        for workers in [tried, apart] {
            self.count(workers.len());
            for worker in workers {
                self.number(worker.0.into());
            }
        }
        self.option(zone.as_deref(), Self::text);
        self.option(*family, |writer, chunk| {
            writer.0.extend(chunk.to_le_bytes());
        });
    }

    fn filtered(&mut self, filtered: &Filtered) {
        let Filtered {
            unreachable,
            closed,
            tried,
            apart,
            short,
            suspect,
            full,
            dearer,
            not_kept,
        } = *filtered;
        for count in [
            unreachable,
            closed,
            tried,
            apart,
            short,
            suspect,
            full,
            dearer,
            not_kept,
        ] {
            self.count(count);
        }
    }

    fn considered(&mut self, one: &Considered) {
        let Considered {
            incarnation,
            candidate,
            score: _,
            feasible: _,
        } = one;
        let Candidate {
            // The one of the incarnation.
            worker: _,
            place,
            cached_tokens,
            counted_tokens,
            backlog,
            profile,
            residuals: Residuals { ttft_p50, ttft_p95 },
            queueing:
                Queueing {
                    present,
                    slots,
                    service,
                },
            age,
            suspicion,
            kv_tokens,
            recent_ms,
            terms: _,
        } = candidate;
        self.incarnation(*incarnation);
        self.count(*place);
        self.float(*cached_tokens);
        self.float(*counted_tokens);
        self.backlog(backlog);
        self.profile(profile);
        self.float(*ttft_p50);
        self.float(*ttft_p95);
        self.number((*present).into());
        self.number((*slots).into());
        self.duration(*service);
        self.duration(*age);
        self.float(*suspicion);
        self.float(*kv_tokens);
        self.float(*recent_ms);
    }

    fn backlog(&mut self, backlog: &Backlog) {
        let Backlog {
            pending_tokens,
            pending_pairs,
            decodes,
            context_tokens,
            lineup,
        } = backlog;
        for float in [pending_tokens, pending_pairs, decodes, context_tokens] {
            self.float(*float);
        }
        // Most have none.
        let parts = lineup.parts();
        self.0.push(u8::from(parts.iter().any(|part| *part != 0.0)));
        if parts.iter().any(|part| *part != 0.0) {
            for part in parts {
                self.0.extend(part.to_le_bytes());
            }
        }
    }

    fn profile(&mut self, profile: &Profile) {
        let Profile {
            floor_ms,
            base_ms,
            token_ms,
            context_ms,
            pair_ms,
            chunk_tokens,
        } = profile;
        for float in [floor_ms, base_ms, token_ms, context_ms, pair_ms] {
            self.float(*float);
        }
        self.number((*chunk_tokens).into());
    }

    fn incarnation(&mut self, incarnation: Incarnation) {
        let Incarnation {
            worker,
            grant,
            start,
        } = incarnation;
        self.number(worker.0.into());
        self.number(grant);
        self.number(start.into());
    }

    fn duration(&mut self, duration: Duration) {
        self.number(duration.as_secs());
        self.number(duration.subsec_nanos().into());
    }

    fn option<T>(&mut self, value: Option<T>, write: impl FnOnce(&mut Self, T)) {
        self.0.push(u8::from(value.is_some()));
        if let Some(value) = value {
            write(self, value);
        }
    }

    fn text(&mut self, text: &str) {
        self.count(text.len());
        self.0.extend(text.as_bytes());
    }

    fn count(&mut self, count: usize) {
        self.number(count as u64);
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self, mut number: u64) {
        while number >= 0x80 {
            self.0.push((number & 0x7f) as u8 | 0x80);
            number >>= 7;
        }
        self.0.push(number as u8);
    }

    /// The bytes up to the last that is not zero, and how many they are: a whole number has few.
    fn float(&mut self, float: f64) {
        let bytes = float.to_bits().to_be_bytes();
        let zeros = float.to_bits().trailing_zeros().min(64) as usize / 8;
        let kept = &bytes[..8 - zeros];
        self.0.push(kept.len() as u8);
        self.0.extend(kept);
    }
}

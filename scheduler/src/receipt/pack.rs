//! Receipts in few bytes, so that a balancer can keep the last hundred thousand of them in memory.
//!
//! What follows from the rest is left out and made again: predictions, scores, feasibility. A number of
//! 64 bits takes as many bytes as it has up to its last one that is not zero. This form lives in one
//! process only; on the wire and in files a receipt is JSON.

use std::time::Duration;

use forebay_proto::{Incarnation, Revision, WorkerId};

use super::{Asked, Considered, Filtered, Outcome, Receipt, Versions};
use crate::lineup::Lineup;
use crate::model::{Backlog, Profile, Residuals};
use crate::pick::{Draws, NoChoice};
use crate::policy::{self, Candidate, Score};
use crate::terms::Terms;
use crate::wait::Queueing;

/// A receipt that takes little room.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed(Box<[u8]>);

impl Packed {
    /// How much room it takes, in bytes.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing in it, which no receipt is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The receipt as it was; `None`: it is of a policy that this version does not have.
    #[must_use]
    pub fn receipt(&self) -> Option<Receipt> {
        let mut receipt = Reader(&self.0).receipt()?;
        receipt.predict()?;
        Some(receipt)
    }
}

impl Receipt {
    /// Takes little room.
    #[must_use]
    pub fn packed(&self) -> Packed {
        let mut writer = Writer(Vec::with_capacity(256 + 128 * self.considered.len()));
        writer.receipt(self);
        Packed(writer.0.into_boxed_slice())
    }

    /// Fills in what follows from the rest.
    fn predict(&mut self) -> Option<()> {
        let policy = policy::named(&self.policy)?;
        let request = self.asked.request();
        let targets = request.targets;
        let mut scores = Vec::with_capacity(self.considered.len());
        for one in &mut self.considered {
            one.candidate.predict(&request);
            one.feasible = one.candidate.terms.feasible(&targets);
        }
        let candidates: Vec<_> = self.considered.iter().map(|one| one.candidate).collect();
        policy.scores(&request, &candidates, &self.field(), &mut scores);
        for (one, score) in self.considered.iter_mut().zip(scores) {
            one.score = score;
        }
        Some(())
    }
}

struct Writer(Vec<u8>);

impl Writer {
    fn receipt(&mut self, receipt: &Receipt) {
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
            zone,
        } = asked;
        self.text(model);
        self.float(*prompt_tokens);
        self.float(*longer_tokens);
        self.option(*ttft_ms, Self::float);
        self.option(*tpot_ms, Self::float);
        self.option(*conversation, |writer, key| {
            writer.0.extend(key.to_le_bytes())
        });
        self.0.extend(head.to_le_bytes());
        self.number(*turn);
        self.count(tried.len());
        for worker in tried {
            self.number(worker.0.into());
        }
        self.option(zone.as_deref(), Self::text);
    }

    fn filtered(&mut self, filtered: &Filtered) {
        let Filtered {
            unreachable,
            closed,
            tried,
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

const CHOSEN: u8 = 0;
const UNKNOWN_MODEL: u8 = 1;
const NO_CAPACITY: u8 = 2;
const BUSY: u8 = 3;

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn receipt(&mut self) -> Option<Receipt> {
        Some(Receipt {
            policy: self.text()?,
            versions: Versions {
                facts_revision: Revision(self.number()?),
                index_version: self.number()?,
            },
            asked: self.asked()?,
            draws: Draws {
                policy: [self.fixed()?, self.fixed()?],
                ties: self.fixed()?,
            },
            eligible: self.count()?,
            in_flight: self.number()?,
            filtered: self.filtered()?,
            considered: self.list(Self::considered)?,
            drawn: self.list(|reader| Some((reader.incarnation()?, reader.count()?)))?,
            outcome: match self.byte()? {
                CHOSEN => Outcome::Chosen(self.incarnation()?),
                UNKNOWN_MODEL => Outcome::Nobody(NoChoice::UnknownModel),
                NO_CAPACITY => Outcome::Nobody(NoChoice::NoCapacity),
                BUSY => Outcome::Nobody(NoChoice::Busy),
                _ => return None,
            },
        })
    }

    fn asked(&mut self) -> Option<Asked> {
        Some(Asked {
            model: self.text()?,
            prompt_tokens: self.float()?,
            longer_tokens: self.float()?,
            ttft_ms: self.option(Self::float)?,
            tpot_ms: self.option(Self::float)?,
            conversation: self.option(Self::fixed)?,
            head: self.fixed()?,
            turn: self.number()?,
            tried: self.list(|reader| Some(WorkerId(u32::try_from(reader.number()?).ok()?)))?,
            zone: self.option(Self::text)?,
        })
    }

    fn filtered(&mut self) -> Option<Filtered> {
        Some(Filtered {
            unreachable: self.count()?,
            closed: self.count()?,
            tried: self.count()?,
            short: self.count()?,
            suspect: self.count()?,
            full: self.count()?,
            dearer: self.count()?,
            not_kept: self.count()?,
        })
    }

    fn considered(&mut self) -> Option<Considered> {
        let incarnation = self.incarnation()?;
        Some(Considered {
            incarnation,
            candidate: Candidate {
                worker: incarnation.worker,
                place: self.count()?,
                cached_tokens: self.float()?,
                backlog: self.backlog()?,
                profile: self.profile()?,
                residuals: Residuals {
                    ttft_p50: self.float()?,
                    ttft_p95: self.float()?,
                },
                queueing: Queueing {
                    present: self.small()?,
                    slots: self.small()?,
                    service: self.duration()?,
                },
                age: self.duration()?,
                suspicion: self.float()?,
                kv_tokens: self.float()?,
                recent_ms: self.float()?,
                terms: Terms::default(),
            },
            score: Score::default(),
            feasible: false,
        })
    }

    fn backlog(&mut self) -> Option<Backlog> {
        Some(Backlog {
            pending_tokens: self.float()?,
            pending_pairs: self.float()?,
            decodes: self.float()?,
            context_tokens: self.float()?,
            lineup: match self.byte()? {
                0 => Lineup::default(),
                _ => {
                    let mut parts = Lineup::default().parts();
                    for part in &mut parts {
                        *part = f32::from_le_bytes(self.bytes(4)?.try_into().ok()?);
                    }
                    Lineup::of_parts(parts)
                }
            },
        })
    }

    fn profile(&mut self) -> Option<Profile> {
        Some(Profile {
            floor_ms: self.float()?,
            base_ms: self.float()?,
            token_ms: self.float()?,
            context_ms: self.float()?,
            pair_ms: self.float()?,
            chunk_tokens: self.small()?,
        })
    }

    fn incarnation(&mut self) -> Option<Incarnation> {
        Some(Incarnation {
            worker: WorkerId(self.small()?),
            grant: self.number()?,
            start: self.small()?,
        })
    }

    fn duration(&mut self) -> Option<Duration> {
        Some(Duration::new(self.number()?, self.small()?))
    }

    fn list<T>(&mut self, read: impl Fn(&mut Self) -> Option<T>) -> Option<Vec<T>> {
        let count = self.count()?;
        (0..count).map(|_| read(self)).collect()
    }

    fn option<T>(&mut self, read: impl FnOnce(&mut Self) -> Option<T>) -> Option<Option<T>> {
        match self.byte()? {
            0 => Some(None),
            _ => read(self).map(Some),
        }
    }

    fn text(&mut self) -> Option<String> {
        let length = self.count()?;
        String::from_utf8(self.bytes(length)?.to_vec()).ok()
    }

    fn small(&mut self) -> Option<u32> {
        u32::try_from(self.number()?).ok()
    }

    fn count(&mut self) -> Option<usize> {
        usize::try_from(self.number()?).ok()
    }

    fn number(&mut self) -> Option<u64> {
        let (mut number, mut shift) = (0, 0);
        loop {
            let byte = self.byte()?;
            number |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte < 0x80 {
                return Some(number);
            }
            shift += 7;
        }
    }

    fn fixed(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.bytes(8)?.try_into().ok()?))
    }

    fn float(&mut self) -> Option<f64> {
        let kept = usize::from(self.byte()?);
        let mut bytes = [0; 8];
        bytes.get_mut(..kept)?.copy_from_slice(self.bytes(kept)?);
        Some(f64::from_bits(u64::from_be_bytes(bytes)))
    }

    fn byte(&mut self) -> Option<u8> {
        Some(self.bytes(1)?[0])
    }

    fn bytes(&mut self, count: usize) -> Option<&[u8]> {
        let (bytes, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(bytes)
    }
}

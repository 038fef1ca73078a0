//! Unpacking, in the order of packing; what follows from the rest is left empty.

use std::time::Duration;

use forebay_proto::{Incarnation, Revision, WorkerId};

use super::super::{Asked, Considered, Filtered, Outcome, Receipt, Versions};
use super::{BUSY, CHOSEN, NO_CAPACITY, UNKNOWN_MODEL};
use crate::lineup::Lineup;
use crate::model::{Backlog, Profile, Residuals};
use crate::pick::{Draws, NoChoice};
use crate::policy::{Candidate, Score};
use crate::terms::Terms;
use crate::wait::Queueing;

pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl Reader<'_> {
    pub(super) fn receipt(&mut self) -> Option<Receipt> {
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
            tried: self.workers()?,
            apart: self.workers()?,
            zone: self.option(Self::text)?,
            family: self.option(Self::fixed)?,
        })
    }

    fn workers(&mut self) -> Option<Vec<WorkerId>> {
        self.list(|reader| Some(WorkerId(u32::try_from(reader.number()?).ok()?)))
    }

    fn filtered(&mut self) -> Option<Filtered> {
        Some(Filtered {
            unreachable: self.count()?,
            closed: self.count()?,
            tried: self.count()?,
            apart: self.count()?,
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
                counted_tokens: self.float()?,
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

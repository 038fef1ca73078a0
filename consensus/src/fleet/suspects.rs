//! Requests that were on engines when they died: what is held against each, and which are refused.
//!
//! Agents say which requests were on an engine that died unexplained and how much each is to blame, and which of
//! those under suspicion ran well since. What follows from it is [`Suspect`]'s own arithmetic. Suspects are few and
//! bounded; at the bound the one that is suspected least gives way, and a quarantine never does.

use std::collections::BTreeMap;

use forebay_proto::refusal::Refusal;
use forebay_proto::suspect::{EngineDeath, MAX_SUSPECT_TEXT, Suspect};
use forebay_proto::wire::fleet as wire;
use wire::change::Change;

use super::members::QUARANTINE_LEVEL;
use super::{Effect, Fleet};
/// Requests that something is held against.
pub const MAX_SUSPECTS: usize = 1_024;

/// Requests in one command.
pub const MAX_ACCUSED: usize = 256;

impl Fleet {
    pub(super) fn accuse_requests(
        &mut self,
        command: wire::AccuseRequests,
    ) -> Result<Effect, Refusal> {
        self.needs(QUARANTINE_LEVEL)?;
        let worker = self
            .fenced("accuse_requests", command.incarnation.as_ref())?
            .id;
        if command.accused.len() > MAX_ACCUSED {
            let problem = format!("has more than {MAX_ACCUSED} entries");
            return Err(Refusal::invalid("accuse_requests.accused", problem));
        }
        let mut next = self.suspects.clone();
        for (position, accused) in command.accused.into_iter().enumerate() {
            let path = |field: &str| format!("accuse_requests.accused[{position}].{field}");
            if accused.key == 0 || accused.share == 0 {
                return Err(Refusal::invalid(path("key"), "or its share is zero"));
            }
            for (field, text) in [
                ("tenant", &accused.tenant),
                ("model", &accused.model),
                ("shape", &accused.shape),
            ] {
                if text.len() > MAX_SUSPECT_TEXT || text.chars().any(char::is_control) {
                    let problem = format!("is no text of at most {MAX_SUSPECT_TEXT} bytes");
                    return Err(Refusal::invalid(path(field), problem));
                }
            }
            let death = EngineDeath {
                worker,
                share: accused.share,
                at: self.cell_time,
            };
            let suspect = next.entry(accused.key).or_insert_with(|| Suspect {
                key: accused.key,
                key_epoch: accused.key_epoch,
                tenant: accused.tenant,
                model: accused.model,
                shape: accused.shape,
                deaths: Vec::new(),
                cleared: 0,
                quarantined_at: None,
            });
            suspect.accuse(death);
        }
        while next.len() > MAX_SUSPECTS {
            let least = next.values().filter(|suspect| !suspect.is_quarantined());
            let least = least.min_by_key(|suspect| (suspect.suspicion(), suspect.until()));
            // Where all are quarantined, the oldest of them is.
            let oldest = next.values().min_by_key(|suspect| suspect.until());
            let Some(key) = least.or(oldest).map(|suspect| suspect.key) else {
                break;
            };
            next.remove(&key);
        }
        Ok(self.suspected(next))
    }

    pub(super) fn clear_requests(
        &mut self,
        command: &wire::ClearRequests,
    ) -> Result<Effect, Refusal> {
        self.needs(QUARANTINE_LEVEL)?;
        self.fenced("clear_requests", command.incarnation.as_ref())?;
        if command.keys.len() > MAX_ACCUSED {
            let problem = format!("has more than {MAX_ACCUSED} entries");
            return Err(Refusal::invalid("clear_requests.keys", problem));
        }
        let mut next = self.suspects.clone();
        for key in &command.keys {
            if next.get_mut(key).is_some_and(Suspect::clear) {
                next.remove(key);
            }
        }
        Ok(self.suspected(next))
    }

    pub(super) fn lift_quarantine(
        &mut self,
        command: &wire::LiftQuarantine,
    ) -> Result<Effect, Refusal> {
        self.needs(QUARANTINE_LEVEL)?;
        let mut next = self.suspects.clone();
        if command.keys.is_empty() {
            next.retain(|_, suspect| !suspect.is_quarantined());
        }
        for key in &command.keys {
            if next.remove(key).is_none() && !self.suspects.contains_key(key) {
                return Err(Refusal::UnknownSuspect { key: *key });
            }
        }
        let affected = self.suspects.len() - next.len();
        let affected = u32::try_from(affected).unwrap_or(u32::MAX);
        let effect = if command.dry_run {
            Effect::unchanged()
        } else {
            self.suspected(next)
        };
        Ok(Effect { affected, ..effect })
    }

    pub(super) fn forget_suspects(&mut self) -> Result<Effect, Refusal> {
        self.needs(QUARANTINE_LEVEL)?;
        let mut next = self.suspects.clone();
        next.retain(|_, suspect| self.cell_time < suspect.until());
        Ok(self.suspected(next))
    }

    /// Takes these for the agreed ones.
    fn suspected(&mut self, next: BTreeMap<u64, Suspect>) -> Effect {
        let put = next
            .values()
            .filter(|suspect| self.suspects.get(&suspect.key) != Some(suspect))
            .map(Suspect::to_wire)
            .collect();
        let removed = self.suspects.keys();
        let removed = removed.filter(|key| !next.contains_key(key));
        let changes = wire::SuspectChanges {
            put,
            removed: removed.copied().collect(),
        };
        if changes.put.is_empty() && changes.removed.is_empty() {
            return Effect::unchanged();
        }
        self.suspects = next;
        Effect::change(Change::Suspects(changes))
    }
}

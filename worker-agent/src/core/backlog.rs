//! What the engine has before it, in tokens: reconstructed from what was given to it.
//!
//! Engines expose no iterations; the agent is the engine's only client, so what it gave and what came
//! back say enough. A prompt is pending until its first token; what was prefilled of the oldest one
//! since the last first token follows from the latency model.

use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::model::Backlog;

use super::admission::Offer;
use super::placement::Stage;
use super::state::Core;

impl Core {
    /// The backlog as of the newest moment that is known here.
    pub(super) fn backlog(&self) -> Backlog {
        let now = self.now;
        let mut backlog = Backlog::default();
        let mut oldest: Option<(Now, f64, f64)> = None;
        let mut decoding = Vec::new();
        for placement in self.placements.values() {
            if let Some(since) = placement.decodes_since(now) {
                decoding.push((since, placement));
                continue;
            }
            let (tokens, pairs) = placement.prefill();
            backlog.pending_tokens += tokens;
            backlog.pending_pairs += pairs;
            if let Stage::Dispatched { since } = placement.stage
                && oldest.is_none_or(|(first, ..)| since < first)
            {
                oldest = Some((since, tokens, pairs));
            }
        }
        backlog.decodes = decoding.len() as f64;
        let tpot_ms = self.settings.profile.map(|profile| {
            let context: f64 = decoding
                .iter()
                .map(|(_, p)| f64::from(p.prompt.tokens))
                .sum();
            profile.iteration_ms(0.0, backlog.decodes, context, 0.0)
        });
        for (since, placement) in decoding {
            let most = match placement.max_tokens {
                0 => f64::INFINITY,
                most => f64::from(most),
            };
            let said = tpot_ms.map_or(0.0, |tpot| now.since(since).as_secs_f64() * 1e3 / tpot);
            backlog.context_tokens += f64::from(placement.prompt.tokens) + said.min(most);
        }
        if let (Some(profile), Some((since, tokens, pairs))) = (self.settings.profile, oldest) {
            let busy_ms = now.since(since.max(self.last_first_byte)).as_secs_f64() * 1e3;
            let rate = profile.drain_per_ms(backlog.decodes, backlog.context_tokens);
            let done = (busy_ms * rate).min(tokens);
            backlog.pending_tokens -= done;
            if tokens > 0.0 {
                backlog.pending_pairs -= pairs * done / tokens;
            }
        }
        backlog
    }

    /// How long a prompt that was just offered will take to prefill, by the model.
    pub(super) fn prefill_time(&self, offer: &Offer, cached_tokens: u32) -> Duration {
        let Some(profile) = self.settings.profile else {
            return Duration::ZERO;
        };
        let cached = f64::from(cached_tokens);
        let uncached = (f64::from(offer.prompt.tokens) - cached).max(0.0);
        let ms = profile.ttft_ms(&self.backlog(), cached, uncached);
        Duration::try_from_secs_f64(ms / 1e3).unwrap_or_default()
    }
}

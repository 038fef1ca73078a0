//! What the work side was told of its engine, and what follows.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use forebay_proto::Now;
use forebay_scheduler::fingerprint::RenderProfile;

use super::found::{EngineFacts, Found};
use super::work::{Manner, Shared};
use crate::adapter::{Adapter, Gauges, NotStarted};
use crate::core::Tenants;

/// The `--tenant` that is everybody.
const ANYBODY: &str = "*";

impl Shared {
    /// How the engine is spoken to.
    pub(super) fn adapter(&self) -> Adapter {
        let inner = self.inner.lock();
        let said = inner.engine.as_ref().map(|engine| engine.adapter);
        said.unwrap_or_default()
    }

    /// How prompts are rendered, as it is declared.
    pub(super) fn render(&self) -> RenderProfile {
        let inner = self.inner.lock();
        let found = inner.engine.as_ref().and_then(|engine| engine.render);
        self.manner.render.or(found).unwrap_or_default()
    }

    /// The engine said who it is; it may be another one than before.
    pub(super) fn engine_found(&self, found: &Found) {
        let adapter = found.engine.adapter;
        let tenants = match self.manner.tenant.as_deref() {
            Some(ANYBODY) => Tenants::All,
            Some(tenant) => Tenants::Only(tenant.to_owned()),
            None if adapter.shares_its_cache() => Tenants::First(None),
            None => Tenants::All,
        };
        let news = self.enter(|inner, _| {
            let mut said = found.engine.clone();
            // A page that was late is no other template.
            let before = inner.engine.as_ref();
            let before = before.filter(|before| before.kind == said.kind);
            said.render = said.render.or(before.and_then(|before| before.render));
            let news = inner.engine.as_deref() != Some(&said);
            if news {
                inner.engine = Some(Arc::new(said));
            }
            inner.core.engine_kind(tenants, adapter.first_grade());
            if let Some(tokens) = found.engine.kv_tokens.filter(|_| self.manner.asks_size) {
                inner.core.engine_holds(tokens);
            }
            if let Some(slots) = found.engine.slots.filter(|_| self.manner.asks_slots) {
                inner.core.engine_runs(slots);
            }
            news
        });
        self.counts.store(found.counts, Ordering::Relaxed);
        if news {
            let slots = self.with(|core, _| core.slots());
            tell_of(found, &self.manner, slots);
        }
        self.engine_is(found.process.clone());
        self.engine_up(&found.models);
    }

    /// The engine's metrics page was read.
    pub(super) fn engine_shows(&self, gauges: &Gauges) {
        self.metrics.engine(gauges);
    }

    /// The engine answered that it did not begin.
    pub(super) fn engine_refused(&self, why: NotStarted) {
        self.metrics.engine_refused(why);
        match why {
            NotStarted::Overloaded => {}
            NotStarted::Stopping => {
                self.doubted.store(true, Ordering::Relaxed);
                self.engine_down(why.detail());
            }
        }
    }

    /// The engine said something.
    pub(super) fn heard(&self) {
        let since = self.origin.elapsed().as_micros();
        let since = u64::try_from(since).unwrap_or(u64::MAX);
        self.heard.store(since, Ordering::Relaxed);
    }

    /// Whether it counts its work; one that does not is only heard of by answers that come in pieces.
    pub(super) fn counts(&self) -> bool {
        self.counts.load(Ordering::Relaxed)
    }

    /// When it last did.
    pub(super) fn last_heard(&self) -> Option<Now> {
        let heard = self.heard.load(Ordering::Relaxed);
        (heard > 0).then(|| Now::at(Duration::from_micros(heard)))
    }

    /// The engine has requests and makes nothing of them: they are over, and it has to do some work before it
    /// is believed in again.
    pub(super) fn engine_stalled(&self) {
        self.doubted.store(true, Ordering::Relaxed);
        self.engine_down("it has requests and makes no progress");
        self.stalls.send_modify(|stalls| *stalls += 1);
        if let Some(process) = self.engine.process() {
            process.hangs();
        }
    }

    /// Returns when the engine is found to hang.
    pub(super) async fn stalling(&self) {
        let mut stalls = self.stalls.subscribe();
        // The sender lives as long as this.
        let _ = stalls.changed().await;
    }

    /// Whether the engine has to do some work before it is believed in.
    pub(super) fn is_doubted(&self) -> bool {
        self.doubted.load(Ordering::Relaxed)
    }

    /// The engine did some.
    pub(super) fn trusts(&self) {
        self.doubted.store(false, Ordering::Relaxed);
    }
}

/// What an operator should know of an engine that was found.
fn tell_of(found: &Found, manner: &Manner, slots: u32) {
    let EngineFacts {
        kind,
        kv_tokens,
        max_context_tokens,
        adapter,
        slots: engine_slots,
        render,
    } = &found.engine;
    tracing::info!(
        kind,
        kv_tokens,
        block_tokens = found.block_tokens,
        max_context_tokens,
        render = render.map(|render| render.id()),
        "the engine says what it is"
    );
    if let (Some(said), Some(found)) = (manner.render, render)
        && said != *found
    {
        tracing::warn!(
            said = said.id(),
            found = found.id(),
            "the engine renders prompts otherwise than --label render-profile says: without that label, what is found counts"
        );
    }
    if found.prefix_caching == Some(false) {
        tracing::warn!(
            "the engine caches no prefixes: start vLLM with --enable-prefix-caching, or nothing is gained by placing alike prompts together"
        );
    }
    if let Some(engine) = engine_slots.filter(|engine| *engine < slots) {
        tracing::warn!(
            slots,
            engine,
            "the engine runs fewer requests at once than --slots says: the others wait in its queue, where they have no order"
        );
    }
    if adapter.shares_its_cache() {
        tracing::info!(
            "the engine keeps no caches apart: it serves one tenant (--tenant), else the first that asks"
        );
    }
}

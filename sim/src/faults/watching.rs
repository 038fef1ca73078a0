//! Watches between nodes and those who follow the facts.

use forebay_control_client::core::watch::{Step, Watch};
use forebay_proto::NodeId;
use forebay_proto::wire::control;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::check::{Held, Violation};
use super::clients::Asker;
use super::host::Clock;
use super::net::Place;
use super::party::Party;
use super::world::{Event, World};

/// Every so often somebody looks at each watch.
const WATCH_EVERY_US: u64 = 100_000;

/// One who follows the facts.
pub(super) struct Watcher {
    watch: Watch,
    /// Number of its newest dial, of all in the world: frames of others are passed over.
    dial: u64,
    pub(super) clock: Clock,
}

impl Watcher {
    pub(super) const fn new(watch: Watch, clock: Clock) -> Self {
        Self {
            watch,
            dial: 0,
            clock,
        }
    }

    /// Its process starts again, with what its disk kept.
    pub(super) fn restart(&mut self, watch: Watch) {
        self.watch = watch;
        self.dial = 0;
    }
}

impl World {
    /// Its process starts again: it follows the facts from what its disk kept.
    pub(super) fn follows_again(&mut self, party: Party) {
        let rng = StdRng::seed_from_u64(self.rng.random());
        let kept = self.askers.get_mut(&party).and_then(Asker::as_agent);
        let kept = kept.and_then(|agent| agent.kept.clone());
        if kept.is_none() {
            self.checks.watchers.forgot(party);
        }
        if let Some(watcher) = self.watchers.get_mut(&party) {
            watcher.restart(Watch::new(kept, rng));
        }
    }

    pub(super) fn watch(&mut self, number: Party) {
        if !self.watchers.contains_key(&number) {
            return;
        }
        self.at(self.now_us + WATCH_EVERY_US, Event::Watch(number));
        let addresses: Vec<String> = self.nodes().iter().map(|id| id.0.to_string()).collect();
        let ages: Vec<(String, std::time::Duration)> = self
            .hosts
            .values()
            .filter_map(|host| {
                let heard = host.status()?.leader_heard_ms;
                let heard = std::time::Duration::from_millis(heard);
                Some((host.id.0.to_string(), heard))
            })
            .collect();
        let Some(watcher) = self.watchers.get_mut(&number) else {
            return;
        };
        let now = watcher.clock.at(self.now_us);
        match watcher.watch.next(now, &addresses) {
            Step::Dial { address, from } => {
                self.dials += 1;
                let dial = self.dials;
                watcher.dial = dial;
                let Ok(to) = address.parse().map(NodeId) else {
                    return;
                };
                let places = (Place::Outside, Place::Node(to));
                let arrives = self
                    .network
                    .send(&mut self.rng, &self.params, self.now_us, places);
                if let Some(at) = arrives.first() {
                    self.at(
                        *at,
                        Event::Dialled {
                            watcher: number,
                            number: dial,
                            to,
                            from,
                        },
                    );
                }
            }
            Step::Scout => {
                watcher.watch.scouted(now, &ages);
            }
            Step::Leave | Step::Wait(_) => {}
        }
    }

    pub(super) fn dialled(
        &mut self,
        watcher: Party,
        number: u64,
        to: NodeId,
        from: &control::Watch,
    ) {
        let Some(host) = self.hosts.get_mut(&to) else {
            return;
        };
        let now = host.clock.at(self.now_us);
        if let Some(process) = &mut host.process
            && process.has_state()
        {
            process.watch(watcher, number, from, now);
            self.feed(to, self.now_us);
        }
    }

    /// Sends watchers what is new on this node.
    pub(super) fn feed(&mut self, node: NodeId, leaves: u64) {
        let Some(host) = self.hosts.get_mut(&node) else {
            return;
        };
        if host.paused_until > self.now_us {
            return;
        }
        let now = host.clock.at(self.now_us);
        let Some(process) = &mut host.process else {
            return;
        };
        let watchers: Vec<Party> = process.streams.keys().copied().collect();
        let places = (Place::Node(node), Place::Outside);
        let mut events = Vec::new();
        for watcher in watchers {
            for frame in process.frames(watcher, now) {
                let arrives = self
                    .network
                    .send(&mut self.rng, &self.params, leaves, places);
                let Some(stream) = process.streams.get_mut(&watcher) else {
                    break;
                };
                let Some(at) = arrives.first() else {
                    // A stream has no holes: it ends.
                    process.streams.remove(&watcher);
                    break;
                };
                stream.arrives = (*at).max(stream.arrives + 1);
                events.push((
                    stream.arrives,
                    Event::Frame {
                        watcher,
                        number: stream.number,
                        frame: Box::new(frame),
                    },
                ));
            }
        }
        for (at, event) in events {
            self.at(at, event);
        }
    }

    pub(super) fn frame(&mut self, number: Party, dial: u64, frame: control::WatchFrame) -> Held {
        let Some(watcher) = self.watchers.get_mut(&number) else {
            return Ok(());
        };
        if watcher.dial != dial {
            return Ok(());
        }
        let now = watcher.clock.at(self.now_us);
        match watcher.watch.handle(now, frame) {
            Ok(Some(facts)) => {
                self.checks.watchers.holds(number, &facts)?;
                self.facts(number, now, &facts);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(problem) => Err(Violation::new(
                "watchers-hold-what-was-agreed",
                format!("{number:?}: {problem}"),
            )),
        }
    }
}

//! Random lives of a worker, with a model of its engine and without: nothing leaks, nothing exceeds its
//! bound, nothing is forgotten, and without targets order is kept.

use std::collections::VecDeque;

use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Now, Revision};
use forebay_scheduler::model::Backlog;
use proptest::prelude::*;

use super::tests::{FAST, SETTINGS, ms, offer, open_with};
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Place {
        deadline: u64,
        body: u64,
        tokens: u32,
        target: Option<u32>,
    },
    FirstByte(usize),
    End(usize, usize),
    Pass(u64),
    Desire(Desired),
    Engine(bool),
}

fn step() -> impl Strategy<Value = Step> {
    let desired = prop_oneof![
        8 => Just(Desired::Ready),
        1 => Just(Desired::Cordoned),
        1 => Just(Desired::Draining),
    ];
    prop_oneof![
        6 => (0..400u64, 1..600u64, 0..3_000u32, proptest::option::of(0..2_000u32)).prop_map(
            |(deadline, body, tokens, target)| Step::Place { deadline, body, tokens, target }
        ),
        2 => (0..4usize).prop_map(Step::FirstByte),
        4 => (0..4usize, 0..End::ALL.len()).prop_map(|(which, end)| Step::End(which, end)),
        3 => (0..100u64).prop_map(Step::Pass),
        1 => desired.prop_map(Step::Desire),
        1 => proptest::bool::weighted(0.8).prop_map(Step::Engine),
    ]
}

/// What a naive agent would know: who runs, who waits, and the body of each.
struct Model {
    settings: Settings,

    running: Vec<PlacementId>,
    queue: VecDeque<PlacementId>,
    revision: u64,
}

impl Model {
    fn all(&self) -> Vec<PlacementId> {
        self.running.iter().chain(&self.queue).copied().collect()
    }

    fn drain(&mut self, core: &mut Core) {
        while let Some(effect) = core.poll_effect() {
            match effect {
                Effect::Start(id) => {
                    if self.settings.profile.is_none() {
                        assert_eq!(self.queue.front(), Some(&id), "first come, first served");
                    }
                    assert!(self.queue.contains(&id), "once");
                    self.queue.retain(|queued| *queued != id);
                    self.running.push(id);
                }
                Effect::Over(id, _, _) => self.queue.retain(|queued| *queued != id),
            }
        }
    }

    fn step(&mut self, core: &mut Core, now: &mut Now, step: &Step) {
        let before = core.load();
        match *step {
            Step::Place {
                deadline,
                body,
                tokens,
                target,
            } => {
                let mut offer = offer();
                offer.deadline = ms(deadline);
                offer.body_bytes = body;
                offer.prompt.tokens = tokens;
                // Without a model nothing is promised here: order is by arrival.
                if let (Some(ms), Some(_)) = (target, self.settings.profile) {
                    offer.targets.ttft_ms = ms.into();
                    offer.targets.tpot_ms = 40.0;
                }
                if let Ok(admitted) = core.place(*now, &offer) {
                    assert!(admitted.report_seq > before.seq);
                    if admitted.starts {
                        self.running.push(admitted.id);
                    } else {
                        self.queue.push_back(admitted.id);
                    }
                }
            }
            Step::FirstByte(which) => {
                if let Some(id) = self.running.get(which) {
                    core.first_byte(*now, *id);
                }
            }
            Step::End(which, end) => {
                if let Some(id) = self.all().get(which).copied() {
                    let ending = core.end(*now, id, End::ALL[end]).unwrap();
                    assert!(ending.report_seq > before.seq);
                    self.running.retain(|running| *running != id);
                    self.queue.retain(|queued| *queued != id);
                }
            }
            Step::Pass(by) => {
                *now = *now + ms(by);
                core.expire(*now);
            }
            Step::Desire(desired) => {
                self.revision += 1;
                core.facts(*now, desired, Revision(self.revision));
            }
            Step::Engine(true) => core.engine_up(&["m".into()]),
            Step::Engine(false) => core.engine_down(*now),
        }
        self.drain(core);
        self.check(core, before);
    }

    fn check(&self, core: &Core, before: forebay_scheduler::Load) {
        let load = core.load();
        let Settings {
            slots, queue_limit, ..
        } = self.settings;
        assert!(load.running <= slots && load.running + load.queued <= slots + queue_limit);
        assert_eq!(load.running as usize, self.running.len());
        assert_eq!(load.queued as usize, self.queue.len());
        assert!(core.body_bytes() <= SETTINGS.body_budget_bytes);
        let shown = |load: &forebay_scheduler::Load| (load.running, load.queued, load.acceptance);
        if shown(&load) == shown(&before) {
            assert!(load.seq >= before.seq);
        } else {
            assert!(load.seq > before.seq, "a change is a new report");
        }
        if load.queued > 0 && self.settings.profile.is_none() {
            assert_eq!(load.running, slots, "nobody waits beside a free slot");
        }
        assert!(
            load.queued == 0 || load.running > 0,
            "nobody waits beside an idle engine"
        );
        let Backlog {
            pending_tokens,
            pending_pairs,
            decodes,
            context_tokens,
            ..
        } = load.backlog;
        let all = [pending_tokens, pending_pairs, decodes, context_tokens];
        assert!(
            all.iter().all(|n| n.is_finite() && *n >= 0.0),
            "{:?}",
            load.backlog
        );
    }
}

fn check(settings: Settings, steps: &[Step]) {
    let (mut core, mut now) = (open_with(settings), Now::default());
    let mut model = Model {
        settings,
        running: Vec::new(),
        queue: VecDeque::new(),
        revision: 0,
    };
    for step in steps {
        model.step(&mut core, &mut now, step);
    }
    while let Some(id) = model.all().first().copied() {
        core.end(now, id, End::Cancelled).unwrap();
        model.running.retain(|running| *running != id);
        model.queue.retain(|queued| *queued != id);
        model.drain(&mut core);
    }
    // The engine's last iteration still takes its time.
    core.expire(now + ms(10_000));
    let load = core.load();
    assert_eq!((load.running, load.queued), (0, 0));
    assert_eq!((core.in_flight(), core.body_bytes()), (0, 0));
    assert_eq!(load.backlog, Backlog::default());
}

proptest! {
    #[test]
    fn counters_keep_their_bounds_and_return_to_zero(
        steps in proptest::collection::vec(step(), 0..200),
    ) {
        check(SETTINGS, &steps);
        check(FAST, &steps);
        check(Settings { slots: 5, queue_limit: 5, kv_tokens: 4_000, ..FAST }, &steps);
    }
}

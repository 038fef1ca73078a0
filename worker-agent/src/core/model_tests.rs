//! Random lives of a worker: nothing leaks, nothing exceeds its bound, order is kept.

use std::collections::VecDeque;

use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Now, Revision};
use proptest::prelude::*;

use super::tests::{SETTINGS, ms, offer, open};
use super::*;

#[derive(Clone, Debug)]
enum Step {
    Place { deadline: u64, body: u64 },
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
        6 => (0..400u64, 1..600u64).prop_map(|(deadline, body)| Step::Place { deadline, body }),
        2 => (0..4usize).prop_map(Step::FirstByte),
        4 => (0..4usize, 0..End::ALL.len()).prop_map(|(which, end)| Step::End(which, end)),
        3 => (0..100u64).prop_map(Step::Pass),
        1 => desired.prop_map(Step::Desire),
        1 => proptest::bool::weighted(0.8).prop_map(Step::Engine),
    ]
}

/// What a naive agent would know: who runs, who waits, and the body of each.
#[derive(Default)]
struct Model {
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
                    assert_eq!(self.queue.pop_front(), Some(id), "first come, first served");
                    self.running.push(id);
                }
                Effect::Over(id, _, _) => self.queue.retain(|queued| *queued != id),
            }
        }
    }

    fn step(&mut self, core: &mut Core, now: &mut Now, step: &Step) {
        let before = core.load();
        match *step {
            Step::Place { deadline, body } => {
                let mut offer = offer();
                offer.deadline = ms(deadline);
                offer.body_bytes = body;
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
        assert!(load.running <= SETTINGS.slots && load.queued <= SETTINGS.queue_limit);
        assert_eq!(load.running as usize, self.running.len());
        assert_eq!(load.queued as usize, self.queue.len());
        assert!(core.body_bytes() <= SETTINGS.body_budget_bytes);
        let shown = |load: &forebay_scheduler::Load| (load.running, load.queued, load.acceptance);
        if shown(&load) == shown(&before) {
            assert!(load.seq >= before.seq);
        } else {
            assert!(load.seq > before.seq, "a change is a new report");
        }
        if load.queued > 0 {
            assert_eq!(
                load.running, SETTINGS.slots,
                "nobody waits beside a free slot"
            );
        }
    }
}

proptest! {
    #[test]
    fn counters_keep_their_bounds_and_return_to_zero(
        steps in proptest::collection::vec(step(), 0..200),
    ) {
        let (mut core, mut model, mut now) = (open(), Model::default(), Now::default());
        for step in steps {
            model.step(&mut core, &mut now, &step);
        }
        while let Some(id) = model.all().first().copied() {
            core.end(now, id, End::Cancelled).unwrap();
            model.running.retain(|running| *running != id);
            model.queue.retain(|queued| *queued != id);
            model.drain(&mut core);
        }
        let load = core.load();
        prop_assert_eq!((load.running, load.queued), (0, 0));
        prop_assert_eq!((core.in_flight(), core.body_bytes()), (0, 0));
    }
}

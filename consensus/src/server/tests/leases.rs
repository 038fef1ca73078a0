//! Renewals and what they leave in the facts, over real links, with a clock that runs fast.

use super::*;
use forebay_proto::fleet::WorkerSpec;
use wire::Observed;

/// The spec of a worker in the built-in pool.
pub(super) fn spec() -> bytes::Bytes {
    let spec = WorkerSpec {
        pool: "default".into(),
        advertise: "h:1".into(),
        engine: String::new(),
        models: vec!["m".into()],
        revision: String::new(),
        gpu_type: String::new(),
        gpu_count: 0,
        kv_tokens: 0,
        max_context_tokens: 0,
        adapters: vec![],
        zone: String::new(),
        labels: std::collections::BTreeMap::new(),
        slots: 1,
    };
    spec.to_wire()
}

pub(super) fn registration(name: &str, sequence: u64) -> Request {
    let action = Action::Register(wire::RegisterWorker {
        name: name.into(),
        spec: spec(),
        held: None,
        start: 0,
        takeover: true,
    });
    let command = wire::Command {
        action: Some(action),
    };
    Request::Propose(control::Propose {
        client: forebay_proto::ClientId(fingerprint(name)).to_wire(),
        sequence,
        command: command.encode_to_vec().into(),
        reason: String::new(),
        deadline_ms: 5_000,
    })
}

/// Sixteen bytes that differ by name.
fn fingerprint(name: &str) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (to, from) in bytes.iter_mut().zip(name.bytes().rev()) {
        *to = from;
    }
    bytes
}

pub(super) fn renewal(
    incarnation: forebay_proto::wire::Incarnation,
    observed: Observed,
    applied: u64,
) -> Request {
    Request::Renew(control::Renew {
        incarnation: Some(incarnation),
        applied_revision: applied,
        observed: observed.into(),
        feature_level: 1,
        work: None,
        heat: None,
    })
}

/// Asks on a link that exists.
pub(super) async fn ask_on(link: &Link, request: Request) -> Response {
    let (mut send, mut recv) = link.open().unwrap();
    let request = control::Request {
        request: Some(request),
    };
    let frame = Frame::message(Kind::Request, &request);
    send.send(&frame).await.unwrap();
    send.finish();
    let frame = recv.recv().await.unwrap().unwrap();
    frame
        .decode::<control::Response>()
        .unwrap()
        .response
        .unwrap()
}

pub(super) fn incarnation_in(response: &Response) -> forebay_proto::wire::Incarnation {
    match response {
        Response::Outcome(wire::Outcome {
            outcome: Some(wire::outcome::Outcome::Done(done)),
        }) => done.worker.as_ref().unwrap().incarnation.unwrap(),
        other => panic!("{other:?}"),
    }
}

impl Cell {
    pub(super) fn register(
        &self,
        link: &Link,
        name: &str,
        sequence: u64,
    ) -> forebay_proto::wire::Incarnation {
        let asked = ask_on(link, registration(name, sequence));
        incarnation_in(&self.runtime.block_on(asked))
    }

    fn worker(&mut self, node: usize, name: &str) -> wire::Worker {
        let facts = self.facts(node);
        let worker = facts.workers.into_iter().find(|worker| worker.name == name);
        worker.unwrap()
    }
}

fn is_renewed(response: &Response) -> bool {
    matches!(response, Response::Renewed(_))
}

#[test]
fn a_state_is_agreed_by_the_next_renewal_and_only_the_registered_start_may_say_it() {
    let mut cell = Cell::initialised(3);
    let leader = cell.leader();
    let (_kept, link) = cell.link_of(leader, Role::Agent, "w1");
    let old = cell.register(&link, "w1", 1);
    let new = cell.register(&link, "w1", 2);
    assert_ne!(old, new);
    let asked = ask_on(&link, renewal(old, Observed::Cordoned, 0));
    let refused = cell.runtime.block_on(asked);
    assert!(
        matches!(&refused, Response::Failure(f) if matches!(f.failure, Some(Failure::Superseded(_)))),
        "{refused:?}"
    );
    for state in [Observed::Ready, Observed::Cordoned, Observed::Ready] {
        let asked = ask_on(&link, renewal(new, state, 0));
        let taken = cell.runtime.block_on(asked);
        assert!(is_renewed(&taken), "{taken:?}");
        cell.within(PATIENCE, |cell| {
            (cell.worker(leader, "w1").observed == i32::from(state)).then_some(())
        });
    }
    let settled = cell.facts(leader).revision;
    for _ in 0..20 {
        let asked = ask_on(&link, renewal(new, Observed::Unspecified, 0));
        assert!(is_renewed(&cell.runtime.block_on(asked)));
    }
    assert_eq!(cell.facts(leader).revision, settled, "nothing new was said");
    let last = cell.status(leader).last_index;
    std::thread::sleep(Duration::from_millis(200));
    assert!(cell.status(leader).last_index <= last, "nor proposed");
}

#[test]
fn a_burst_of_renewals_puts_few_entries_into_the_log_and_the_last_word_holds() {
    let mut cell = Cell::initialised(1);
    let leader = cell.leader();
    let (_kept, link) = cell.link_of(leader, Role::Agent, "w1");
    let worker = cell.register(&link, "w1", 1);
    let before = cell.status(leader).last_index;
    // All of them arrive while the first proposal waits for the disk, or soon after.
    cell.runtime.block_on(async {
        let mut asked = tokio::task::JoinSet::new();
        for _ in 0..100 {
            let link = link.clone();
            asked.spawn(async move { ask_on(&link, renewal(worker, Observed::Ready, 9)).await });
        }
        while let Some(taken) = asked.join_next().await {
            assert!(is_renewed(&taken.unwrap()));
        }
    });
    cell.within(PATIENCE, |cell| {
        let observed = cell.worker(leader, "w1").observed;
        (observed == i32::from(Observed::Ready)).then_some(())
    });
    let entries = cell.status(leader).last_index - before;
    assert!((1..=10).contains(&entries), "{entries} entries");
}

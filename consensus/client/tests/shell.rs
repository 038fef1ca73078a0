//! The shell against small control nodes over the real link on loopback.

#![allow(clippy::unwrap_used, clippy::panic)] // a test's helpers fail as its assertions do
#![allow(clippy::disallowed_methods)] // real sockets in real time

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use forebay_control_client::{ClientError, ControlClient, InitError, RenewState};
use forebay_link::{
    Alpn, Authority, CredentialPaths, Credentials, Endpoint, FrameReceiver, FrameSender,
};
use forebay_proto::config::Config;
use forebay_proto::fleet::Member;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::control::failure::Failure;
use forebay_proto::wire::control::request::Request as Ask;
use forebay_proto::wire::control::response::Response;
use forebay_proto::wire::control::watch_frame::Frame as WatchFrame;
use forebay_proto::wire::fleet::command::Action;
use forebay_proto::wire::fleet::outcome::Outcome;
use forebay_proto::wire::{control, fleet};
use forebay_proto::{ClientId, ClusterId, Incarnation, Level, Revision, Role, StoreId, WorkerId};
use tokio::sync::{mpsc, watch};

const CLUSTER: ClusterId = ClusterId([1; 16]);
const DEADLINE: Duration = Duration::from_secs(5);

struct World {
    directory: tempfile::TempDir,
    authority: Authority,
}

/// A control node: every question that arrives, with the stream to answer on.
struct Node {
    address: String,
    asked: mpsc::UnboundedReceiver<Asked>,
}

struct Asked {
    question: Ask,
    sender: FrameSender,
    receiver: FrameReceiver,
}

impl Asked {
    async fn say(&mut self, response: Response) {
        let response = control::Response {
            response: Some(response),
        };
        let frame = Frame::message(Kind::Response, &response);
        self.sender.send(&frame).await.unwrap();
    }

    async fn answer(mut self, response: Response) {
        self.say(response).await;
        self.sender.finish();
        self.sender.stopped().await;
    }
}

impl Node {
    async fn next(&mut self) -> Asked {
        let asked = tokio::time::timeout(DEADLINE, self.asked.recv()).await;
        asked.expect("a question in time").unwrap()
    }

    /// Answers every question from now on.
    fn answers(mut self, answer: impl Fn(Ask) -> Response + Send + 'static) -> String {
        let address = self.address.clone();
        tokio::spawn(async move {
            while let Some(asked) = self.asked.recv().await {
                let response = answer(asked.question.clone());
                tokio::spawn(asked.answer(response));
            }
        });
        address
    }
}

impl World {
    fn new() -> Self {
        Self {
            directory: tempfile::tempdir().unwrap(),
            authority: Authority::create("test", 1).unwrap(),
        }
    }

    fn credentials(&self, role: Role, name: &str) -> Credentials {
        // A directory each: keys are never written over.
        let own = tempfile::tempdir_in(self.directory.path()).unwrap();
        self.authority.save(own.path()).unwrap();
        let issued = self.authority.issue(role, name, 30).unwrap();
        let (cert, key) = issued.save(own.path()).unwrap();
        let ca = own.path().join("ca.pem");
        Credentials::load(&CredentialPaths { ca, cert, key }).unwrap()
    }

    fn node(&self, name: &str) -> Node {
        let credentials = self.credentials(Role::Control, name);
        let local = ([127, 0, 0, 1], 0).into();
        let endpoint = Endpoint::bind(local, &credentials, &[Alpn::Control]).unwrap();
        let address = endpoint.local_addr().unwrap().to_string();
        let (asked, questions) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(link) = endpoint.accept().await {
                let asked = asked.clone();
                tokio::spawn(async move {
                    while let Ok((sender, mut receiver)) = link.accept().await {
                        let frame = receiver.recv().await.unwrap().unwrap();
                        let request: control::Request = frame.decode().unwrap();
                        let _ = asked.send(Asked {
                            question: request.request.unwrap(),
                            sender,
                            receiver,
                        });
                    }
                });
            }
        });
        Node {
            address,
            asked: questions,
        }
    }

    fn client(&self, control: &[&str]) -> ControlClient {
        let credentials = self.credentials(Role::Operator(Level::Admin), "alice");
        let endpoint = Endpoint::client(&credentials).unwrap();
        let control = control.iter().map(|address| (*address).to_owned());
        ControlClient::new(endpoint, control.collect(), ClientId([7; 16]), 1)
    }
}

fn failure(failure: Failure) -> Response {
    Response::Failure(control::Failure {
        failure: Some(failure),
    })
}

fn not_leader(leader: &str) -> Response {
    failure(Failure::NotLeader(control::NotLeader {
        leader: u64::from(!leader.is_empty()),
        leader_address: leader.into(),
    }))
}

fn done(revision: u64) -> Response {
    Response::Outcome(fleet::Outcome {
        outcome: Some(Outcome::Done(fleet::Done {
            revision,
            ..Default::default()
        })),
    })
}

fn remove() -> Action {
    Action::Remove(fleet::RemoveWorker {
        name: "w1".into(),
        override_guard: false,
    })
}

fn sequence(question: &Ask) -> u64 {
    match question {
        Ask::Propose(propose) => propose.sequence,
        other => panic!("{other:?}"),
    }
}

fn facts(cluster: ClusterId, revision: u64) -> fleet::Facts {
    fleet::Facts {
        cluster_id: cluster.to_wire(),
        revision,
        config: Config::default().to_wire(),
        ..Default::default()
    }
}

fn watched(frame: WatchFrame) -> Response {
    Response::Watch(control::WatchFrame { frame: Some(frame) })
}

fn delta(revision: u64) -> Response {
    watched(WatchFrame::Delta(fleet::Delta {
        revision,
        ..Default::default()
    }))
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future)
        .await
        .expect("in time")
}

#[tokio::test]
async fn a_command_finds_the_leader_and_the_next_goes_straight_to_it() {
    let world = World::new();
    let (leader, mut follower) = (world.node("c1"), world.node("c2"));
    let client = world.client(&[&follower.address]);
    let leader = leader.answers(|question| done(sequence(&question)));
    let first = client.propose(remove(), "", DEADLINE);
    let redirect = async { follower.next().await.answer(not_leader(&leader)).await };
    let (first, ()) = tokio::join!(first, redirect);
    assert_eq!(first.unwrap().revision, Revision(1));
    let second = client.propose(remove(), "", DEADLINE).await.unwrap();
    assert_eq!(second.revision, Revision(2));
    assert!(follower.asked.try_recv().is_err());
}

#[tokio::test]
async fn a_silent_node_is_hedged_with_the_same_command() {
    let world = World::new();
    let (mut one, mut other) = (world.node("c1"), world.node("c2"));
    let client = world.client(&[&one.address, &other.address]);
    let began = Instant::now();
    let answer = async {
        let (silent, mut hedge) = tokio::select! {
            asked = one.next() => (asked, other),
            asked = other.next() => (asked, one),
        };
        let asked = hedge.next().await;
        assert_eq!(sequence(&silent.question), sequence(&asked.question));
        asked.answer(done(9)).await;
        silent
    };
    let (done, _silent) = tokio::join!(client.propose(remove(), "", DEADLINE), answer);
    assert_eq!(done.unwrap().revision, Revision(9));
    assert!(began.elapsed() >= Duration::from_millis(150));
}

#[tokio::test]
async fn a_refusal_and_a_denial_are_final() {
    let world = World::new();
    let refused = Refusal::UnknownWorker { name: "w1".into() };
    let wire = refused.to_wire();
    let address = world.node("c1").answers(move |question| match question {
        Ask::Propose(_) => Response::Outcome(fleet::Outcome {
            outcome: Some(Outcome::Refusal(wire.clone())),
        }),
        _ => failure(Failure::Unauthorized(control::Unauthorized {
            rpc: "Read".into(),
            identity: "operator/admin/alice".into(),
        })),
    });
    let client = world.client(&[&address]);
    let error = client.propose(remove(), "", DEADLINE).await.unwrap_err();
    assert_eq!(error, ClientError::Refused(refused));
    let error = client.read(DEADLINE).await.unwrap_err();
    assert!(matches!(error, ClientError::Unauthorized { .. }));
}

#[tokio::test]
async fn without_a_control_plane_the_error_says_so_at_the_deadline() {
    let world = World::new();
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let nobody = taken.local_addr().unwrap().to_string();
    let client = world.client(&[&nobody]);
    let began = Instant::now();
    let deadline = Duration::from_millis(400);
    let error = client.propose(remove(), "", deadline).await.unwrap_err();
    assert!(matches!(error, ClientError::NoQuorum { .. }), "{error}");
    assert!(began.elapsed() < Duration::from_secs(2));
    let probed = client.probe_all(deadline).await;
    assert!(probed[0].1.is_err());
}

#[tokio::test]
async fn the_facts_move_to_the_next_node_and_outlive_the_process() {
    let world = World::new();
    let (mut first, mut second) = (world.node("c1"), world.node("c2"));
    let data = tempfile::tempdir().unwrap();
    let client = world.client(&[&first.address, &second.address]);
    let mut watching = client.spawn_watch(Some(data.path()));

    let (mut node, mut other) = tokio::select! {
        asked = first.next() => (asked, second),
        asked = second.next() => (asked, first),
    };
    let Ask::Watch(from) = &node.question else {
        panic!("no watch")
    };
    assert_eq!(from.revision, 0);
    node.say(watched(WatchFrame::Snapshot(facts(CLUSTER, 5))))
        .await;
    assert_eq!(within(watching.first()).await.revision, Revision(5));
    node.say(delta(6)).await;
    for revision in [5_u64, 6] {
        let frame = within(node.receiver.recv()).await.unwrap().unwrap();
        assert_eq!(frame.kind, Kind::Applied);
        assert_eq!(frame.payload[..], revision.to_be_bytes());
    }

    // Silent from here on: the watch continues elsewhere, from what is held.
    let mut asked = other.next().await;
    let Ask::Watch(from) = &asked.question else {
        panic!("no watch")
    };
    assert_eq!((from.revision, &from.cluster_id), (6, &CLUSTER.to_wire()));
    asked.say(delta(7)).await;
    let newest = watching.facts.wait_for(|facts| {
        let facts = facts.as_ref();
        facts.is_some_and(|facts| facts.revision == Revision(7))
    });
    within(newest).await.unwrap();

    // A later process without a control plane begins with them.
    let file = forebay_control_client::FactsFile::new(data.path());
    let saved = async {
        while file.load().unwrap().map(|facts| facts.revision) != Some(Revision(7)) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    within(saved).await;
    drop(watching);
    let mut later = world
        .client(&["127.0.0.1:1"])
        .spawn_watch(Some(data.path()));
    assert_eq!(within(later.first()).await.revision, Revision(7));
}

#[tokio::test]
async fn facts_of_another_cluster_are_refused_with_the_way_out() {
    let world = World::new();
    let mut node = world.node("c1");
    let data = tempfile::tempdir().unwrap();
    let held = forebay_control_client::Facts::from_wire(facts(CLUSTER, 5)).unwrap();
    forebay_control_client::FactsFile::new(data.path())
        .save(&held)
        .unwrap();
    let mut watching = world
        .client(&[&node.address])
        .spawn_watch(Some(data.path()));
    let mut asked = node.next().await;
    let other = facts(ClusterId([2; 16]), 9);
    asked.say(watched(WatchFrame::Snapshot(other))).await;
    let refused = watching.status.wait_for(|status| status.problem.is_some());
    let problem = within(refused).await.unwrap().problem.clone().unwrap();
    assert!(
        problem.to_string().contains("another data directory"),
        "{problem}"
    );
    assert_eq!(within(watching.first()).await.revision, Revision(5));
}

#[tokio::test]
async fn a_lease_is_renewed_at_once_when_there_is_news_and_never_after_a_takeover() {
    let world = World::new();
    let mut node = world.node("c1");
    let client = world.client(&[&node.address]);
    let incarnation = Incarnation {
        worker: WorkerId(1),
        grant: 2,
        start: 3,
    };
    let (state, said) = watch::channel(RenewState {
        incarnation: Some(incarnation),
        applied_revision: Revision(1),
        observed: fleet::Observed::Joining,
        work: None,
        heat: None,
    });
    let mut renewing = client.spawn_renew(said);
    let renewed = Response::Renewed(control::Renewed {
        ttl_ms: 10_000,
        revision: 1,
        ..Default::default()
    });
    node.next().await.answer(renewed).await;
    let began = Instant::now();
    state.send_modify(|state| state.observed = fleet::Observed::Ready);
    let asked = node.next().await;
    assert!(began.elapsed() < Duration::from_millis(500));
    let Ask::Renew(renew) = &asked.question else {
        panic!("no renewal")
    };
    assert_eq!(renew.observed(), fleet::Observed::Ready);
    let superseded = failure(Failure::Superseded(control::Superseded {
        current: Some(incarnation.to_wire()),
    }));
    asked.answer(superseded).await;
    let over = renewing.status.wait_for(|status| status.problem.is_some());
    let problem = within(over).await.unwrap().problem.clone();
    assert!(matches!(problem, Some(ClientError::Superseded { .. })));
    assert!(within(renewing.status.changed()).await.is_err());
}

#[tokio::test]
async fn heat_is_told_once_and_what_a_leader_wants_is_answered() {
    let world = World::new();
    let mut node = world.node("c1");
    let client = world.client(&[&node.address]);
    let heat = |arrivals| {
        let heat = control::Heat {
            arrivals,
            ..Default::default()
        };
        Some(Arc::new(heat))
    };
    let (state, said) = watch::channel(RenewState {
        incarnation: None,
        applied_revision: Revision(1),
        observed: fleet::Observed::Ready,
        work: None,
        heat: heat(1),
    });
    let mut renewing = client.spawn_renew(said);
    let renewed = |wants_arrivals| {
        Response::Renewed(control::Renewed {
            ttl_ms: 10_000,
            revision: 1,
            wants_arrivals,
            window_ms: 60_000,
            most: 9,
        })
    };
    let mut told = Vec::new();
    for wants in [0, 0, 0, 7] {
        let asked = node.next().await;
        let Ask::Renew(renew) = &asked.question else {
            panic!("no renewal")
        };
        told.push(renew.heat.as_ref().map(|heat| heat.arrivals));
        // One that failed is told again.
        let answer = if told.len() == 1 {
            failure(Failure::Overloaded(control::Overloaded::default()))
        } else {
            renewed(wants)
        };
        asked.answer(answer).await;
        if told.len() == 3 {
            state.send_modify(|state| state.heat = heat(2));
        }
    }
    assert_eq!(told, [Some(1), Some(1), None, Some(2)]);
    let wanted = renewing.status.wait_for(|status| status.wanted.is_some());
    let wanted = within(wanted).await.unwrap().wanted.unwrap();
    assert_eq!(
        (wanted.number, wanted.window_ms, wanted.most),
        (7, 60_000, 9)
    );
    drop(renewing);
    let arrivals = control::Arrivals {
        wanted: 7,
        ..Default::default()
    };
    let telling =
        tokio::spawn(async move { client.tell_arrivals(arrivals, Duration::from_secs(5)).await });
    let asked = loop {
        let asked = node.next().await;
        if matches!(&asked.question, Ask::Arrivals(_)) {
            break asked;
        }
    };
    let Ask::Arrivals(arrivals) = &asked.question else {
        panic!("no arrivals")
    };
    assert_eq!(arrivals.wanted, 7);
    asked
        .answer(Response::ArrivalsTaken(control::ArrivalsTaken {}))
        .await;
    assert!(within(telling).await.unwrap().is_ok());
}

#[tokio::test]
async fn a_cluster_is_founded_on_every_node_or_not_begun() {
    let world = World::new();
    let node = |number: u8| {
        let status = control::NodeStatus {
            name: format!("c{number}"),
            store_id: StoreId([number; 16]).to_wire(),
            ..Default::default()
        };
        world
            .node(&format!("c{number}"))
            .answers(move |question| match question {
                Ask::Bootstrap(bootstrap) => Response::Bootstrapped(control::Bootstrapped {
                    cluster_id: bootstrap.cluster_id,
                    node_id: number.into(),
                }),
                _ => Response::Status(status.clone()),
            })
    };
    let nodes = [node(1), node(2), node(3)];
    let client = world.client(&nodes.each_ref().map(String::as_str));
    let founded = client.init(CLUSTER, DEADLINE).await.unwrap();
    assert_eq!(founded.cluster_id, CLUSTER);
    let names: Vec<_> = founded.members.iter().map(|m: &Member| &*m.name).collect();
    assert_eq!(names, ["c1", "c2", "c3"]);

    let client = world.client(&[&nodes[0], &nodes[1], "127.0.0.1:1"]);
    let error = client
        .init(CLUSTER, Duration::from_millis(500))
        .await
        .unwrap_err();
    assert!(matches!(error, InitError::Unreachable { .. }), "{error}");
}

//! Following the facts: the core's steps carried out, the disk kept up to date.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use forebay_link::{FrameReceiver, FrameSender};
use forebay_proto::Revision;
use forebay_proto::frame::{Frame, Kind};
use forebay_proto::wire::control as wire;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::client::ControlClient;
use super::facts_file::FactsFile;
use super::links;
use crate::core::error::{Answer, NodeError, classify};
use crate::core::facts::Facts;
use crate::core::watch::{SILENCE, Step, Watch, WatchProblem};

/// A look at the other nodes takes no longer.
const SCOUT_PATIENCE: Duration = Duration::from_millis(500);

/// After a failure to write the facts to disk.
const SAVE_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// How watching goes.
#[derive(Clone, Debug, Default)]
pub struct WatchStatus {
    /// The node that is watched.
    pub node: Option<String>,
    /// The facts were those of the leader at this moment.
    pub fresh_at: Option<Instant>,
    /// Why the node before was left; `None` once another one serves.
    pub problem: Option<WatchProblem>,
}

/// The facts, followed until this is dropped.
#[derive(Debug)]
pub struct Watching {
    /// The newest facts; `None` until the first came, from the disk or from a node.
    pub facts: watch::Receiver<Option<Arc<Facts>>>,
    /// How it goes.
    pub status: watch::Receiver<WatchStatus>,
    _tasks: [AbortOnDrop; 2],
}

impl Watching {
    /// The facts, once there are any.
    pub async fn first(&mut self) -> Arc<Facts> {
        loop {
            if let Some(facts) = self.facts.borrow_and_update().clone() {
                return facts;
            }
            if self.facts.changed().await.is_err() {
                // The task ends only with this value.
                std::future::pending::<()>().await;
            }
        }
    }
}

/// A task that ends with its owner.
#[derive(Debug)]
pub(crate) struct AbortOnDrop(pub(crate) JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl ControlClient {
    /// Follows the facts from now on, beginning with those in `directory` if one is given and it
    /// has some. They are kept there. Each revision is acknowledged to the node when it is
    /// published.
    #[must_use]
    pub fn spawn_watch(&self, directory: Option<&Path>) -> Watching {
        let file = directory.map(FactsFile::new);
        let held = file.as_ref().and_then(|file| match file.load() {
            Ok(facts) => facts.map(Arc::new),
            Err(error) => {
                tracing::warn!(%error, "the facts on disk are not used");
                None
            }
        });
        if let Some(facts) = &held {
            self.learn(facts);
        }
        let (publish, facts) = watch::channel(held.clone());
        let (report, status) = watch::channel(WatchStatus::default());
        let follower = Follower {
            core: Watch::new(held, self.child_rng()),
            client: self.clone(),
            publish,
            report,
            stream: None,
            scout: None,
        };
        let save = tokio::spawn(keep(file, facts.clone()));
        Watching {
            facts,
            status,
            _tasks: [AbortOnDrop(tokio::spawn(follower.run())), AbortOnDrop(save)],
        }
    }
}

struct Follower {
    client: ControlClient,
    core: Watch,
    publish: watch::Sender<Option<Arc<Facts>>>,
    report: watch::Sender<WatchStatus>,
    stream: Option<(FrameSender, FrameReceiver)>,
    scout: Option<JoinHandle<Vec<(String, Duration)>>>,
}

/// What woke the follower.
enum Woke {
    Frame(Result<Frame, String>),
    Scouted(Vec<(String, Duration)>),
    Time,
}

impl Follower {
    async fn run(mut self) {
        loop {
            let addresses = self.client.addresses();
            match self.core.next(self.client.now(), &addresses) {
                Step::Dial { address, from } => self.dial(address, from).await,
                Step::Leave => {
                    let node = self.report.borrow().node.clone();
                    self.left(node.map(|address| WatchProblem::Silent { address }));
                }
                Step::Scout => self.scout = Some(scout(self.client.clone(), addresses)),
                Step::Wait(until) => {
                    let until = self.client.instant(until);
                    match self.wait(until).await {
                        Woke::Frame(frame) => self.take(frame).await,
                        Woke::Scouted(found) => {
                            if self.core.scouted(self.client.now(), &found) {
                                self.left(None);
                            }
                        }
                        Woke::Time => {}
                    }
                }
            }
        }
    }

    async fn wait(&mut self, until: Instant) -> Woke {
        let Self { stream, scout, .. } = self;
        let frame = async {
            match stream {
                Some((_, receiver)) => receiver.recv().await,
                None => std::future::pending().await,
            }
        };
        let scouted = async {
            match scout {
                Some(task) => task.await.unwrap_or_default(),
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            frame = frame => Woke::Frame(match frame {
                Ok(Some(frame)) => Ok(frame),
                Ok(None) => Err("it ended the watch".into()),
                Err(error) => Err(error.to_string()),
            }),
            found = scouted => {
                self.scout = None;
                Woke::Scouted(found)
            }
            () = tokio::time::sleep_until(until) => Woke::Time,
        }
    }

    async fn dial(&mut self, address: String, from: wire::Watch) {
        self.stream = None;
        let opened = tokio::time::timeout(SILENCE, self.open(&address, from)).await;
        let opened = opened.unwrap_or_else(|_| {
            self.client.links().forget(&address);
            Err(WatchProblem::Silent {
                address: address.clone(),
            })
        });
        match opened {
            Ok(stream) => {
                self.stream = Some(stream);
                self.report
                    .send_modify(|status| status.node = Some(address));
            }
            Err(problem) => {
                self.core.failed(self.client.now());
                self.left(Some(problem));
            }
        }
    }

    async fn open(
        &self,
        address: &str,
        from: wire::Watch,
    ) -> Result<(FrameSender, FrameReceiver), WatchProblem> {
        let unavailable = |problem: String| WatchProblem::Unavailable {
            address: address.into(),
            problem,
        };
        let (links, name) = (self.client.links(), self.client.name_of(address));
        let question = wire::Request {
            request: Some(wire::request::Request::Watch(from)),
        };
        links
            .open(address, name.as_deref(), &question)
            .await
            .map_err(|error| match error {
                NodeError::WrongCluster { found, held } => WatchProblem::WrongCluster {
                    address: address.into(),
                    found,
                    held,
                },
                other => unavailable(other.to_string()),
            })
    }

    async fn take(&mut self, frame: Result<Frame, String>) {
        let address = self.core.watching().unwrap_or_default().to_owned();
        let unavailable = |problem: String| WatchProblem::Unavailable { address, problem };
        let read = frame.and_then(|frame| {
            let response = links::read(&frame).map_err(|error| error.to_string())?;
            match classify(response) {
                Answer::Success(wire::response::Response::Watch(frame)) => Ok(frame),
                Answer::Success(_) => Err("an answer to another question".into()),
                Answer::TryOn(error) => Err(error.to_string()),
                Answer::Final(error) => Err(error.to_string()),
            }
        });
        let frame = match read {
            Ok(frame) => frame,
            Err(problem) => {
                self.core.failed(self.client.now());
                return self.left(Some(unavailable(problem)));
            }
        };
        match self.core.handle(self.client.now(), frame) {
            Ok(changed) => {
                if let Some(facts) = changed {
                    self.adopt(facts).await;
                }
                self.note_freshness();
            }
            Err(problem) => self.left(Some(problem)),
        }
    }

    async fn adopt(&mut self, facts: Arc<Facts>) {
        let revision = facts.revision;
        self.client.learn(&facts);
        self.publish.send_replace(Some(facts));
        if let Some((sender, _)) = &mut self.stream {
            let frame = applied(revision);
            let applied = sender.send(&frame);
            // A node that reads no acknowledgements is no node to follow.
            if !matches!(tokio::time::timeout(SILENCE, applied).await, Ok(Ok(()))) {
                self.core.failed(self.client.now());
                let node = self.report.borrow().node.clone();
                self.left(node.map(|address| WatchProblem::Silent { address }));
            }
        }
    }

    fn note_freshness(&self) {
        let age = self.core.age(self.client.now());
        let fresh_at = age.and_then(|age| Instant::now().checked_sub(age));
        self.report.send_modify(|status| {
            status.fresh_at = fresh_at.max(status.fresh_at);
            if self.stream.is_some() {
                status.problem = None;
            }
        });
    }

    fn left(&mut self, problem: Option<WatchProblem>) {
        self.stream = None;
        self.scout = None;
        self.report.send_modify(|status| {
            status.node = None;
            if let Some(problem) = problem {
                // Said once: the same problem comes back with every attempt.
                if status.problem.as_ref() != Some(&problem) {
                    tracing::info!(%problem, "the facts are followed elsewhere");
                }
                status.problem = Some(problem);
            }
        });
    }
}

/// What acknowledges a revision.
fn applied(revision: Revision) -> Frame {
    Frame::new(
        Kind::Applied,
        Bytes::copy_from_slice(&revision.0.to_be_bytes()),
    )
}

/// Asks every node how long ago it heard the leader.
fn scout(client: ControlClient, addresses: Vec<String>) -> JoinHandle<Vec<(String, Duration)>> {
    tokio::spawn(async move {
        let probed = client.probe(addresses, SCOUT_PATIENCE).await;
        let heard = probed.into_iter().filter_map(|(address, status)| {
            let status = status.ok()?;
            let knows_a_leader = status.initialised && status.leader != 0;
            knows_a_leader.then(|| (address, Duration::from_millis(status.leader_heard_ms)))
        });
        heard.collect()
    })
}

/// Keeps the newest facts on disk; those that are overtaken while one is written are skipped.
async fn keep(file: Option<FactsFile>, mut facts: watch::Receiver<Option<Arc<Facts>>>) {
    let Some(file) = file else { return };
    while facts.changed().await.is_ok() {
        let Some(newest) = facts.borrow_and_update().clone() else {
            continue;
        };
        let to = file.clone();
        let saved = tokio::task::spawn_blocking(move || to.save(&newest)).await;
        if let Ok(Err(error)) = saved {
            tracing::warn!(%error, "the facts are not on disk: a restart would begin with older ones");
            tokio::time::sleep(SAVE_AGAIN_AFTER).await;
            facts.mark_changed();
        }
    }
}

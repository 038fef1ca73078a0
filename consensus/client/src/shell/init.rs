//! Founding a cluster.

use std::time::Duration;

use forebay_proto::ClusterId;
use forebay_proto::fleet::Member;

use super::client::ControlClient;
use crate::core::error::NodeError;
use crate::core::init::{InitError, plan};

/// A cluster that was founded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Initialised {
    /// Which.
    pub cluster_id: ClusterId,
    /// Its first members.
    pub members: Vec<Member>,
}

impl ControlClient {
    /// Founds a cluster on exactly the nodes that this client was given, once.
    ///
    /// `drawn` is a random id. `deadline` is for each of the two steps: looking at every node, and
    /// giving each its place.
    ///
    /// # Errors
    ///
    /// Returns why not, and whether anything was changed.
    pub async fn init(
        &self,
        drawn: ClusterId,
        deadline: Duration,
    ) -> Result<Initialised, InitError> {
        let probed = self.probe(self.given(), deadline).await;
        let founding = plan(drawn, &probed)?;
        let (cluster_id, members) = (founding.cluster_id, founding.members);
        let level = founding.feature_level;
        for address in founding.missing {
            match self
                .bootstrap(&address, cluster_id, &members, level, deadline)
                .await
            {
                Ok(_) => {}
                // It took its place and the answer was lost.
                Err(NodeError::AlreadyInitialised {
                    cluster_id: Some(found),
                }) if found == cluster_id => {}
                Err(error) => {
                    return Err(InitError::Unfinished {
                        address,
                        cluster: cluster_id,
                        error,
                    });
                }
            }
        }
        Ok(Initialised {
            cluster_id,
            members,
        })
    }
}

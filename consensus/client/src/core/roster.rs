//! Whom to ask: the nodes given, those learnt from the facts, and who led lately.

use forebay_proto::fleet::Member;

/// Nodes kept; a control plane has five at most, and each may be known by two addresses.
pub const MAX_NODES: usize = 32;

/// The control nodes, as far as this process knows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Roster {
    given: Vec<String>,
    members: Vec<Member>,
    leader: Option<String>,
}

impl Roster {
    /// Begins with the addresses that the process was given.
    #[must_use]
    pub fn new(given: impl IntoIterator<Item = String>) -> Self {
        let mut roster = Self::default();
        for address in given.into_iter().take(MAX_NODES) {
            if !roster.given.contains(&address) {
                roster.given.push(address);
            }
        }
        roster
    }

    /// Takes the members that the facts name, in place of those it knew.
    pub fn learn(&mut self, members: &[Member]) {
        self.members = members.iter().take(MAX_NODES).cloned().collect();
    }

    /// Notes who leads.
    pub fn led_by(&mut self, address: &str) {
        self.leader = Some(address.into());
    }

    /// The addresses that the process was given.
    #[must_use]
    pub fn given(&self) -> &[String] {
        &self.given
    }

    /// Who led lately.
    #[must_use]
    pub fn leader(&self) -> Option<&str> {
        self.leader.as_deref()
    }

    /// The name that the facts give for this address.
    #[must_use]
    pub fn name_of(&self, address: &str) -> Option<&str> {
        let member = self
            .members
            .iter()
            .find(|member| member.address == address)?;
        Some(&member.name)
    }

    /// Every address, each once, those given first.
    #[must_use]
    pub fn addresses(&self) -> Vec<String> {
        let mut all = self.given.clone();
        let learnt = self.members.iter().map(|member| &member.address);
        for address in learnt.chain(&self.leader) {
            if !all.contains(address) && all.len() < MAX_NODES {
                all.push(address.clone());
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use forebay_proto::{NodeId, StoreId};

    use super::*;

    #[test]
    fn addresses_are_those_given_and_those_learnt_each_once() {
        let member = |id, address: &str| Member {
            id: NodeId(id),
            name: format!("c{id}"),
            address: address.into(),
            store_id: StoreId([0; 16]),
            learner: false,
        };
        let mut roster = Roster::new(["a:1".into(), "a:1".into()]);
        roster.learn(&[member(1, "a:1"), member(2, "b:1")]);
        assert_eq!(roster.addresses(), ["a:1", "b:1"]);
        assert_eq!(roster.name_of("b:1"), Some("c2"));
        roster.learn(&[member(3, "c:1")]);
        roster.led_by("d:1");
        assert_eq!(roster.addresses(), ["a:1", "c:1", "d:1"]);
        assert_eq!(roster.name_of("b:1"), None);
    }
}

//! Reading a log entry: every replica reads the same bytes and refuses the same ones.

use bytes::Bytes;
use forebay_proto::refusal::Refusal;
use forebay_proto::wire::fleet as wire;
use forebay_proto::{ClientId, Millis};
use prost::Message;
use wire::command::Action;

use super::EVIDENCE_LIMIT;

/// One entry, its envelope read and its command as it arrived.
#[derive(Debug)]
pub(super) struct Proposal {
    pub(super) at: Millis,
    pub(super) actor: wire::Actor,
    pub(super) client: ClientId,
    pub(super) sequence: u64,
    pub(super) command: Bytes,
    pub(super) reason: String,
    pub(super) evidence: Option<wire::Evidence>,
}

impl Proposal {
    pub(super) fn decode(entry: &Bytes) -> Result<Self, Refusal> {
        let wire = wire::Proposal::decode(entry.clone())
            .map_err(|_| Refusal::invalid("proposal", "does not decode"))?;
        let client = ClientId::from_wire(&wire.client)
            .map_err(|error| Refusal::invalid("proposal.client", error.to_string()))?;
        Ok(Self {
            at: Millis(wire.at_ms),
            actor: wire.actor.unwrap_or_default(),
            client,
            sequence: wire.sequence,
            command: wire.command,
            reason: wire.reason,
            evidence: wire.evidence,
        })
    }
}

/// What an entry asks for.
pub(super) fn action(command: &Bytes) -> Result<Action, Refusal> {
    wire::Command::decode(command.clone())
        .map_err(|_| Refusal::invalid("command", "does not decode"))?
        .action
        .ok_or_else(unknown_kind)
}

/// A command of a kind that a later version added.
pub(super) fn unknown_kind() -> Refusal {
    let problem = "is none that this version knows: update the control nodes first";
    Refusal::invalid("command", problem)
}

/// The leader's evidence, where a guard cannot do without it.
pub(super) fn fresh(evidence: Option<&wire::Evidence>) -> Result<&wire::Evidence, Refusal> {
    let evidence = evidence.ok_or_else(|| {
        Refusal::invalid(
            "evidence",
            "is missing: the leader stamps it on this command",
        )
    })?;
    let age = Millis(evidence.age_ms.into());
    if age > EVIDENCE_LIMIT {
        return Err(Refusal::StaleEvidence {
            age_ms: age.0,
            limit_ms: EVIDENCE_LIMIT.0,
        });
    }
    Ok(evidence)
}

//! What the facts say of this process.

use forebay_control_client::Facts;
use forebay_proto::wire::fleet::Desired;
use forebay_proto::{Incarnation, Revision};

/// What the facts say of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing yet: they are older than its registration.
    NotYet,
    /// What an operator wants of it. Outlives its restarts.
    Wanted(Desired),
    /// A newer start is registered: it must stop.
    Superseded(Incarnation),
    /// Its worker was removed: it must stop.
    Removed,
}

/// What `facts` say of the process that is `own`, which was registered at `registered` if it was.
#[must_use]
pub fn standing(
    facts: &Facts,
    name: &str,
    own: Incarnation,
    registered: Option<Revision>,
) -> Standing {
    let worker = facts
        .workers
        .get(name)
        .map(|worker| (worker.incarnation, worker.departed, worker.desired));
    judge(worker, own, registered.map(|at| facts.revision >= at))
}

/// `registered`: this process is, and whether these facts are as new as that.
fn judge(
    worker: Option<(Incarnation, bool, Desired)>,
    own: Incarnation,
    registered: Option<bool>,
) -> Standing {
    match worker {
        None if registered == Some(true) => Standing::Removed,
        None => Standing::NotYet,
        // From before its registration: what an operator wanted since is in newer ones, which it will
        // get from the same control plane. Those on its disk count until then.
        Some((found, _, _)) if registered == Some(false) && found < own => Standing::NotYet,
        Some((found, _, _)) if found > own => Standing::Superseded(found),
        Some((found, true, _)) if found == own => Standing::Superseded(found),
        Some((found, _, _)) if found.worker != own.worker => Standing::NotYet,
        Some((_, _, desired)) => Standing::Wanted(desired),
    }
}

#[cfg(test)]
mod tests {
    use forebay_proto::WorkerId;

    use super::*;

    fn incarnation(worker: u32, grant: u64, start: u32) -> Incarnation {
        Incarnation {
            worker: WorkerId(worker),
            grant,
            start,
        }
    }

    #[test]
    fn only_a_newer_start_a_goodbye_or_a_removal_ends_a_process() {
        let own = incarnation(7, 10, 3);
        let ready = |found| Some((found, false, Desired::Ready));
        let wanted = Standing::Wanted(Desired::Ready);
        assert_eq!(judge(ready(own), own, Some(true)), wanted);
        assert_eq!(
            judge(ready(incarnation(7, 10, 2)), own, None),
            wanted,
            "its last start"
        );
        assert_eq!(
            judge(ready(incarnation(7, 10, 2)), own, Some(false)),
            Standing::NotYet,
            "it has registered since: a cordon may lie between"
        );
        let newer = incarnation(7, 10, 4);
        assert_eq!(
            judge(ready(newer), own, Some(true)),
            Standing::Superseded(newer)
        );
        let again = incarnation(8, 20, 1);
        assert_eq!(
            judge(ready(again), own, Some(true)),
            Standing::Superseded(again)
        );
        assert_eq!(
            judge(ready(incarnation(6, 5, 9)), own, Some(false)),
            Standing::NotYet
        );
        assert_eq!(judge(None, own, Some(true)), Standing::Removed);
        assert_eq!(
            judge(None, own, Some(false)),
            Standing::NotYet,
            "facts from before"
        );
        let departed = Some((own, true, Desired::Ready));
        assert_eq!(judge(departed, own, Some(true)), Standing::Superseded(own));
    }

    #[test]
    fn a_restart_clears_no_cordon() {
        let cordoned = Some((incarnation(7, 10, 2), true, Desired::Cordoned));
        let standing = judge(cordoned, incarnation(7, 10, 3), None);
        assert_eq!(standing, Standing::Wanted(Desired::Cordoned));
    }
}

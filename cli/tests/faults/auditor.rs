//! One who follows the audit all the while, and then joins it: nothing acknowledged is missing, nothing
//! was done twice.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use forebay_consensus::fleet::audit::{GENESIS, KEPT_ENTRIES, verify};
use forebay_control_client::ControlClient;
use forebay_proto::wire::fleet::AuditEntry;
use forebay_proto::{Level, Role};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::cell::Cell;

/// Far less than it takes to write more than nodes keep.
const LOOKS_EVERY: Duration = Duration::from_millis(500);
const DEADLINE: Duration = Duration::from_secs(2);

pub struct Auditor {
    client: ControlClient,
    seen: Arc<Mutex<Seen>>,
    looking: JoinHandle<()>,
}

#[derive(Default)]
struct Seen {
    entries: BTreeMap<u64, AuditEntry>,
    head: Vec<u8>,
}

impl Auditor {
    pub fn start(cell: &Cell) -> Self {
        let role = Role::Operator(Level::Admin);
        let client = cell.client(role, "auditor", cell.addresses());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let (asked, kept) = (client.clone(), seen.clone());
        let looking = tokio::spawn(async move {
            loop {
                look(&asked, &kept).await;
                tokio::time::sleep(LOOKS_EVERY).await;
            }
        });
        Self {
            client,
            seen,
            looking,
        }
    }

    /// Looks once more, when all nodes know the same, and checks the whole chain against the reasons
    /// of commands: all were unique. Returns how many entries there are.
    pub async fn joined(self, acknowledged: &[String]) -> usize {
        assert!(!self.looking.is_finished(), "two nodes differ");
        self.looking.abort();
        look(&self.client, &self.seen).await;
        let seen = self.seen.lock().await;
        let entries: Vec<AuditEntry> = seen.entries.values().cloned().collect();
        assert_eq!(entries[0].previous_hash[..], GENESIS, "from the beginning");
        verify(&entries, &seen.head).unwrap();
        let mut times: BTreeMap<&str, u32> = BTreeMap::new();
        for entry in entries.iter().filter(|entry| entry.reason.contains('#')) {
            *times.entry(&entry.reason).or_default() += 1;
        }
        if let Some((reason, times)) = times.iter().find(|(_, times)| **times > 1) {
            panic!("{reason} was applied {times} times");
        }
        for reason in acknowledged {
            let known = times.contains_key(&**reason);
            assert!(known, "{reason} was acknowledged and is not in the audit");
        }
        entries.len()
    }
}

/// Takes in what one node has of the audit; what two nodes say of one entry is the same.
async fn look(client: &ControlClient, seen: &Mutex<Seen>) {
    let limit = u32::try_from(KEPT_ENTRIES).unwrap();
    let Ok(tail) = client.audit(limit, DEADLINE).await else {
        return;
    };
    let mut seen = seen.lock().await;
    for entry in tail.entries {
        let known = seen.entries.entry(entry.index).or_insert(entry.clone());
        assert_eq!(*known, entry, "two nodes differ");
    }
    seen.head = tail.head.to_vec();
}

//! Files that are read again when they change: the clients' keys, and the certificate of the client port.
//!
//! No signal is needed. What cannot be used is said once, and changes nothing until the file changes again.
#![allow(clippy::disallowed_methods)] // the rim: this is where files are looked at and time passes

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};

use crate::run::read_keys;
use crate::shared::Shared;

const LOOK_EVERY: Duration = Duration::from_secs(2);

/// What tells a new file from the old one: where it is, its length, and when it was written.
type Stamp = Option<(u64, u64, i64, i64)>;

fn stamp(path: &Path) -> Stamp {
    let file = std::fs::metadata(path).ok()?;
    Some((file.ino(), file.len(), file.mtime(), file.mtime_nsec()))
}

/// Follows the files until it is dropped.
pub(crate) async fn watch(shared: Arc<Shared>) {
    let keys = || shared.settings.keys.as_deref().map(stamp);
    let tls = || shared.tls.as_ref().map(|tls| tls.files().map(stamp));
    let (mut keys_seen, mut tls_seen) = (keys(), tls());
    let mut looks = interval(LOOK_EVERY);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        // Stamps are taken before the files are read: what is written meanwhile is read next time.
        let keys_now = keys();
        if keys_now != keys_seen {
            keys_seen = keys_now;
            reread_keys(&shared);
        }
        let tls_now = tls();
        if tls_now != tls_seen {
            tls_seen = tls_now;
            reread_certificate(&shared);
        }
    }
}

fn reread_keys(shared: &Shared) {
    match read_keys(&shared.settings) {
        Ok(keys) => {
            let count = keys.count();
            let mut known = shared.keys.write();
            *known = keys.continuing(&known);
            tracing::info!(keys = count, "the keys file was read again");
        }
        Err(error) => tracing::warn!(%error, "the keys stay the old ones"),
    }
}

fn reread_certificate(shared: &Shared) {
    let Some(tls) = &shared.tls else { return };
    match tls.read_again() {
        Ok(()) => tracing::info!("a new TLS certificate is in use"),
        // Perhaps only one of both files is written yet.
        Err(error) => tracing::warn!(%error, "the TLS certificate stays the old one"),
    }
}

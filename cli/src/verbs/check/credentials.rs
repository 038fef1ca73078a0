//! The context and our certificate: before anybody is asked.

use std::net::ToSocketAddrs as _;
use std::time::Duration;

use forebay_link::Validity;
use forebay_proto::{Identity, Role};

use super::Seen;
use super::report::Report;
use crate::context::Context;
use crate::exit::CliError;

/// What we are given.
pub(super) struct Ours {
    identity: Identity,
    validity: Validity,
    authority: Validity,
    chain: Result<(), String>,
    /// Addresses that name nobody.
    unresolved: Vec<String>,
}

impl Ours {
    pub(super) fn of(context: &Context, now_ms: u64) -> Self {
        let credentials = &context.credentials;
        let (validity, authority) = (credentials.validity(), credentials.authority_validity());
        // The chain is one question and its dates another: asked at a moment when they hold.
        let seconds = i64::try_from(now_ms / 1_000).unwrap_or(i64::MAX);
        let (from, until) = (
            validity.from.max(authority.from),
            validity.until.min(authority.until),
        );
        let within = u64::try_from(seconds.min(until).max(from)).unwrap_or(0);
        let unresolved = context.control.iter().filter_map(|address| {
            let resolved = address.to_socket_addrs();
            resolved.err().map(|error| format!("{address}: {error}"))
        });
        Self {
            identity: credentials.identity().clone(),
            validity,
            authority,
            chain: credentials.check_chain(Duration::from_secs(within)),
            unresolved: unresolved.collect(),
        }
    }
}

/// Adds what concerns us.
pub(super) fn check(seen: &Seen, report: &mut Report) {
    let (context, files) = match &seen.context {
        Ok(_) => (vec![], vec![]),
        Err(error @ CliError::Credentials(_)) => (vec![], vec![error.to_string()]),
        Err(error) => (vec![error.to_string()], vec![]),
    };
    let context_hint = "`forebay dev` writes a context and prints its `export FOREBAY_CONTEXT=...` line; else give --control, --ca, --cert and --key";
    report.fail("context.file", &context, "it can be read", context_hint);
    let Ok(ours) = &seen.context else {
        let hint = "take the three files that `forebay ca issue` wrote together";
        if context.is_empty() {
            report.fail("certificate.files", &files, "", hint);
        } else {
            report.skip("certificate.files", NO_CONTEXT);
        }
        for id in REST {
            report.skip(id, NO_CONTEXT);
        }
        return keys(seen, report);
    };
    report.fail(
        "certificate.files",
        &[],
        "certificate, key and CA belong together",
        "",
    );
    report.fail(
        "context.addresses",
        &ours.unresolved,
        "every control address names a host",
        "correct `control` in the context, or the name's resolution",
    );
    let chain: Vec<String> = ours.chain.iter_err().collect();
    report.fail(
        "certificate.chain",
        &chain,
        "the CA signed our certificate",
        "issue it anew from this cell's CA: `forebay ca issue`",
    );
    dates(seen, ours, report);
    let role: Vec<String> = match ours.identity.role {
        Role::Operator(_) => vec![],
        _ => vec![format!("{} is no operator's", ours.identity.short())],
    };
    report.fail(
        "certificate.role",
        &role,
        ours.identity.short(),
        "verbs need a certificate of `forebay ca issue --role operator/viewer`, `operator/operator` or `operator/admin`",
    );
    keys(seen, report);
}

fn dates(seen: &Seen, ours: &Ours, report: &mut Report) {
    for (id, whose, validity, hint) in [
        (
            "certificate.dates",
            "our certificate",
            ours.validity,
            "issue another: `forebay ca issue`",
        ),
        (
            "certificate.authority",
            "the CA's certificate",
            ours.authority,
            "every certificate of the cell ends with it: make a CA and issue them anew",
        ),
    ] {
        let now = i64::try_from(seen.now_ms / 1_000).unwrap_or(i64::MAX);
        let days = (validity.until - now).div_euclid(DAY);
        let fine = format!("{whose} holds for {days} days");
        if now < validity.from {
            let hours = (validity.from - now) / 3_600;
            let problem = format!("{whose} begins to hold in {hours} hours: is this clock right?");
            report.fail(id, &[problem], fine, hint);
        } else if now > validity.until {
            report.fail(
                id,
                &[format!("{whose} expired {} days ago", -days)],
                fine,
                hint,
            );
        } else {
            let soon: Vec<String> = (days < SOON_DAYS)
                .then(|| fine.clone())
                .into_iter()
                .collect();
            report.warn(id, &soon, fine, hint);
        }
    }
}

fn keys(seen: &Seen, report: &mut Report) {
    match &seen.keys {
        None => report.skip("keys.file", "no --keys FILE was given"),
        Some((path, counted)) => {
            let problems: Vec<String> = counted.iter_err().collect();
            let count = counted.as_ref().map_or(0, |count| *count);
            let fine = format!("{} has {count} keys", path.display());
            let hint =
                "balancers keep the file that they read before; `forebay keys hash` makes entries";
            report.fail("keys.file", &problems, fine, hint);
        }
    }
}

/// The error of a result, as an iterator of at most one.
pub(super) trait IterErr {
    fn iter_err(&self) -> impl Iterator<Item = String>;
}

impl<T, E: ToString> IterErr for Result<T, E> {
    fn iter_err(&self) -> impl Iterator<Item = String> {
        self.as_ref().err().map(ToString::to_string).into_iter()
    }
}

const NO_CONTEXT: &str = "there is no context that can be used";
const REST: [&str; 5] = [
    "context.addresses",
    "certificate.chain",
    "certificate.dates",
    "certificate.authority",
    "certificate.role",
];
const DAY: i64 = 86_400;
const SOON_DAYS: i64 = 30;

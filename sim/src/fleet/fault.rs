//! What goes wrong in a run, and when.

use std::time::Duration;

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fault {
    /// Which worker, from 0.
    pub worker: u32,
    /// From the start of the run.
    pub at: Duration,
    /// What happens to it.
    pub what: What,
    /// When it is over; `None`: it lasts.
    pub lasts: Option<Duration>,
}

/// What happens to a worker.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    /// Its processes die, and its cache with them.
    Crash,
    /// An operator drains it.
    Drain,
    /// Its engine runs at so many times its speed, and nobody is told.
    Slow(f64),
}

/// Why a text is no fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no fault: write crash:WORKER@SECONDS, drain:WORKER@SECONDS or slow:WORKER@SECONDS*SPEED, \
     each with +SECONDS if it ends, such as crash:3@120+60 or slow:1@0*0.5"
)]
pub struct FaultError(String);

impl std::str::FromStr for Fault {
    type Err = FaultError;

    fn from_str(text: &str) -> Result<Self, FaultError> {
        parse(text).ok_or_else(|| FaultError(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Fault> {
    let (kind, rest) = text.split_once(':')?;
    let (worker, rest) = rest.split_once('@')?;
    let (rest, lasts) = match rest.split_once('+') {
        Some((rest, lasts)) => (rest, Some(seconds(lasts)?)),
        None => (rest, None),
    };
    let (at, speed) = match rest.split_once('*') {
        Some((at, speed)) => (at, Some(speed.parse::<f64>().ok()?)),
        None => (rest, None),
    };
    let what = match (kind, speed) {
        ("crash", None) => What::Crash,
        ("drain", None) => What::Drain,
        ("slow", Some(speed)) if (0.01..=100.0).contains(&speed) => What::Slow(speed),
        _ => return None,
    };
    Some(Fault {
        // As operators count them: w1 is the first.
        worker: worker.parse::<u32>().ok()?.checked_sub(1)?,
        at: seconds(at)?,
        what,
        lasts,
    })
}

fn seconds(text: &str) -> Option<Duration> {
    let seconds: f64 = text.parse().ok()?;
    let in_a_year = (0.0..=3.2e7).contains(&seconds);
    in_a_year.then(|| Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_fault_says_what_where_when_and_for_how_long() {
        let fault: Fault = "crash:3@120+60".parse().unwrap();
        let expected = Fault {
            worker: 2,
            at: Duration::from_secs(120),
            what: What::Crash,
            lasts: Some(Duration::from_secs(60)),
        };
        assert_eq!(fault, expected);
        let slow: Fault = "slow:1@0*0.5".parse().unwrap();
        assert_eq!((slow.what, slow.lasts), (What::Slow(0.5), None));
        assert_eq!("drain:8@1.5".parse::<Fault>().unwrap().what, What::Drain);
        for wrong in [
            "",
            "crash",
            "crash:0@1",
            "crash:1@-1",
            "slow:1@0",
            "crash:1@1*2",
            "slow:1@0*NaN",
        ] {
            let error = wrong.parse::<Fault>().unwrap_err().to_string();
            assert!(error.contains("is no fault: write crash:"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "[a-z:@+*0-9.e-]{0,40}") {
            let _ = text.parse::<Fault>();
        }
    }
}

//! How much of an engine's death is held against each of the requests that were on it.
//!
//! One death gives out one whole, in equal shares; a request whose first token had not come counts twice, since
//! that is where engines die. So whoever was there by chance, in company, has less than a quarantine takes after two
//! deaths, and the sum of what is given out is no more than there were deaths. The exception makes the second death
//! enough: who is *suspected* from an earlier death, is prefilled alone ([`crate::blame`] is what the agent's rule
//! of one suspect at a time is for) and has the engine die again, has all of it and half as much again, so that it
//! does not matter how many were around the first time.

use forebay_proto::suspect::MOST_OF_A_DEATH;

/// A whole death.
const WHOLE: u32 = 1_000;
/// One that had its first token, and one that had not.
const DECODING: u32 = 1;
const PREFILLING: u32 = 2;

/// A request that was on an engine when it died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OnEngine {
    /// Its first token had not come.
    pub prefilling: bool,
    /// Something was held against it before.
    pub suspected: bool,
}

/// What is held against each, in thousandths of a death, in the order given; none is zero.
#[must_use]
pub fn shares(on_engine: &[OnEngine]) -> Vec<u32> {
    let culprit = culprit(on_engine);
    let weight = |one: &OnEngine| {
        if one.prefilling { PREFILLING } else { DECODING }
    };
    let sum: u32 = on_engine.iter().map(weight).sum();
    let share = |(place, one)| match culprit {
        Some(culprit) if culprit == place => MOST_OF_A_DEATH,
        _ => (WHOLE * weight(one) / sum.max(1)).max(1),
    };
    on_engine.iter().enumerate().map(share).collect()
}

/// The one that was suspected and is told apart: it alone was prefilled, or nobody was and it alone was suspected.
fn culprit(on_engine: &[OnEngine]) -> Option<usize> {
    let prefilling = on_engine.iter().filter(|one| one.prefilling).count();
    let likely = |one: &OnEngine| one.suspected && (prefilling == 0 || one.prefilling);
    let mut likely = on_engine.iter().enumerate().filter(|(_, one)| likely(one));
    let (first, _) = likely.next()?;
    let told_apart = prefilling <= 1 && likely.next().is_none();
    told_apart.then_some(first)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// `p` is prefilled, `d` is past its first token; capitals were suspected before.
    fn on(requests: &str) -> Vec<OnEngine> {
        let one = |letter: char| OnEngine {
            prefilling: letter.eq_ignore_ascii_case(&'p'),
            suspected: letter.is_ascii_uppercase(),
        };
        requests.chars().map(one).collect()
    }

    fn check(requests: &str, expected: &[u32]) {
        assert_eq!(shares(&on(requests)), expected, "{requests}");
    }

    #[test]
    fn a_death_is_shared_out_and_who_is_prefilled_counts_twice() {
        check("", &[]);
        check("p", &[1_000]);
        check("d", &[1_000]);
        check("pp", &[500, 500]);
        check("pd", &[666, 333]);
        check("pddd", &[400, 200, 200, 200]);
    }

    #[test]
    fn a_suspect_that_is_told_apart_has_more_than_all_of_it() {
        check("P", &[1_500]);
        check("D", &[1_500]);
        check("Pdd", &[1_500, 250, 250]);
        check("Ddd", &[1_500, 333, 333]);
    }

    #[test]
    fn a_suspect_that_is_not_told_apart_is_one_of_many() {
        check("Pp", &[500, 500]);
        check("PP", &[500, 500]);
        check("DD", &[500, 500]);
        check("Dp", &[333, 666]);
        check("Pdp", &[400, 200, 400]);
    }

    #[test]
    fn one_suspect_of_several_is_told_apart_by_being_prefilled() {
        check("PDD", &[1_500, 250, 250]);
    }

    proptest! {
        #[test]
        fn nobody_is_left_out_and_no_more_than_the_death_is_given_out(
            requests in proptest::collection::vec((any::<bool>(), any::<bool>()), 1..200)
        ) {
            let requests = requests.into_iter().map(|(prefilling, suspected)| OnEngine {
                prefilling,
                suspected,
            });
            let requests: Vec<_> = requests.collect();
            let shares = shares(&requests);
            prop_assert_eq!(shares.len(), requests.len());
            prop_assert!(shares.iter().all(|share| *share > 0));
            let culprits = shares.iter().filter(|share| **share == MOST_OF_A_DEATH).count();
            prop_assert!(culprits <= 1);
            let others: u32 = shares.iter().filter(|share| **share < MOST_OF_A_DEATH).sum();
            prop_assert!(others <= WHOLE);
        }

        /// Twice in company that is not told apart is never enough for a quarantine.
        #[test]
        fn who_was_there_twice_by_chance_has_less_than_a_quarantine_takes(
            one in "[pd]{1,20}", other in "[pd]{1,20}", prefilling in any::<bool>()
        ) {
            let me = if prefilling { "p" } else { "d" };
            let mine = |company: &str| shares(&on(&format!("{me}{company}")))[0];
            let sum = mine(&one) + mine(&other);
            prop_assert!(sum < forebay_proto::suspect::QUARANTINE_AT, "{sum}");
        }
    }
}

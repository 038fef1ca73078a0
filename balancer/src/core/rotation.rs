//! How requests move from one fingerprint key to the next.
//!
//! The key is in a prompt's chunks and in the salt of the engine's cache, so that what is cached under one
//! key is of no use under another: a prompt that moves is prefilled once more. So while two keys are known,
//! a prompt stays with the older one where more of it is cached under that; and a share of the requests
//! that grows from none to all over the overlap moves anyway, so that the prefills that a rotation costs
//! are spread over it, and are not all due at its end. What moved stays: more is cached of it there.

use std::time::Duration;

/// Whether a request goes by the newest key whatever is cached under the older one. `draw` is any number
/// that is spread evenly over requests.
pub(crate) fn moves(age: Duration, overlap: Duration, draw: u64) -> bool {
    if age >= overlap {
        return true;
    }
    let share = age.as_secs_f64() / overlap.as_secs_f64();
    (draw as f64) < share * (u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(age_s: u64, expected: std::ops::RangeInclusive<u32>) {
        let draws = (0..1_000_u64).map(|n| n.wrapping_mul(u64::MAX / 1_000));
        let overlap = Duration::from_secs(100);
        let moved = draws.filter(|draw| moves(Duration::from_secs(age_s), overlap, *draw));
        let moved = u32::try_from(moved.count()).unwrap();
        assert!(expected.contains(&moved), "{moved} after {age_s} s");
    }

    #[test]
    fn nobody_moves_at_once_and_everybody_has_in_the_end() {
        check(0, 0..=0);
        check(10, 95..=105);
        check(50, 495..=505);
        check(100, 1_000..=1_000);
        check(1_000_000, 1_000..=1_000);
        assert!(moves(Duration::ZERO, Duration::ZERO, u64::MAX));
    }
}

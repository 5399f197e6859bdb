//! How likely what is cached is used again: learned from what happens, class by class.
//!
//! A class gathers what looks alike: how often it was used by someone who did not just continue it, or whether it is the
//! new end of a known prefix. Within a class, reuse grows rarer with age; it is modelled as falling like `1 / (age + YOUNG)`,
//! the same form for all. What a class then has of its own is one factor, and its maximum likelihood estimate is a quotient
//! of two sums, which is right also for what is evicted before it is used:
//!
//! ```text
//!   rate(class, age) = factor(class) / (age + YOUNG)
//!   factor(class)    = uses / exposure,    exposure = sum over pages of ln(1 + age / YOUNG), until use or eviction
//! ```
//!
//! Both sums start from a prior and halve now and then, so that the estimate follows the traffic. The policy takes the factor
//! to the power of `TRUST`, since a class is not all there is to know (docs/decisions/0006 has the trials).

use super::Past;

/// Classes of history by uses, then of snapshots.
pub(super) const CLASSES: usize = 9;

/// What rates are before anything is known, relative to each other.
const PRIOR: [f64; CLASSES] = [1.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 1.0, 3.0];

/// Uses that the prior weighs.
const PRIOR_USES: f64 = 1000.0;

/// Pages used or evicted after which all sums halve: about 900 calls of agents, whose whole context counts each time.
const HALF_LIFE: u64 = 200_000;

/// Age up to which reuse is about as likely as at once, in operations: a few requests.
const YOUNG: f64 = 10.0;

/// Weight of a class's factor beside age: 0 is least recent use, 1 the model as it stands.
const TRUST: f64 = 0.7;

/// Rates of reuse by class.
#[derive(Clone, Debug)]
pub(super) struct Reuse {
    uses: [f64; CLASSES],
    exposure: [f64; CLASSES],
    likelihood: [f64; CLASSES],
    pages: u64,
    fresh: u32,
}

/// The class of what has been used so.
pub(super) fn class_of(past: Past) -> u8 {
    match past.uses {
        uses if past.snapshot => 7 + u8::from(uses > 0),
        0 => u8::from(past.grown),
        uses @ (1 | 2) => uses + 1,
        3 | 4 => 4,
        5..=8 => 5,
        _ => 6,
    }
}

impl Reuse {
    pub fn new() -> Self {
        let mut reuse = Reuse {
            uses: [0.0; CLASSES],
            exposure: [0.0; CLASSES],
            likelihood: [0.0; CLASSES],
            pages: 0,
            fresh: 0,
        };
        reuse.estimate();
        reuse
    }

    /// `pages` of a class left it at an age: because they were used, or else because they were evicted.
    pub fn left(&mut self, class: u8, age: u64, pages: u32, used: bool) {
        let (c, n) = (usize::from(class), f64::from(pages));
        self.exposure[c] += n * (age as f64 / YOUNG).ln_1p();
        self.uses[c] += if used { n } else { 0.0 };
        self.pages += u64::from(pages);
        self.fresh += 1;
        if self.pages >= HALF_LIFE {
            self.pages = 0;
            self.uses.iter_mut().chain(&mut self.exposure).for_each(|sum| *sum /= 2.0);
        }
        if self.fresh >= 64 {
            self.estimate();
        }
    }

    fn estimate(&mut self) {
        self.fresh = 0;
        let expected: f64 = self.exposure.iter().zip(PRIOR).map(|(e, p)| e * p).sum();
        let base = (self.uses.iter().sum::<f64>() + 1.0) / (expected + 1000.0);
        let sums = self.uses.iter().zip(&self.exposure).zip(PRIOR);
        for (likelihood, ((uses, exposure), prior)) in self.likelihood.iter_mut().zip(sums) {
            let factor = (uses + PRIOR_USES) / (exposure + PRIOR_USES / (base * prior));
            *likelihood = factor.powf(TRUST);
        }
    }

    /// How likely a class is used at an age, on one scale for all.
    pub fn likelihood(&self, class: u8, age: u64) -> f64 {
        self.likelihood[usize::from(class)] / (age as f64 + YOUNG)
    }

    /// The sums, for a dump.
    pub fn sums(&self) -> ([f64; CLASSES], [f64; CLASSES]) {
        (self.uses, self.exposure)
    }

    /// From sums of a dump.
    pub fn from_sums(uses: [f64; CLASSES], exposure: [f64; CLASSES]) -> Self {
        let mut reuse = Reuse { uses, exposure, ..Reuse::new() };
        reuse.estimate();
        reuse
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_follow_what_happens_and_start_from_the_prior() {
        let mut reuse = Reuse::new();
        assert!(
            reuse.likelihood(6, 10) > reuse.likelihood(2, 10)
                && reuse.likelihood(2, 10) > reuse.likelihood(0, 10)
        );
        for _ in 0..20_000 {
            reuse.left(0, 10, 1, true);
            reuse.left(6, 10, 1, false);
        }
        assert!(reuse.likelihood(0, 10) > reuse.likelihood(6, 10));
    }

    #[test]
    fn what_is_evicted_unused_lowers_the_rate_as_much_as_its_age() {
        let (mut a, mut b) = (Reuse::new(), Reuse::new());
        for _ in 0..1000 {
            a.left(0, 100, 1, true);
            // Twice the exposure for the same uses.
            b.left(0, 100, 1, true);
            b.left(0, 100, 1, false);
        }
        assert!(a.likelihood(0, 10) > b.likelihood(0, 10));
    }

    #[test]
    fn what_is_long_ago_is_forgotten() {
        let mut reuse = Reuse::new();
        let mut run = |used: bool| {
            (0..3 * HALF_LIFE / 10).for_each(|_| reuse.left(0, 10, 10, used));
            reuse.likelihood(0, 10)
        };
        let (always, never) = (run(true), run(false));
        assert!(never < always / 3.0, "{always} then {never}");
    }
}

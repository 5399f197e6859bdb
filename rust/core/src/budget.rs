//! How long a step will take, learnt from how long steps took; and how much of a prompt still fits into one.
//!
//! ```text
//!   predicted = fixed * (base_us + rows * decode_us + context / 1000 * context_us_per_1k + copies * copy_us)
//!             + load  * (replay_factor *) compute(a, b) of each piece of a prompt        (see `cost`)
//! ```
//!
//! `fixed` and `load` are 1 at first. Each measured step moves them by the ratio r of measured to predicted time, in the
//! logarithm, each by its share of the step: a device that is slower all over and one that is slower in prefill only are
//! both learnt. A single odd step moves nothing, since the median of three ratios (of steps of its kind) counts; after the speed has changed by a
//! factor f the error is at most |ln f| * (1 - GAIN)^(n - 1) after n steps (docs/scheduling.md).

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::cost::CostModel;
use crate::error::CoreError;
use crate::ids::Step;

/// Share of the error that one measured step corrects, in the logarithm.
pub const GAIN: f64 = 0.25;
/// Fewest tokens of a piece of a prompt that a step with a budget still takes: prompts make progress.
pub const LEAST_CHUNK: u32 = 64;
/// Factors stay within this of 1, whatever was measured.
const FARTHEST: f64 = 256.0;
/// Measured times that mean anything, in microseconds: up to an hour.
const LONGEST_US: f64 = 3.6e9;
/// Predictions kept for steps that are not measured yet.
const KEPT: usize = 8;

/// What a step costs besides its prompt tokens, in microseconds, before anything is measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepCost {
    /// Any step: reading the weights, launching kernels.
    pub base_us: f64,
    /// A row in decode.
    pub decode_us: f64,
    /// Saving or restoring a state, or copying one.
    pub copy_us: f64,
}

impl Default for StepCost {
    fn default() -> Self {
        StepCost { base_us: 10_000.0, decode_us: 50.0, copy_us: 200.0 }
    }
}

impl StepCost {
    /// Refuses what is not a number of at least 0.
    pub fn validate(&self) -> Result<(), CoreError> {
        let fields = [("base_us", self.base_us), ("decode_us", self.decode_us), ("copy_us", self.copy_us)];
        match fields.into_iter().find(|(_, v)| !v.is_finite() || *v < 0.0) {
            Some((name, v)) => Err(CoreError::config(name, v, "it must be a number of at least 0")),
            None => Ok(()),
        }
    }
}

/// The predicted parts of one step, before correction.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Work {
    /// Base, decodes and copies.
    pub fixed_us: f64,
    /// Pieces of prompts.
    pub load_us: f64,
}

/// What measured steps have taught.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Learnt {
    fixed: f64,
    load: f64,
    /// The last three ratios of steps that are mostly decode, and of those that are mostly prompt.
    ratios: [[f64; 3]; 2],
    /// Which of the three is the oldest.
    oldest: [u8; 2],
}

impl Default for Learnt {
    fn default() -> Self {
        Learnt { fixed: 1.0, load: 1.0, ratios: [[1.0; 3]; 2], oldest: [0; 2] }
    }
}

impl Learnt {
    /// Whether it can have been learnt: what is read from a dump may be anything.
    pub fn is_sound(&self) -> bool {
        let factors = [self.fixed, self.load].iter().all(|f| (1.0 / FARTHEST..=FARTHEST).contains(f));
        let ratios = self.ratios.iter().flatten().all(|r| r.is_finite() && *r >= 0.0);
        factors && ratios && self.oldest.iter().all(|&at| at < 3)
    }
}

/// The cost model with its correction.
#[derive(Clone, Debug)]
pub struct StepModel {
    cost: CostModel,
    step: StepCost,
    learnt: Learnt,
    pending: VecDeque<(Step, Work)>,
    last_predicted: f64,
    last_measured: f64,
}

impl StepModel {
    /// A model that has seen nothing.
    pub fn new(cost: CostModel, step: StepCost) -> Self {
        StepModel {
            cost,
            step,
            learnt: Learnt::default(),
            pending: VecDeque::new(),
            last_predicted: 0.0,
            last_measured: 0.0,
        }
    }

    /// The work of a step of `rows` decodes with `context` tokens before them in all, and `copies` of states.
    pub fn fixed_work(&self, rows: u32, context: u64, copies: u32) -> f64 {
        self.step.base_us
            + f64::from(rows) * self.step.decode_us
            + context as f64 / 1000.0 * self.cost.context_us_per_1k
            + f64::from(copies) * self.step.copy_us
    }

    /// The work of a piece of a prompt, positions `from..to`.
    pub fn load_work(&self, from: u32, to: u32, replay: bool) -> f64 {
        self.cost.compute(from, to) * if replay { self.cost.replay_factor } else { 1.0 }
    }

    /// Predicted time of a step, in microseconds.
    pub fn predict(&self, work: Work) -> f64 {
        self.learnt.fixed * work.fixed_us + self.learnt.load * work.load_us
    }

    /// Predicted time of positions `from..to` of a prompt.
    pub fn prefill_us(&self, from: u32, to: u32) -> f64 {
        self.learnt.load * self.cost.compute(from, to)
    }

    /// The most tokens from position `from` on that take at most `us`: the positive root of
    /// `context / 2000 * t² + (token + context * from / 1000) * t = us`.
    pub fn tokens_within(&self, us: f64, from: u32, replay: bool) -> u32 {
        let scale = self.learnt.load * if replay { self.cost.replay_factor } else { 1.0 };
        let per_k = scale * self.cost.context_us_per_1k;
        let (a, b) = (per_k / 2000.0, scale * self.cost.token_us + per_k * f64::from(from) / 1000.0);
        if us <= 0.0 {
            return 0;
        }
        // The form that does not cancel, and is right for a = 0 as well.
        let t = 2.0 * us / (b + (b * b + 4.0 * a * us).sqrt());
        if t.is_finite() { t.min(f64::from(u32::MAX)) as u32 } else { u32::MAX }
    }

    /// Remembers what a planned step will take, until it is measured.
    pub fn expect(&mut self, step: Step, work: Work) {
        if self.pending.len() == KEPT {
            self.pending.pop_front();
        }
        self.pending.push_back((step, work));
    }

    /// Forgets steps from `step` on: they were not run.
    pub fn forget_from(&mut self, step: Step) {
        self.pending.retain(|(s, _)| *s < step);
    }

    /// A step took `us` microseconds. Steps that are not known, and times that cannot be, change nothing.
    pub fn observe(&mut self, step: Step, us: f64) {
        let Some(at) = self.pending.iter().position(|(s, _)| *s == step) else { return };
        let work = self.pending.remove(at).expect("it was found").1;
        let predicted = self.predict(work);
        if !(us > 0.0 && us <= LONGEST_US && predicted > 0.0) {
            return;
        }
        (self.last_predicted, self.last_measured) = (predicted, us);
        let learnt = &mut self.learnt;
        let (fixed, load) = (learnt.fixed * work.fixed_us, learnt.load * work.load_us);
        let kind = usize::from(load > fixed);
        let oldest = &mut learnt.oldest[kind];
        // A prediction close to 0 would make it infinite, which no JSON can say.
        learnt.ratios[kind][usize::from(*oldest)] = (us / predicted).min(f64::MAX);
        *oldest = (*oldest + 1) % 3;
        let [a, b, c] = learnt.ratios[kind];
        let ratio = a.max(b).min(a.min(b).max(c));
        let most = fixed.max(load);
        let moved = |factor: f64, part: f64| {
            (factor * ratio.powf(GAIN * part / most)).clamp(1.0 / FARTHEST, FARTHEST)
        };
        (learnt.fixed, learnt.load) = (moved(learnt.fixed, fixed), moved(learnt.load, load));
    }

    /// The correction factors: of decodes and base, of prompts.
    pub fn factors(&self) -> (f64, f64) {
        (self.learnt.fixed, self.learnt.load)
    }

    /// What was learnt, to go on with elsewhere.
    pub fn learnt(&self) -> Learnt {
        self.learnt
    }

    /// Goes on with what another model of the same costs has learnt.
    pub fn set_learnt(&mut self, learnt: Learnt) {
        self.learnt = learnt;
    }

    /// Predicted and measured time of the step measured last, in microseconds; 0 before the first.
    pub fn last(&self) -> (f64, f64) {
        (self.last_predicted, self.last_measured)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: CostModel =
        CostModel { token_us: 10.0, context_us_per_1k: 0.5, replay_factor: 0.5, restore_us: 1.0 };

    fn model() -> StepModel {
        StepModel::new(COST, StepCost { base_us: 1000.0, decode_us: 10.0, copy_us: 5.0 })
    }

    fn measure(m: &mut StepModel, step: u64, work: Work, us: f64) {
        m.expect(Step(step), work);
        m.observe(Step(step), us);
    }

    #[test]
    fn tokens_within_is_the_inverse_of_the_cost() {
        let mut m = model();
        m.learnt.load = 3.0;
        for (from, us) in [(0, 1e4), (0, 1e9), (1 << 20, 1e5), (5000, 17.0)] {
            for replay in [false, true] {
                let t = m.tokens_within(us, from, replay);
                assert!(m.learnt.load * m.load_work(from, from + t, replay) <= us * 1.000_001);
                assert!(m.learnt.load * m.load_work(from, from + t + 1, replay) > us);
            }
        }
        assert_eq!(m.tokens_within(-1.0, 0, false), 0);
    }

    #[test]
    fn a_device_three_times_slower_is_learnt_within_the_stated_steps() {
        let mut m = model();
        let work = Work { fixed_us: 2000.0, load_us: 8000.0 };
        for n in 1..=20u64 {
            measure(&mut m, n, work, 30_000.0);
            let error = (30_000.0 / m.predict(work)).ln().abs();
            let bound = 3f64.ln() * (1.0 - GAIN).powi(n as i32 - 2);
            assert!(error <= bound + 1e-9, "{n}: {error} {bound}");
        }
    }

    #[test]
    fn the_two_parts_are_told_apart_by_steps_that_differ() {
        let mut m = model();
        for n in 0..400u32 {
            let load_us = f64::from(n % 3) * 4000.0;
            let work = Work { fixed_us: 2000.0, load_us };
            measure(&mut m, u64::from(n), work, 2.0 * 2000.0 + 5.0 * load_us);
        }
        let (fixed, load) = m.factors();
        assert!((fixed - 2.0).abs() < 0.2 && (load - 5.0).abs() < 0.5, "{fixed} {load}");
    }

    #[test]
    fn odd_steps_and_garbage_change_nothing() {
        let mut m = model();
        let work = Work { fixed_us: 2000.0, load_us: 0.0 };
        (0..9).for_each(|n| measure(&mut m, n, work, 2000.0));
        let before = m.factors();
        measure(&mut m, 10, work, 2_000_000.0);
        measure(&mut m, 11, work, 2000.0);
        measure(&mut m, 12, work, 2000.0);
        for garbage in [f64::NAN, f64::INFINITY, -1.0, 0.0, 1e300] {
            measure(&mut m, 13, work, garbage);
        }
        m.observe(Step(999), 5.0);
        assert_eq!(m.factors(), before);
    }
}

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
//!
//! Steps of decodes and prompts say what both take together and little of either, so how long decodes take alone is
//! learnt from steps without prompts.

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

/// Time that a step with running decodes may take. Without them only the limit of tokens bounds a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum StepBudget {
    /// Any.
    #[default]
    Open,
    /// Microseconds.
    Fixed(f64),
    /// So many times as long as the decodes alone are predicted to take, which may be exceeded for the sake of the first
    /// `floor` tokens of prompts in a step: with fewer of them some devices are no faster.
    Decodes {
        /// Above 1.
        times: f64,
        /// Tokens.
        floor: u32,
    },
}

impl StepBudget {
    /// Microseconds, where the decodes alone take `decodes_us`; `None`: any.
    pub fn of(self, decodes_us: f64) -> Option<f64> {
        match self {
            StepBudget::Open => None,
            StepBudget::Fixed(us) => Some(us),
            StepBudget::Decodes { times, .. } => Some(times * decodes_us),
        }
    }

    /// Tokens of prompts that a step may take whatever their time.
    pub fn floor(self) -> u32 {
        if let StepBudget::Decodes { floor, .. } = self { floor } else { 0 }
    }

    /// Refuses what no step could keep.
    pub fn validate(&self) -> Result<(), CoreError> {
        let (name, value, least) = match *self {
            StepBudget::Open => return Ok(()),
            StepBudget::Fixed(us) => ("step_budget.fixed", us, 0.0),
            StepBudget::Decodes { times, .. } => ("step_budget.decodes.times", times, 1.0),
        };
        if value.is_finite() && value > least {
            return Ok(());
        }
        Err(CoreError::config(name, value, format!("it must be a number above {least}")))
    }
}

/// What a step costs besides its prompt tokens, in microseconds, before anything is measured.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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
    /// How much longer than predicted before correction decodes take alone; 0 until that was measured.
    alone: f64,
    /// The last three such ratios, the newest first; 0 is none.
    alone_ratios: [f64; 3],
}

impl Default for Learnt {
    fn default() -> Self {
        Learnt {
            fixed: 1.0,
            load: 1.0,
            ratios: [[1.0; 3]; 2],
            oldest: [0; 2],
            alone: 0.0,
            alone_ratios: [0.0; 3],
        }
    }
}

impl Learnt {
    /// A step of decodes took `ratio` times what was predicted before correction. The first three count as the least of
    /// them: the first step of a kind may have to compile or capture something.
    fn saw_decodes_alone(&mut self, ratio: f64) {
        let [a, b, _] = self.alone_ratios;
        self.alone_ratios = [ratio, a, b];
        let [_, b, c] = self.alone_ratios;
        self.alone = if b == 0.0 || c == 0.0 {
            if self.alone == 0.0 { ratio } else { ratio.min(self.alone) }
        } else {
            self.alone * (median(self.alone_ratios) / self.alone).powf(GAIN)
        };
    }

    /// Whether it can have been learnt: what is read from a dump may be anything.
    pub fn is_sound(&self) -> bool {
        let factors = [self.fixed, self.load].iter().all(|f| (1.0 / FARTHEST..=FARTHEST).contains(f));
        let ratios = self.ratios.iter().flatten().chain(&self.alone_ratios).chain([&self.alone]);
        let ratios = ratios.into_iter().all(|r| r.is_finite() && *r >= 0.0);
        factors && ratios && self.oldest.iter().all(|&at| at < 3)
    }
}

/// The cost model with its correction.
#[derive(Clone, Debug)]
pub struct StepModel {
    cost: CostModel,
    step: StepCost,
    learnt: Learnt,
    /// With it whether the step is of decodes alone.
    pending: VecDeque<(Step, Work, bool)>,
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

    /// Time of decodes without a prompt beside them, in microseconds: as steps of that kind took when they were last
    /// measured, else as predicted.
    pub fn decodes_us(&self, fixed_us: f64) -> f64 {
        if self.learnt.alone > 0.0 { self.learnt.alone * fixed_us } else { self.learnt.fixed * fixed_us }
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

    /// Remembers what a planned step will take, until it is measured. A step without decodes has `rows` 0.
    pub fn expect(&mut self, step: Step, work: Work, rows: u32) {
        if self.pending.len() == KEPT {
            self.pending.pop_front();
        }
        self.pending.push_back((step, work, rows > 0 && work.load_us == 0.0));
    }

    /// Forgets steps from `step` on: they were not run.
    pub fn forget_from(&mut self, step: Step) {
        self.pending.retain(|(s, ..)| *s < step);
    }

    /// A step took `us` microseconds. Steps that are not known, and times that cannot be, change nothing.
    pub fn observe(&mut self, step: Step, us: f64) {
        let Some(at) = self.pending.iter().position(|(s, ..)| *s == step) else { return };
        let (_, work, alone) = self.pending.remove(at).expect("it was found");
        let predicted = self.predict(work);
        if !(us > 0.0 && us <= LONGEST_US && predicted > 0.0) {
            return;
        }
        (self.last_predicted, self.last_measured) = (predicted, us);
        if alone {
            self.learnt.saw_decodes_alone((us / work.fixed_us).min(f64::MAX));
        }
        let learnt = &mut self.learnt;
        let (fixed, load) = (learnt.fixed * work.fixed_us, learnt.load * work.load_us);
        let kind = usize::from(load > fixed);
        let oldest = &mut learnt.oldest[kind];
        // A prediction close to 0 would make it infinite, which no JSON can say.
        learnt.ratios[kind][usize::from(*oldest)] = (us / predicted).min(f64::MAX);
        *oldest = (*oldest + 1) % 3;
        let ratio = median(learnt.ratios[kind]);
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

fn median([a, b, c]: [f64; 3]) -> f64 {
    a.max(b).min(a.min(b).max(c))
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
        m.expect(Step(step), work, 1);
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
    fn a_budget_follows_the_decodes_or_stands_by_itself() {
        let auto = StepBudget::Decodes { times: 4.0, floor: 512 };
        assert_eq!((auto.of(50.0), auto.floor()), (Some(200.0), 512));
        assert_eq!((StepBudget::Fixed(7.0).of(50.0), StepBudget::Fixed(7.0).floor()), (Some(7.0), 0));
        assert_eq!((StepBudget::Open.of(50.0), StepBudget::Open.floor()), (None, 0));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let e = StepBudget::Fixed(bad).validate().unwrap_err().to_string();
            assert!(
                e.starts_with("step_budget.fixed is ") && e.ends_with("it must be a number above 0"),
                "{e}"
            );
        }
        let e = StepBudget::Decodes { times: 1.0, floor: 0 }.validate().unwrap_err().to_string();
        assert_eq!(e, "step_budget.decodes.times is 1; it must be a number above 1");
        assert!(auto.validate().is_ok() && StepBudget::Open.validate().is_ok());
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
    fn how_long_decodes_take_alone_is_learnt_from_steps_without_prompts() {
        let mut m = model();
        assert_eq!(m.decodes_us(2000.0), 2000.0, "as predicted");
        let (decodes, mixed) =
            (Work { fixed_us: 2000.0, load_us: 0.0 }, Work { fixed_us: 2000.0, load_us: 8000.0 });
        measure(&mut m, 1, decodes, 3e6);
        measure(&mut m, 2, decodes, 6000.0);
        assert_eq!(m.decodes_us(2000.0), 6000.0, "the first had something to compile");
        (3..20).for_each(|n| measure(&mut m, n, decodes, 6000.0));
        (20..60).for_each(|n| measure(&mut m, n, mixed, 6000.0 + 3.0 * 8000.0));
        assert!((m.decodes_us(1000.0) - 3000.0).abs() < 1.0, "{}", m.decodes_us(1000.0));
        m.expect(Step(70), Work { fixed_us: 2000.0, load_us: 0.0 }, 0);
        m.observe(Step(70), 1e6);
        assert!((m.decodes_us(1000.0) - 3000.0).abs() < 1.0, "a step of copies says nothing of decodes");
        (80..100).for_each(|n| measure(&mut m, n, decodes, 2000.0));
        assert!((m.decodes_us(2000.0) - 2000.0).abs() < 50.0, "{}", m.decodes_us(2000.0));
        assert!(m.learnt().is_sound());
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

//! How long a step takes on a GPU: a roofline whose coefficients come from outside, all in microseconds.
//!
//! ```text
//!   step     = overhead + collective + collective_token * tokens + copy * copies
//!              + max(linear reads, linear arithmetic) + sum over rows of max(row's reads, row's arithmetic)
//!   linear   reads dense + experts * (1 - (1 - k / E)^tokens)          arithmetic token * tokens
//!   row      reads row_read + context_read * end + sum over ratios m of share[m] * entry_read * min(selected[m], end / m)
//!            arithmetic query * len + context * (sum of contexts) + sum over ratios m of share[m] * entry * selected[m]
//!   selected[m] = sum over the row's tokens of min(topk, context / m)
//! ```
//!
//! A row is a token in decode or a piece of a prompt: its tokens share what they read, not what they compute. Replayed
//! tokens are a piece of a prompt like any other.

use dsv4_core::cost::CostModel;
use dsv4_core::plan::{Field, Plan};
use dsv4_core::sched::budget::StepCost;
use serde::{Deserialize, Serialize};

/// Coefficients of one model on some GPUs. Times are us.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StepModel {
    /// Host and launches of a step.
    pub overhead_us: f64,
    /// Latency of all collectives of a step.
    pub collective_us: f64,
    /// Their transfer per token.
    pub collective_token_us: f64,
    /// Saving, restoring or copying one state.
    pub copy_us: f64,
    /// Reading all weights besides routed experts.
    pub dense_read_us: f64,
    /// Reading all routed experts.
    pub expert_read_us: f64,
    /// Routed experts of a layer.
    pub experts: f64,
    /// Of which a token takes.
    pub experts_per_token: f64,
    /// Linear layers, arithmetic of a token.
    pub token_us: f64,
    /// Reading the window and writing the new rows.
    pub row_read_us: f64,
    /// Reading index keys and the rows of layers without an index, per token of context.
    pub context_read_us: f64,
    /// Reading one selected row in all layers with an index.
    pub entry_read_us: f64,
    /// Attention over the window, per token.
    pub query_us: f64,
    /// Index scores and the rows of layers without an index, per token and token of context.
    pub context_us: f64,
    /// Attention over one selected row in all layers with an index.
    pub entry_us: f64,
    /// Rows that a token selects at most.
    pub topk: f64,
    /// The layers with an index, by ratio.
    pub indexed: Vec<Indexed>,
}

/// Layers that select rows of one ratio.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Indexed {
    /// Tokens of a row.
    pub ratio: f64,
    /// Which part of all layers with an index they are.
    pub share: f64,
}

/// A row of a step: `len` tokens from position `start`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// First position.
    pub start: u32,
    /// Tokens.
    pub len: u32,
}

/// Where the time of a step goes: what is always there, and pairs (reads, arithmetic) of which the larger one counts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Parts {
    /// Overhead, collectives and copies.
    pub fixed_us: f64,
    /// Linear layers first, then one pair per row.
    pub pairs: Vec<(f64, f64)>,
}

impl Parts {
    /// The step's time.
    pub fn total_us(&self) -> f64 {
        self.fixed_us + self.pairs.iter().map(|&(read, compute)| read.max(compute)).sum::<f64>()
    }
}

impl StepModel {
    /// Refuses numbers that no device has. The error names the field.
    pub fn validate(&self) -> Result<(), String> {
        let fields = serde_json::to_value(self).expect("a struct of numbers");
        let flat = fields.as_object().expect("a struct").iter().filter(|(_, value)| !value.is_array());
        let flat = flat.map(|(name, value)| (name.clone(), value.as_f64().unwrap_or(f64::NAN)));
        let ratios = self.indexed.iter().map(|x| ("ratio".to_owned(), x.ratio));
        let shares = self.indexed.iter().map(|x| ("share".to_owned(), x.share));
        for (name, value) in flat.chain(ratios).chain(shares) {
            let least = if matches!(name.as_str(), "ratio" | "experts") { 1.0 } else { 0.0 };
            if !(value >= least && value.is_finite()) {
                return Err(format!(
                    "step model: {name} is {value:?}; it must be a number of at least {least}"
                ));
            }
        }
        if self.experts_per_token > self.experts {
            let (k, all) = (self.experts_per_token, self.experts);
            return Err(format!("step model: experts_per_token is {k}; it must be at most experts ({all})"));
        }
        Ok(())
    }

    /// Where the time of a step with these rows and `copies` of states goes.
    pub fn parts(&self, rows: impl Iterator<Item = Row>, copies: u32) -> Parts {
        let (mut tokens, mut pairs) = (0.0, vec![(0.0, 0.0)]);
        for row in rows {
            tokens += f64::from(row.len);
            pairs.push(self.row(row));
        }
        let untouched = (1.0 - self.experts_per_token / self.experts).powf(tokens);
        pairs[0] = (self.dense_read_us + self.expert_read_us * (1.0 - untouched), self.token_us * tokens);
        let fixed_us = self.overhead_us
            + self.collective_us
            + self.collective_token_us * tokens
            + self.copy_us * f64::from(copies);
        Parts { fixed_us, pairs }
    }

    /// The time of a planned step.
    pub fn step_us(&self, plan: &Plan) -> f64 {
        let header = plan.header();
        let row =
            |r: usize| Row { start: plan[Field::row_start][r] as u32, len: plan[Field::row_len][r] as u32 };
        self.parts((0..header.rows as usize).map(row), header.copies).total_us()
    }

    fn row(&self, row: Row) -> (f64, f64) {
        let (start, end) = (f64::from(row.start), f64::from(row.start + row.len));
        let tokens = f64::from(row.len);
        let contexts = tokens * (start + end + 1.0) / 2.0;
        let mut read = self.row_read_us + self.context_read_us * end;
        let mut compute = self.query_us * tokens + self.context_us * contexts;
        for layers in &self.indexed {
            let selected = self.selected(start, end, layers.ratio);
            read += layers.share * self.entry_read_us * selected.min(end / layers.ratio);
            compute += layers.share * self.entry_us * selected;
        }
        (read, compute)
    }

    /// Rows that tokens `start..end` select: the integral of `min(topk, context / ratio)`.
    fn selected(&self, start: f64, end: f64, ratio: f64) -> f64 {
        let full = (self.topk * ratio).clamp(start, end);
        (full * full - start * start) / (2.0 * ratio) + self.topk * (end - full)
    }

    /// What the scheduler is told of it before anything is measured, for prompts that come in pieces of `chunk` tokens:
    /// a step's cost with one short decode in it, a decode's among 64, and a prompt token's at the start and far out.
    pub fn cost(&self, chunk: u32) -> (CostModel, StepCost) {
        const FAR: u32 = 1 << 18;
        const MANY: usize = 64;
        let decode = Row { start: 0, len: 1 };
        let total = |rows: &[Row]| self.parts(rows.iter().copied(), 0).total_us();
        let (base, many) = (total(&[decode]), total(&[decode; MANY]));
        let per_token = |start| (total(&[Row { start, len: chunk }]) - base).max(0.0) / f64::from(chunk);
        let (near, far) = (per_token(0), per_token(FAR));
        let cost = CostModel {
            token_us: near,
            context_us_per_1k: ((far - near) / f64::from(FAR) * 1000.0).max(0.0),
            replay_factor: 1.0,
            restore_us: self.copy_us,
        };
        let decode_us = ((many - base) / (MANY - 1) as f64).max(0.0);
        (cost, StepCost { base_us: base, decode_us, copy_us: self.copy_us })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Coefficients that are easy to add up.
    pub(crate) fn easy() -> StepModel {
        StepModel {
            overhead_us: 100.0,
            collective_us: 10.0,
            collective_token_us: 0.5,
            copy_us: 3.0,
            dense_read_us: 50.0,
            expert_read_us: 400.0,
            experts: 4.0,
            experts_per_token: 1.0,
            token_us: 1.0,
            row_read_us: 2.0,
            context_read_us: 0.01,
            entry_read_us: 0.1,
            query_us: 0.2,
            context_us: 0.001,
            entry_us: 0.004,
            topk: 8.0,
            indexed: vec![Indexed { ratio: 4.0, share: 1.0 }],
        }
    }

    #[test]
    fn a_decode_and_a_piece_of_a_prompt_add_up() {
        let rows = [Row { start: 999, len: 1 }, Row { start: 0, len: 100 }];
        let p = easy().parts(rows.into_iter(), 2);
        assert_eq!(p.fixed_us, 100.0 + 10.0 + 0.5 * 101.0 + 6.0);
        let touched = 1.0 - 0.75f64.powi(101);
        assert_eq!(p.pairs[0], (50.0 + 400.0 * touched, 101.0));
        // Decode: 8 of 250 rows are selected.
        assert!((p.pairs[1].0 - (2.0 + 10.0 + 0.8)).abs() < 1e-9);
        assert!((p.pairs[1].1 - (0.2 + 1.0 + 0.032)).abs() < 1e-9);
        // Prefill: the first 32 tokens select a quarter of their context, the others 8; all share 25 rows.
        let selected = 32.0 * 32.0 / 8.0 + 8.0 * 68.0;
        assert!((p.pairs[2].0 - (2.0 + 1.0 + 2.5)).abs() < 1e-9);
        assert!((p.pairs[2].1 - (20.0 + 5.05 + 0.004 * selected)).abs() < 1e-9);
        assert_eq!(p.total_us(), p.fixed_us + p.pairs.iter().map(|x| x.0.max(x.1)).sum::<f64>());
    }

    #[test]
    fn the_scheduler_hears_the_same_costs() {
        let (c, s) = easy().cost(1000);
        let step = |start, len| easy().parts([Row { start, len }].into_iter(), 0).total_us();
        assert_eq!(s.base_us, step(0, 1));
        assert!((s.base_us + c.token_us * 1000.0 - step(0, 1000)).abs() < 1e-6);
        // Far out a piece costs what the linear form says there.
        let far = s.base_us + 1000.0 * (c.token_us + c.context_us_per_1k * 262.144);
        assert!((far / step(1 << 18, 1000) - 1.0).abs() < 1e-6);
        c.validate().unwrap();
        s.validate().unwrap();
    }

    #[test]
    fn bad_coefficients_are_named() {
        assert_eq!(easy().validate(), Ok(()));
        let bad = StepModel { indexed: vec![Indexed { ratio: 0.0, share: 1.0 }], ..easy() };
        assert_eq!(
            bad.validate().unwrap_err(),
            "step model: ratio is 0.0; it must be a number of at least 1"
        );
        let bad = StepModel { experts: 2.0, experts_per_token: 3.0, ..easy() };
        assert!(
            bad.validate().unwrap_err().contains("experts_per_token is 3; it must be at most experts (2)")
        );
    }
}

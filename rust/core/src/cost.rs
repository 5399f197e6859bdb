//! What it costs to get a prompt going, and the cheapest way.
//!
//! For a prompt of `n` tokens with history up to `h` and saved states at `c <= h`:
//!
//! ```text
//!   snapshot c   restore_us               + compute(c, n)
//!   replay       replay_factor * compute(h - R, h) + compute(h, n)      (R = replay tokens; 0 is the lowest start)
//!   cold                                    compute(0, n)
//!   compute(a, b) = token_us * (b - a) + context_us_per_1k * (b² - a²) / 2000
//! ```
//!
//! All ways give the same tokens; only time differs.

use serde::{Deserialize, Serialize};

use crate::error::CoreError;
use crate::ids::SnapshotId;

/// Measured costs of the device, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CostModel {
    /// One prefill token.
    pub token_us: f64,
    /// What 1,000 tokens of context add to a token.
    pub context_us_per_1k: f64,
    /// A replayed token relative to a computed one. Every layer takes both, so they cost the same; 0 makes replays free.
    pub replay_factor: f64,
    /// Copying a saved state into a slab.
    pub restore_us: f64,
}

impl Default for CostModel {
    fn default() -> Self {
        CostModel { token_us: 100.0, context_us_per_1k: 0.1, replay_factor: 1.0, restore_us: 200.0 }
    }
}

/// How a request starts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// From the first token.
    Cold,
    /// From a saved state.
    Snapshot {
        /// Its position.
        pos: u32,
        /// Which one.
        id: SnapshotId,
    },
    /// By running `from..to` against the history up to `to`.
    Replay {
        /// First token to run.
        from: u32,
        /// Where the state is exact again.
        to: u32,
    },
}

impl Way {
    /// Tokens whose history is taken from the tree.
    pub fn resumed_at(self) -> u32 {
        match self {
            Way::Cold => 0,
            Way::Snapshot { pos, .. } => pos,
            Way::Replay { to, .. } => to,
        }
    }

    /// Tokens that are run again although their history is known.
    pub fn replayed(self) -> u32 {
        if let Way::Replay { from, to } = self { to - from } else { 0 }
    }

    /// The first position that is run.
    pub fn first(self) -> u32 {
        self.resumed_at() - self.replayed()
    }
}

impl CostModel {
    /// Refuses negative and non-finite values.
    pub fn validate(&self) -> Result<(), CoreError> {
        let fields = [
            ("token_us", self.token_us),
            ("context_us_per_1k", self.context_us_per_1k),
            ("replay_factor", self.replay_factor),
            ("restore_us", self.restore_us),
        ];
        match fields.into_iter().find(|(_, v)| !v.is_finite() || *v < 0.0) {
            Some((name, value)) => Err(CoreError::config(name, value, "it must be a number of at least 0")),
            None => Ok(()),
        }
    }

    /// Microseconds to compute positions `from..to`.
    pub fn compute(&self, from: u32, to: u32) -> f64 {
        let (a, b) = (f64::from(from), f64::from(to));
        self.token_us * (b - a) + self.context_us_per_1k * (b * b - a * a) / 2000.0
    }

    fn cost(&self, way: Way, n: u32) -> f64 {
        match way {
            Way::Cold => self.compute(0, n),
            Way::Snapshot { pos, .. } => self.restore_us + self.compute(pos, n),
            // From token 0 on it is a prompt that is read, and nothing is run twice.
            Way::Replay { from: 0, .. } => self.compute(0, n),
            Way::Replay { from, to } => self.replay_factor * self.compute(from, to) + self.compute(to, n),
        }
    }

    /// The cheapest way for a prompt of `n` tokens; of equals the one that shares most history.
    /// `snapshots` are (position, id), all at most `history`.
    pub fn cheapest(&self, n: u32, history: u32, snapshots: &[(u32, SnapshotId)], replay_tokens: u32) -> Way {
        let replay = Way::Replay { from: history.saturating_sub(replay_tokens), to: history };
        let saved = snapshots.iter().rev().map(|&(pos, id)| Way::Snapshot { pos, id });
        let mut best = (if history > 0 { replay } else { Way::Cold }, f64::INFINITY);
        for way in (history > 0).then_some(replay).into_iter().chain(saved).chain([Way::Cold]) {
            let cost = self.cost(way, n);
            if cost < best.1 {
                best = (way, cost);
            }
        }
        best.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: CostModel =
        CostModel { token_us: 1.0, context_us_per_1k: 0.0, replay_factor: 0.5, restore_us: 10.0 };

    #[test]
    fn the_cheapest_way_is_taken() {
        let near = [(900, SnapshotId(1)), (960, SnapshotId(2))];
        assert_eq!(COST.cheapest(1000, 960, &near, 200), Way::Snapshot { pos: 960, id: SnapshotId(2) });
        let far = [(100, SnapshotId(1))];
        assert_eq!(COST.cheapest(1000, 960, &far, 200), Way::Replay { from: 760, to: 960 });
        assert_eq!(COST.cheapest(1000, 0, &[], 200), Way::Cold);
        // Too little history to gain by replay: the pages are shared all the same.
        assert_eq!(COST.cheapest(1000, 96, &[], 200), Way::Replay { from: 0, to: 96 });
        let dear = CostModel { replay_factor: 9.0, restore_us: 1e9, ..COST };
        assert_eq!(dear.cheapest(1000, 960, &near, 200), Way::Cold);
    }

    #[test]
    fn context_makes_late_tokens_dear() {
        let c = CostModel { context_us_per_1k: 2.0, ..COST };
        assert_eq!(c.compute(0, 1000), 1000.0 + 1000.0);
        assert_eq!(c.compute(1000, 2000), 1000.0 + 3000.0);
    }

    #[test]
    fn bad_costs_are_refused_by_name() {
        let e = CostModel { restore_us: f64::NAN, ..COST }.validate().unwrap_err();
        assert_eq!(e.to_string(), "restore_us is NaN; it must be a number of at least 0");
    }
}

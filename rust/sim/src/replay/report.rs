//! What a replay tells at its end.

use serde::Serialize;

/// Everything, as JSON at the border. Tokens and times in ms unless said.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Requests of the trace.
    pub requests: u64,
    /// … that ran to their end.
    pub finished: u64,
    /// … that could never fit, and the first such refusal.
    pub refused: u64,
    /// The first refusal.
    pub first_refusal: Option<String>,
    /// From the first arrival to the last token; 0 in sequential runs.
    pub virtual_s: f64,
    /// Of which the device was in a step.
    pub busy_s: f64,
    /// Steps.
    pub steps: u64,
    /// Hash of all events and their times: the same run has the same hash.
    pub event_hash: String,
    /// Counts of tokens.
    pub tokens: Tokens,
    /// Shares of all prompt tokens.
    pub hits: Hits,
    /// Tokens in whole blocks that were run, by reason.
    pub lost: Vec<(String, u64)>,
    /// Prompt tokens run for want of a state, by the state that was missing.
    pub stateless: Stateless,
    /// Saved states.
    pub snapshots: Snapshots,
    /// The pool.
    pub pool: Pool,
    /// Time to first token.
    pub ttft_ms: Quantiles,
    /// Time between tokens of a request.
    pub itl_ms: Quantiles,
    /// Output tokens of the whole run per second of it.
    pub output_tokens_per_s: f64,
    /// Running requests that gave way for want of pages.
    pub preemptions: u64,
    /// Who got what.
    pub tenants: Vec<Tenant>,
    /// Jain's index of the tenants' rates while they competed: 1 is equal, `1 / tenants` is all to one.
    pub jain: f64,
    /// Over time.
    pub timeline: Timeline,
    /// Stored blocks that went.
    pub evicted_blocks: u64,
}

/// Counts of tokens.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Tokens {
    /// Of admitted prompts.
    pub prompt: u64,
    /// … in whole blocks, which is what caches are compared by.
    pub whole_blocks: u64,
    /// … whose history was stored.
    pub matched: u64,
    /// … whose history was used.
    pub resumed: u64,
    /// … that were not run.
    pub cached: u64,
    /// Run again against stored history to rebuild state.
    pub replayed: u64,
    /// Run again after a preemption.
    pub recomputed: u64,
    /// Sampled.
    pub output: u64,
    /// Run in all.
    pub run: u64,
}

/// Shares of all prompt tokens.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Hits {
    /// Not run: the token hit rate.
    pub cached: f64,
    /// History stored.
    pub matched: f64,
    /// History used, replayed parts included.
    pub resumed: f64,
    /// Stored and yet run, for want of a saved state.
    pub without_state: f64,
    /// With memory for everything, in the order of admission. `None` where prompts are not known.
    pub unlimited: Option<f64>,
    /// Upper bound for this pool, see `best.rs`.
    pub best_for_pool: Option<f64>,
}

/// Which state was missing, in prompt tokens that were run for want of it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Stateless {
    /// At the end of an earlier prompt: its output was rewritten.
    pub prompt_end: u64,
    /// At the end of an earlier output.
    pub output_end: u64,
    /// Anywhere else, such as where prompts branch.
    pub elsewhere: u64,
}

/// Saved states.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Snapshots {
    /// Stored.
    pub taken: u64,
    /// Resumed from.
    pub used: u64,
    /// Evicted.
    pub evicted: u64,
    /// At the end.
    pub held: u64,
    /// Largest share of the pool that they took.
    pub peak_share: f64,
    /// Mean of their bytes relative to the stored history's, over time.
    pub mean_of_history: f64,
}

/// The pool.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Pool {
    /// Pages.
    pub pages: u64,
    /// Bytes of one.
    pub page_bytes: u64,
    /// Tokens of one.
    pub block_tokens: u64,
    /// Pages of a snapshot.
    pub snapshot_pages: u64,
}

/// A distribution.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Quantiles {
    /// Values.
    pub count: u64,
    /// Mean.
    pub mean: f64,
    /// Half are at most this.
    pub p50: f64,
    /// Nine tenths.
    pub p90: f64,
    /// 99 of 100.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

impl Quantiles {
    /// Of `values`, which are reordered. A quantile is the smallest value that at least its share does not exceed.
    pub fn of(values: &mut [f32]) -> Self {
        if values.is_empty() {
            return Quantiles::default();
        }
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / values.len() as f64;
        values.sort_unstable_by(f32::total_cmp);
        let at = |q: f64| {
            f64::from(values[((q * values.len() as f64).ceil() as usize).clamp(1, values.len()) - 1])
        };
        Quantiles {
            count: values.len() as u64,
            mean,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// What a tenant got.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Tenant {
    /// As in the trace.
    pub name: String,
    /// Requests that ended.
    pub requests: u64,
    /// Tokens run for it.
    pub served: u64,
    /// Prompt tokens.
    pub prompt: u64,
    /// Of which not run.
    pub cached: u64,
    /// Time in which it and another one had live requests.
    pub contended_s: f64,
    /// Tokens run for it per second of that time, divided by its weight.
    pub rate: f64,
    /// Time to first token.
    pub ttft_ms: Quantiles,
}

/// Jain's index of fairness.
pub fn jain(rates: &[f64]) -> f64 {
    let (sum, squares) = (rates.iter().sum::<f64>(), rates.iter().map(|x| x * x).sum::<f64>());
    if squares == 0.0 { 1.0 } else { sum * sum / (rates.len() as f64 * squares) }
}

/// The same moments of several series.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Timeline {
    /// Seconds since the first arrival; in sequential runs requests done.
    pub at: Vec<f64>,
    /// Bytes of stored history.
    pub history: Vec<u64>,
    /// Bytes of saved states.
    pub snapshot: Vec<u64>,
    /// Bytes of running requests that are not stored, and what waits for a step to end.
    pub live: Vec<u64>,
    /// Bytes of nobody.
    pub free: Vec<u64>,
    /// Prompt tokens admitted so far.
    pub prompt: Vec<u64>,
    /// … not run.
    pub cached: Vec<u64>,
    /// Requests running.
    pub running: Vec<u64>,
    /// Requests waiting.
    pub waiting: Vec<u64>,
}

impl Timeline {
    /// Moments kept; when there are more, every other one is dropped.
    pub const MOST: usize = 2048;

    /// Drops every other moment.
    pub fn thin(&mut self) {
        fn halve<T: Copy>(v: &mut Vec<T>) {
            *v = v.iter().copied().skip(1).step_by(2).collect();
        }
        halve(&mut self.at);
        let series = [&mut self.history, &mut self.snapshot, &mut self.live, &mut self.free];
        series.into_iter().for_each(halve);
        let series = [&mut self.prompt, &mut self.cached, &mut self.running, &mut self.waiting];
        series.into_iter().for_each(halve);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_fairness_by_definition() {
        let mut values: Vec<f32> = (1..=200).rev().map(|v| v as f32).collect();
        let q = Quantiles::of(&mut values);
        assert_eq!((q.count, q.mean, q.p50, q.p90, q.p99, q.max), (200, 100.5, 100.0, 180.0, 198.0, 200.0));
        assert_eq!(Quantiles::of(&mut [7.0]).p99, 7.0);
        assert_eq!(Quantiles::of(&mut []), Quantiles::default());
        assert_eq!((jain(&[2.0, 2.0, 2.0]), jain(&[1.0, 0.0]), jain(&[])), (1.0, 0.5, 1.0));
    }
}

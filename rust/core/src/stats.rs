//! Counters and gauges, taken at one moment.

use crate::explain::Reason;

/// Counters of the scheduler; they only grow.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Steps committed.
    pub steps: u64,
    /// Requests that looked for a prefix (first admissions).
    pub prefix_queries: u64,
    /// Their prompt tokens.
    pub prompt_tokens: u64,
    /// … with history in the tree.
    pub matched_tokens: u64,
    /// … whose history was used.
    pub resumed_tokens: u64,
    /// Tokens run again to rebuild state, at every admission.
    pub replayed_tokens: u64,
    /// Tokens computed again because a preemption or rollback lost them.
    pub recomputed_tokens: u64,
    /// Running requests that lost their slab for want of pages.
    pub preemptions: u64,
    /// Steps rolled back.
    pub rollbacks: u64,
    /// Requests that ended, aborted ones included.
    pub finished: u64,
    /// Requests aborted.
    pub aborts: u64,
    /// Prompt tokens in whole blocks that had to be run, by reason, in the order of [`Reason::ALL`].
    pub lost: [u64; Reason::ALL.len()],
}

/// Everything that `stats()` tells: names and values.
pub type Stats = Vec<(String, u64)>;

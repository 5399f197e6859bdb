//! Counters and gauges, taken at one moment.

use crate::core::Core;
use crate::sched::explain::Reason;
pub use crate::sched::requests::shares::Share;

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
    /// … of them with their state saved.
    pub preempted_with_state: u64,
    /// Parked requests whose saved state was taken from them.
    pub parked_lost: u64,
    /// Parked requests that went on from their saved state.
    pub unparked: u64,
    /// Requests that started from the live state of another.
    pub forks: u64,
    /// First tokens that came after their deadline.
    pub deadline_misses: u64,
    /// Steps rolled back.
    pub rollbacks: u64,
    /// Rows of which `commit` accepted nothing.
    pub rows_refused: u64,
    /// Requests that ended, aborted ones included.
    pub finished: u64,
    /// Requests aborted.
    pub aborts: u64,
    /// Prompt tokens in whole blocks that had to be run, by reason, in the order of [`Reason::ALL`].
    pub lost: [u64; Reason::ALL.len()],
    /// Prompt tokens that were run although their history was stored, by the state that was missing: at the end of an earlier
    /// prompt, at the end of its output, or elsewhere.
    pub stateless: [u64; 3],
}

/// Everything that `stats()` tells: names and values.
pub type Stats = Vec<(String, u64)>;

/// See [`Core::stats`].
pub(crate) fn stats_of(core: &Core) -> Stats {
    let (c, cache, requests) = (&core.journal.counters, core.memory.cache(), &core.requests);
    let (k, waited) = (cache.counters(), requests.counts());
    let snapshot_pages = u64::from(cache.snapshots()) * u64::from(core.memory.snapshot_pages());
    let (predicted, measured) = core.pace.last();
    let named = [
        ("pages", cache.pages().into()),
        ("free_pages", cache.free_pages().into()),
        ("available_pages", cache.available().into()),
        ("cached_pages", cache.cached_blocks().into()),
        ("snapshot_pages", snapshot_pages),
        ("deferred_pages", cache.leaving_pages().into()),
        ("slabs", core.memory.slabs().total().into()),
        ("free_slabs", core.memory.slabs().free().into()),
        ("waiting", requests.waiting_count() as u64),
        ("running", requests.running_count().into()),
        ("in_flight", core.flights.len() as u64),
        ("snapshots", cache.snapshots().into()),
        ("snapshots_taken", k.snapshots_taken),
        ("snapshots_used", k.snapshots_used),
        ("snapshots_evicted", k.snapshots_evicted),
        ("snapshots_declined", k.snapshots_declined),
        ("pinned_pages", cache.pinned_pages().into()),
        ("zero_hit_warnings", core.journal.zero_hits.warnings()),
        ("evicted_blocks", k.evicted_blocks),
        ("adopted_blocks", k.adopted_blocks),
        ("prefix_queries", c.prefix_queries),
        ("prompt_tokens", c.prompt_tokens),
        ("matched_tokens", c.matched_tokens),
        ("resumed_tokens", c.resumed_tokens),
        ("replayed_tokens", c.replayed_tokens),
        ("recomputed_tokens", c.recomputed_tokens),
        ("preemptions", c.preemptions),
        ("preempted_with_state", c.preempted_with_state),
        ("parked", requests.parked_count() as u64),
        ("parked_lost", c.parked_lost),
        ("unparked", c.unparked),
        ("forks", c.forks),
        ("aged", waited.aged),
        ("passed", waited.passed),
        ("pins_broken", core.memory.pins_broken()),
        ("deadline_misses", c.deadline_misses),
        ("deadlines_hopeless", waited.deadlines_hopeless),
        ("step_predicted_us", predicted as u64),
        ("step_measured_us", measured as u64),
        ("step_budget_us", core.pace.planned_budget_us() as u64),
        ("rollbacks", c.rollbacks),
        ("rows_refused", c.rows_refused),
        ("steps", c.steps),
        ("stateless_prompt_end", c.stateless[0]),
        ("stateless_output_end", c.stateless[1]),
        ("stateless_elsewhere", c.stateless[2]),
        ("aborts", c.aborts),
        ("finished", c.finished),
    ];
    let lost = Reason::ALL.into_iter().zip(c.lost).skip(1);
    let lost = lost.map(|(reason, tokens)| (format!("lost_{}", reason.name()), tokens));
    named.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(lost).collect()
}

//! What is told of the requests: events, explanations, counters.

use crate::event::{Event, Events, What};
use crate::ids::{RequestId, Step};
use crate::sched::explain::{Archive, Explain, ZeroHits};
use crate::stats::Counters;

/// All that is written and never read by the scheduler.
#[derive(Debug, Default)]
pub struct Journal {
    events: Events,
    archive: Archive,
    /// Counters that only grow.
    pub counters: Counters,
    /// Prefixes that come again and never hit.
    pub zero_hits: ZeroHits,
}

impl Journal {
    /// Something happened to a request.
    pub fn push(&mut self, request: RequestId, step: Step, what: What) {
        self.events.push(request, step, what);
    }

    /// The oldest event that nobody has fetched.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop()
    }

    /// Fills `out` with events and returns how many.
    pub fn events_into(&mut self, out: &mut [i64]) -> usize {
        self.events.drain_into(out)
    }

    /// A request has ended; its explanation is kept for a while.
    pub fn keep(&mut self, id: RequestId, explain: Explain) {
        self.archive.keep(id, explain);
    }

    /// The explanation of a request that has ended.
    pub fn explain(&self, id: RequestId) -> Option<Explain> {
        self.archive.get(id)
    }

    /// Drops an explanation. Whether it was there.
    pub fn forget(&mut self, id: RequestId) -> bool {
        self.archive.forget(id)
    }
}

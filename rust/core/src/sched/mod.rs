//! The scheduler: what runs in the next step, and what follows from its result.
//!
//! | file | does |
//! | --- | --- |
//! | `requests/` | who is live: the table, the queue, fairness, tenants' shares |
//! | `memory/` | what they compute in: the cache, slabs, pins, fences |
//! | `pace.rs` | the clock and what a step will take (`budget.rs`) |
//! | `flights.rs` | steps in flight |
//! | `planner/` | the next step, from the four above |
//! | `commit.rs` | results and rollbacks; `ends.rs` how a stay in a slab ends |
//! | `request.rs` | a request and its stages, `tokens.rs` its tokens, `explain.rs` what of it was reused |
//! | `policy.rs` | where saved states are worth taking |
//! | `journal.rs` | events, explanations, counters |
//! | `check.rs` | every invariant from scratch |
//!
//! The rules and their bounds are in docs/scheduling.md.
//!
//! **Why it cannot deadlock.** Running requests are in order of rank. A prompt gets all its pages when it is admitted, so
//! only decode can run short. Then the last in order gives way, never a request before the one in need. The first in order
//! is therefore never stopped by another; alone, everything else in the pool can be evicted, and `submit` has refused what
//! is larger than the pool. Pages that wait for a step in flight are waited for before anyone gives way.

pub mod budget;
pub(crate) mod check;
pub(crate) mod commit;
pub(crate) mod ends;
pub mod explain;
pub(crate) mod flights;
pub(crate) mod journal;
pub(crate) mod memory;
pub(crate) mod pace;
pub(crate) mod planner;
pub mod policy;
pub mod request;
pub mod requests;
mod tokens;

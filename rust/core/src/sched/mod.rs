//! The scheduler: what runs in the next step, and what follows from its result.
//!
//! | file | does |
//! | --- | --- |
//! | `step.rs` | `plan`: decode rows first, then pieces of prompts within the step's time |
//! | `fairness.rs` | whose prompt is next; `queue.rs` who waits, in what order; `shares.rs` what tenants were served |
//! | `admit.rs` | a waiting request gets a slab, pages and the cheapest way to start |
//! | `memory.rs` | pages for decode; what gives way when there are none |
//! | `park.rs` | giving way with the state saved; `fork.rs` starting from the state of another |
//! | `commit.rs` | `commit` and `rollback`: results, tokens, ends |
//! | `table.rs` | live requests and their order; `slabs.rs` live-state slabs; `flight.rs` steps in flight |
//! | `request.rs` | a request and its states, `tokens.rs` its tokens, `explain.rs` what of it was reused |
//! | `budget.rs` | what a step will take; `policy.rs` where saved states are worth taking |
//!
//! The rules and their bounds are in docs/scheduling.md.
//!
//! **Why it cannot deadlock.** Running requests are in order of rank. A prompt gets all its pages when it is admitted, so
//! only decode can run short. Then the last in order gives way, never a request before the one in need. The first in order
//! is therefore never stopped by another; alone, everything else in the pool can be evicted, and `submit` has refused what
//! is larger than the pool. Pages that wait for a step in flight are waited for before anyone gives way.

pub(crate) mod admit;
pub mod budget;
mod check;
mod commit;
pub mod explain;
mod fairness;
pub(crate) mod flight;
mod fork;
mod memory;
pub(crate) mod park;
pub mod policy;
pub mod queue;
pub mod request;
pub mod shares;
pub(crate) mod slabs;
mod step;
pub(crate) mod table;
mod tokens;

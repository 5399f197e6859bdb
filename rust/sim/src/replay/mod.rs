//! Replays a request trace against the real core in virtual time.
//!
//! | file | holds |
//! | --- | --- |
//! | `trace.rs` | the trace format, and the tokens that hash ids stand for |
//! | `clock.rs` | how long a step takes on a GPU |
//! | `run.rs` | arrivals, steps and events: `Core::plan` and `Core::commit` as the engine calls them |
//! | `best.rs` | hits with unlimited memory, and the best possible for a pool |
//! | `report.rs` | what is told at the end |

pub mod best;
pub mod clock;
pub mod report;
pub mod run;
pub mod trace;

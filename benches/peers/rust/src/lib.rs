//! Prefix caches side by side: dsv4's, a floor, and what public crates offer, over the same tokens.
//!
//! | file | responsibility |
//! | --- | --- |
//! | `workload.rs` | tokens, and request traces |
//! | `systems.rs` | what a cache must do to be compared; dsv4's and the floor |
//! | `dynamo.rs`, `kvbm.rs` | public crates, each behind a feature |
//! | `step.rs` | steps of dsv4's scheduler |
//! | `measure.rs` | medians, bytes on the heap, results as JSON lines |
//! | `ffi.rs` | dsv4's cache for the Python peers, to be timed in their process |

#[cfg(feature = "dynamo")]
pub mod dynamo;
pub mod ffi;
#[cfg(feature = "kvbm")]
pub mod kvbm;
pub mod measure;
pub mod step;
pub mod systems;
pub mod workload;

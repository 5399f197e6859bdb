//! The core of dsv4: which token is computed when, and where its state lies.
//!
//! ```text
//!   submit ─▶ Core ─ plan ─▶ a plan for the device        commit ─▶ tokens, events
//!              │
//!              ├── sched    request states, batching, chunks, preemption
//!              └── cache    radix tree · page pool · snapshots
//!                            └── layout   all geometry, as data
//! ```
//!
//! It knows no Python, no torch, no clock, no randomness and no I/O: the same calls give the same plans.
#![forbid(unsafe_code)]

pub mod budget;
pub mod cache;
pub mod core;
pub mod cost;
mod dump;
pub mod error;
pub mod event;
pub mod eviction;
pub mod explain;
pub mod fence;
mod ghosts;
pub mod ids;
pub mod layout;
pub mod mutant;
mod options;
mod order;
pub mod plan;
pub mod policy;
pub mod pool;
pub mod request;
pub mod retention;
mod reuse;
mod sched;
pub mod snapshot;
pub mod stats;
mod tokens;
mod tree;

pub use crate::core::{Core, Options};

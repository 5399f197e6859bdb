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

pub mod cache;
pub mod core;
pub mod cost;
mod dump;
pub mod error;
pub mod event;
pub mod fence;
pub mod ids;
pub mod layout;
mod options;
pub mod plan;
pub mod sched;
pub mod stats;

pub use crate::core::{Core, Options};

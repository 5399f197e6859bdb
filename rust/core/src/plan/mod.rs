//! A plan: what a step does, as one buffer of 32-bit words. It belongs to the caller; the core writes into it and keeps
//! nothing, so any number of buffers may take turns.
//!
//! ```text
//!   header │ rows │ tokens │ deltas │ copies        sections; a field is a column of one of them
//! ```
//!
//! | file | holds |
//! | --- | --- |
//! | `schema.rs` | every field, declared once, and where it lies for given limits |
//! | `buffer.rs` | views of a buffer by field; a buffer with its schema |
//! | `writer.rs` | fills a buffer with one step |

mod buffer;
mod schema;
mod writer;

pub use buffer::{Plan, StateCopy, Views};
pub use schema::{Field, FieldPlace, Limits, Schema, Section, StepHeader};
pub use writer::{PlanWriter, Row};

/// The state starts empty: clear the slab's pools before the row runs.
pub const RESET: i32 = 1;
/// Logits of every token of the row are wanted.
pub const ALL_LOGITS: i32 = 4;
/// The row rebuilds state and writes no history.
pub const REPLAY: i32 = 8;
/// One token after the prompt.
pub const DECODE: i32 = 16;

/// What is copied between slabs and pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(i32)]
pub enum CopyKind {
    /// A slab, and the page that is not full yet, to another slab and page.
    Fork = 0,
    /// A saved state from its pages into a slab.
    Restore = 1,
    /// A slab's state into pages.
    Save = 2,
}

/// Numbers that a plan is written in, by name.
pub const CONSTANTS: [(&str, i32); 7] = [
    ("RESET", RESET),
    ("ALL_LOGITS", ALL_LOGITS),
    ("REPLAY", REPLAY),
    ("DECODE", DECODE),
    ("FORK", CopyKind::Fork as i32),
    ("RESTORE", CopyKind::Restore as i32),
    ("SAVE", CopyKind::Save as i32),
];

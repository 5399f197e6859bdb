//! What the core remembers of a step until it is committed or rolled back.

use crate::ids::Step;
use crate::policy::Keep;
use crate::sched::table::Slot;
use crate::snapshot::SnapshotPages;

/// One row of a step in flight.
#[derive(Clone, Copy, Debug)]
pub struct FlightRow {
    /// The request's slot.
    pub slot: Slot,
    /// Its stay; another one means that the row's result no longer counts.
    pub epoch: u64,
    /// Tokens computed when the row is done.
    pub end: u32,
    /// Its last token is sampled.
    pub samples: bool,
    /// It is a piece of a prompt.
    pub prefill: bool,
    /// It saves its state at `end`; the pages are the next ones in `saves`.
    pub saves: bool,
}

/// A state being saved.
#[derive(Debug)]
pub struct Save {
    /// Where it goes when the step is committed.
    pub keep: Keep,
    /// The pages that are written.
    pub pages: SnapshotPages,
}

/// A step between plan and commit.
#[derive(Debug, Default)]
pub struct Flight {
    /// Its number.
    pub step: Step,
    /// Its rows in order.
    pub rows: Vec<FlightRow>,
    /// Its saves in order of rows.
    pub saves: Vec<Save>,
    /// Requests that it parks.
    pub parks: Vec<Slot>,
    /// Requests whose slab it copies from another's, with the stay.
    pub forks: Vec<(Slot, u64)>,
    /// Tokens that `commit` must bring.
    pub samples: u32,
}

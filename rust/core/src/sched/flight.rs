//! What the core remembers of a step until it is committed or rolled back.

use crate::cache::snapshot::SnapshotPages;
use crate::error::CoreError;
use crate::ids::{Step, Ticket};
use crate::sched::policy::Keep;
use crate::sched::table::Slot;

/// One row of a step in flight.
#[derive(Clone, Copy, Debug)]
pub struct FlightRow {
    /// The request's slot.
    pub slot: Slot,
    /// Its stay; another one means that the row's result no longer counts.
    pub epoch: u64,
    /// Tokens computed when the row is done.
    pub end: u32,
    /// Tokens that it samples: none or one, as the planner asks for no more.
    pub samples: u32,
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
    /// Requests that it parks, with the copy that saves their state.
    pub parks: Vec<(Slot, Ticket)>,
    /// Requests whose slab it copies from another's, with the stay.
    pub forks: Vec<(Slot, u64)>,
    /// Its copies, and those of steps rolled back after it, ascending.
    pub tickets: Vec<Ticket>,
    /// Tokens that `commit` must bring.
    pub samples: u32,
    /// Rows that they come from.
    pub sampled_rows: u32,
}

impl Flight {
    /// Refuses a result of another shape. Whether all that was sampled is accepted.
    pub fn check_result(&self, tokens: &[u32], accepted: &[i32]) -> Result<bool, CoreError> {
        let (step, wanted) = (self.step.0, self.samples as usize);
        if wanted != tokens.len() {
            return Err(CoreError::WrongTokenCount { step, expected: wanted, got: tokens.len() });
        }
        let expected = self.sampled_rows as usize;
        if expected != accepted.len() {
            return Err(CoreError::WrongAcceptedCount { step, expected, got: accepted.len() });
        }
        if accepted.len() == tokens.len() && accepted.iter().all(|&count| count == 1) {
            return Ok(true);
        }
        let sampled = self.rows.iter().enumerate().filter(|(_, of)| of.samples > 0);
        let mut wrong =
            sampled.zip(accepted).filter(|((_, of), count)| !(0..=of.samples as i32).contains(count));
        match wrong.next() {
            Some(((row, of), &accepted)) => {
                Err(CoreError::WrongAccepted { step, row, sampled: of.samples, accepted })
            }
            None => Ok(false),
        }
    }
}

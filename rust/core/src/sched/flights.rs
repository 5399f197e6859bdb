//! Steps in flight: what is remembered of each until it is committed or rolled back.

use std::collections::VecDeque;

use crate::cache::snapshot::SnapshotPages;
use crate::error::CoreError;
use crate::fence::Until;
use crate::ids::{Step, Ticket};
use crate::sched::policy::Keep;
use crate::sched::requests::Slot;

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

/// The steps in flight, oldest first.
#[derive(Debug)]
pub struct Flights {
    line: VecDeque<Flight>,
    /// Ended ones, whose memory is used again.
    spare: Vec<Flight>,
    /// The last step planned.
    last: Step,
    most: usize,
}

impl Flights {
    /// None; at most so many at a time.
    pub fn new(most: u32) -> Self {
        Flights { line: VecDeque::new(), spare: Vec::new(), last: Step(0), most: most as usize }
    }

    /// An empty flight for the next step. Fails when as many are in flight as may be.
    pub fn begin(&mut self) -> Result<Flight, CoreError> {
        let step = Step(self.last.0 + 1);
        if self.line.len() == self.most {
            return Err(self.wrong_step(step, "planned"));
        }
        Ok(Flight { step, ..self.spare.pop().unwrap_or_default() })
    }

    /// Nothing came of the step; what it opened goes into the next one.
    pub fn put_back(&mut self, flight: Flight) {
        self.spare.push(flight);
    }

    /// The step is planned.
    pub fn launch(&mut self, flight: Flight) {
        self.last = flight.step;
        self.line.push_back(flight);
    }

    /// The oldest in flight, which must be this step.
    pub fn oldest(&self, step: Step) -> Result<&Flight, CoreError> {
        let oldest = self.line.front().filter(|f| f.step == step);
        oldest.ok_or_else(|| self.wrong_step(step, "committed"))
    }

    /// Takes the oldest.
    pub fn land(&mut self) -> Option<Flight> {
        self.line.pop_front()
    }

    /// This step and later ones, the newest first.
    pub fn take_from(&mut self, step: Step) -> Result<Vec<Flight>, CoreError> {
        let at = self.line.iter().position(|f| f.step == step);
        let at = at.ok_or_else(|| self.wrong_step(step, "rolled back"))?;
        Ok(self.line.drain(at..).rev().collect())
    }

    /// Copies of steps that were rolled back: what they would have touched may still be in use by the step before. Returns
    /// those for which there is none.
    pub fn inherit(&mut self, mut tickets: Vec<Ticket>) -> Vec<Ticket> {
        if let Some(before) = self.line.back_mut() {
            before.tickets.append(&mut tickets);
        }
        tickets
    }

    /// Keeps the memory of one that has ended.
    pub fn recycle(&mut self, mut flight: Flight) {
        flight.rows.clear();
        flight.saves.clear();
        flight.parks.clear();
        flight.forks.clear();
        flight.tickets.clear();
        self.spare.push(flight);
    }

    /// The last step planned.
    pub fn last(&self) -> Step {
        self.last
    }

    /// What is given back now may be in use until the last step planned is over.
    pub fn fence(&self) -> Until {
        Until::Step(self.last)
    }

    /// All steps up to this one are over.
    pub fn done(&self) -> Step {
        self.line.front().map_or(self.last, |f| Step(f.step.0 - 1))
    }

    /// Oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Flight> {
        self.line.iter()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.line.len()
    }

    /// Whether none is in flight.
    pub fn is_empty(&self) -> bool {
        self.line.is_empty()
    }

    fn wrong_step(&self, step: Step, action: &'static str) -> CoreError {
        CoreError::WrongStep { step: step.0, action, in_flight: self.iter().map(|f| f.step.0).collect() }
    }
}

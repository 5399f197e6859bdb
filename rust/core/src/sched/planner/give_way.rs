//! Pages for the next token, and who gives way when there are none.
//!
//! Whoever gives way keeps its state where there is memory for it: the slab is copied into pages of the pool at the request's
//! position; the request waits with these pages and its history, and goes on from there with nothing run again. A state at
//! a block boundary is a snapshot; anywhere else it is the whole slab (`LayoutSpec::slab_pages`). Others who need memory may
//! take what a parked request holds, the most junior one's first: then it resumes through the tree like any other.

use super::Planner;
use crate::error::CoreError;
use crate::event::{Loss, What};
use crate::sched::ends::{lose, unpark};
use crate::sched::request::{Parked, Run, Start};
use crate::sched::requests::Slot;

/// What came of parking a request.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Parking {
    Done,
    /// Not now, but when the steps in flight are over.
    Later,
    /// There is no memory for it; nothing has changed.
    NoRoom,
}

impl Planner<'_, '_> {
    /// A page for the next token of a request in decode. False: it cannot run in this step, because pages that it will
    /// get are still in use by steps in flight, or because it had to give way itself.
    pub(super) fn secure_page(&mut self, slot: Slot) -> Result<bool, CoreError> {
        loop {
            let core = &mut *self.core;
            let Some(run) = core.requests.run_mut(slot) else { return Ok(false) };
            if core.memory.extend(&mut run.seq, run.planned + 1).is_ok() {
                return Ok(true);
            }
            let saving = core.flights.iter().chain([&self.flight]).any(|f| !f.saves.is_empty());
            let parking = core.flights.iter().any(|f| !f.parks.is_empty());
            if saving || parking || core.memory.has_leaving() {
                return Ok(false);
            }
            if self.reclaim_parked(None) || self.drop_a_spare() {
                continue;
            }
            let core = &mut *self.core;
            let (&[.., last], in_flight) = (core.requests.running(), !core.flights.is_empty()) else {
                return Ok(false);
            };
            if core.requests.running_count() == 1 {
                if !self.flight.parks.is_empty() {
                    return Ok(false);
                }
                if !in_flight && core.memory.break_pin() {
                    continue;
                }
                assert!(in_flight, "a request that fits into the pool ran short of pages alone");
                return Ok(false);
            }
            self.gave_way = true;
            match self.park(last, Loss::Memory, 1)? {
                Parking::Done => {}
                Parking::NoRoom => lose(self.core, last, Loss::Memory)?,
                Parking::Later => {
                    self.held = Some(last);
                    return Ok(false);
                }
            }
            if last == slot {
                return Ok(false);
            }
        }
    }

    /// Gives up a state kept aside, of the last in order that has one. The very last keeps it: it is the next to give way,
    /// and will go on from there.
    fn drop_a_spare(&mut self) -> bool {
        let requests = &self.core.requests;
        let saved = |slot: &&Slot| requests.get(**slot).run().is_some_and(|run| run.spare.is_some());
        let rest = requests.running().split_last().map_or(&[][..], |(_, rest)| rest);
        let found = rest.iter().rev().find(saved).or_else(|| requests.running().first().filter(saved));
        let Some(&slot) = found else { return false };
        let spare = self.core.requests.run_mut(slot).and_then(|run| run.spare.take());
        self.core.memory.drop_states(spare.map(|(_, pages)| pages), self.core.flights.fence());
        true
    }

    /// Whether the slab of a running request holds its state, and no step in flight has anything to do with it.
    fn is_quiet(run: &Run) -> bool {
        run.planned == run.computed
            && run.unknown == 0
            && run.planned > 0
            && run.planned >= run.replay_end
            && matches!(run.start, Start::Running)
    }

    /// Takes the slab of a request that is in no step in flight, with its state saved by the step being made. `spare` pages
    /// must be available afterwards.
    fn park(&mut self, slot: Slot, loss: Loss, spare: u32) -> Result<Parking, CoreError> {
        let core = &mut *self.core;
        let request = core.requests.get_mut(slot);
        let (id, known) = (request.id, request.known());
        let Some(run) = request.run_mut().filter(|run| core.memory.could_park(run, spare)) else {
            return Ok(Parking::NoRoom);
        };
        if !Self::is_quiet(run) {
            return Ok(if core.flights.is_empty() { Parking::NoRoom } else { Parking::Later });
        }
        let Some(state) = core.memory.reserve_parking(run, known) else { return Ok(Parking::NoRoom) };
        let (pos, saved) = (run.planned, core.memory.open_copy(&mut self.flight.tickets));
        self.plan.save(run.slab, pos, state.pages(), saved);
        self.flight.parks.push((slot, saved));
        let memory = &mut core.memory;
        core.requests.park(slot, &core.pace, |run| {
            let Run { slab, seq, due, spare, .. } = run;
            memory.leave_slab(slab, saved);
            Parked { pos, seq, state, saved, due, spare }
        })?;
        core.journal.counters.preemptions += 1;
        core.journal.counters.preempted_with_state += 1;
        core.journal.push(id, core.flights.last(), What::Preempted { loss });
        Ok(Parking::Done)
    }

    /// Takes what the most junior parked request holds, `keep` and those whose state is not written yet left out. False:
    /// there is none.
    pub(super) fn reclaim_parked(&mut self, keep: Option<Slot>) -> bool {
        let core = &mut *self.core;
        let free = |&(slot, parked): &(Slot, &Parked)| Some(slot) != keep && core.memory.is_written(parked);
        let Some((slot, _)) = core.requests.juniors_parked().find(free) else { return false };
        core.journal.counters.parked_lost += 1;
        unpark(core, slot);
        true
    }

    /// Gives the slab of the last running request to a waiting one of higher priority, when nobody else can go on with
    /// less: the state of the one that gives way must find room, and the one that comes must fit.
    pub(super) fn make_way(&mut self) -> Result<(), CoreError> {
        let core = &*self.core;
        if core.memory.slabs().free() > 0 || core.memory.slabs().has_leaving() {
            return Ok(());
        }
        let Some((head, last)) = core.requests.challenger() else { return Ok(()) };
        let blocks = core.requests.get(head).known().div_ceil(core.memory.block());
        let needed = blocks + core.requests.running_count();
        if self.park(last, Loss::Priority, needed)? == Parking::Later {
            self.held = Some(last);
        }
        Ok(())
    }
}

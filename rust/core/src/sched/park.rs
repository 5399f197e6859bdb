//! Requests that gave way and kept their state.
//!
//! The slab is copied into pages of the pool at the request's position; the request waits with these pages and its history,
//! and goes on from there with nothing run again. A state at a block boundary is a snapshot; anywhere else it is the whole
//! slab (`LayoutSpec::slab_pages`). Others who need memory may take what a parked request holds, the most junior one's
//! first: then it resumes through the tree like any other.

use crate::cache::Sequence;
use crate::cache::snapshot::SnapshotPages;
use crate::core::Core;
use crate::error::CoreError;
use crate::event::{Loss, What};
use crate::ids::Ticket;
use crate::sched::policy::Due;
use crate::sched::request::{Change, Order, Phase, Run, Start};
use crate::sched::step::Draft;
use crate::sched::table::Slot;

/// What a waiting request holds so that nothing of it has to be run again.
#[derive(Debug)]
pub struct Parked {
    /// The state's position.
    pub pos: u32,
    /// The history up to there.
    pub seq: Sequence,
    /// Where the state lies.
    pub state: SnapshotPages,
    /// The copy that saves it.
    pub saved: Ticket,
    /// Boundaries at which its state is saved for others.
    pub due: Due,
    /// A state kept aside in decode.
    pub spare: Option<(u32, SnapshotPages)>,
}

impl Core {
    /// Pages of a saved state at `pos`.
    pub(super) fn state_pages(&self, pos: u32) -> u32 {
        if pos.is_multiple_of(self.shape_block()) { self.snapshot_pages } else { self.slab_pages }
    }

    /// Whether the slab of a running request holds its state, and no step in flight has anything to do with it.
    fn is_quiet(run: &Run) -> bool {
        run.planned == run.computed
            && run.unknown == 0
            && run.planned > 0
            && run.planned >= run.replay_end
            && matches!(run.start, Start::Running)
    }

    /// Whether a running request could be parked once the steps in flight are over, and `spare` pages more be had.
    fn could_park(&self, slot: Slot, spare: u32) -> bool {
        let Some(run) = self.table.get(slot).run.as_ref() else { return false };
        let blocks = run.planned.div_ceil(self.shape_block());
        let unused = (run.seq.pages().len() as u32).saturating_sub(blocks);
        run.planned > 0
            && run.planned >= run.replay_end
            && self.cache.available() + unused >= self.state_pages(run.planned) + spare
    }

    /// Takes the slab of a request that is in no step in flight, with its state saved by the step being made. `spare` pages
    /// must be available afterwards. `None`: not now, but when the steps in flight are over; `Some(false)`: there is no
    /// memory for it, nothing has changed.
    pub(super) fn park(
        &mut self,
        slot: Slot,
        loss: Loss,
        spare: u32,
        draft: &mut Draft<'_, '_>,
    ) -> Result<Option<bool>, CoreError> {
        if !self.could_park(slot, spare) {
            return Ok(Some(false));
        }
        let request = self.table.get_mut(slot);
        let run = request.run.as_mut().expect("a running request has a slab");
        if !Self::is_quiet(run) {
            return Ok(if self.flights.is_empty() { Some(false) } else { None });
        }
        let pos = run.planned;
        self.cache.shrink(&mut run.seq, pos);
        let pages = self.state_pages(pos);
        let Some(state) = self.cache.reserve(pages) else {
            // What is kept for others is not evicted for a copy. The pages that were just free are taken back.
            let request = self.table.get_mut(slot);
            let n = request.known();
            let run = request.run.as_mut().expect("a running request has a slab");
            run.told = run.told.min(run.seq.pages().len() as u32);
            let taken =
                if request.phase == Phase::Prefill { self.cache.extend(&mut run.seq, n) } else { Ok(()) };
            assert!(taken.is_ok(), "the pages were free a moment ago: {taken:?}");
            return Ok(Some(false));
        };
        let request = self.table.get_mut(slot);
        request.change(Change::Lose)?;
        let run = request.run.take().expect("a running request has a slab");
        let saved = self.tickets.open(&mut draft.flight.tickets);
        draft.plan.save(run.slab, pos, state.pages(), saved);
        self.slabs.give_back(run.slab, saved.into());
        draft.flight.parks.push((slot, saved));
        request.explain.preemptions += 1;
        request.computed_before = pos;
        let Run { seq, due, spare, begun, .. } = run;
        request.parked = Some(Box::new(Parked { pos, seq, state, saved, due, spare }));
        let (id, rank, tenant) = (request.id, request.rank(), request.place.tenant);
        self.table.shares.served(tenant, u64::from(pos.saturating_sub(begun)));
        self.requeue(slot);
        self.parked.insert((rank, slot));
        self.counters.preemptions += 1;
        self.counters.preempted_with_state += 1;
        self.events.push(id, self.last, What::Preempted { loss });
        Ok(Some(true))
    }

    /// Takes what the most junior parked request holds, `keep` and those whose state is not written yet left out. False:
    /// there is none.
    pub(super) fn reclaim_parked(&mut self, keep: Option<Slot>) -> bool {
        let of = |slot: Slot| self.table.get(slot).parked.as_ref();
        let free =
            |slot: Slot| Some(slot) != keep && of(slot).is_some_and(|p| !self.tickets.is_open(p.saved));
        let Some(&(_, slot)) = self.parked.iter().rev().find(|&&(_, slot)| free(slot)) else { return false };
        self.counters.parked_lost += 1;
        self.unpark(slot);
        true
    }

    /// Gives back what a parked request holds. A state that is not written yet is lost: what is published can be evicted
    /// and written over at once.
    pub(super) fn unpark(&mut self, slot: Slot) {
        let request = self.table.get_mut(slot);
        let rank = request.rank();
        let Some(parked) = request.parked.take() else { return };
        self.parked.remove(&(rank, slot));
        let Parked { pos, mut seq, state, spare, saved, .. } = *parked;
        let at = self.fence();
        // At a boundary of published history the state is a snapshot like any other.
        let state = if self.tickets.is_open(saved) {
            Some(state)
        } else {
            self.cache.publish_snapshot(&mut seq, pos, state).err()
        };
        let spare = spare.and_then(|(pos, pages)| self.cache.publish_snapshot(&mut seq, pos, pages).err());
        for pages in state.into_iter().chain(spare) {
            self.cache.drop_snapshot(pages, at);
        }
        self.cache.release(seq, at);
    }

    /// Gives the slab of the last running request to a waiting one of higher priority, when nobody else can go on with
    /// less: the state of the one that gives way must find room, and the one that comes must fit.
    pub(super) fn make_way(&mut self, draft: &mut Draft<'_, '_>) -> Result<(), CoreError> {
        self.held = None;
        if self.slabs.free() > 0 || self.slabs.has_leaving() {
            return Ok(());
        }
        let (Some(head), Some(&last)) = (self.table.queue.next(&[]), self.table.running.last()) else {
            return Ok(());
        };
        let (head, victim) = (self.table.get(head), self.table.get(last));
        let Some(run) = victim.run.as_ref() else { return Ok(()) };
        let senior = head.place.priority > victim.place.priority && victim.place.order != Order::Aged;
        let needed = head.known().div_ceil(self.shape_block()) + self.table.running.len() as u32;
        if !senior || head.forked.is_some() || run.computed <= run.begun {
            return Ok(());
        }
        if self.park(last, Loss::Priority, needed, draft)?.is_none() {
            self.held = Some(last);
        }
        Ok(())
    }
}

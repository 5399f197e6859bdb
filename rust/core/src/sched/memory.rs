//! Pages for the next token, and who gives way when there are none.

use crate::cache::KvCache;
use crate::cache::snapshot::SnapshotPages;
use crate::core::Core;
use crate::error::CoreError;
use crate::event::{Loss, What};
use crate::fence::Until;
use crate::sched::request::{Change, Run};
use crate::sched::step::Draft;
use crate::sched::table::Slot;

/// Pages for a state that is worth saving, if at least `least` can be had: a save must not make a request give way.
pub(super) fn reserve_state(cache: &mut KvCache, run: &Run, pos: u32, least: u32) -> Option<SnapshotPages> {
    if cache.available() < least { None } else { cache.reserve_snapshot(&run.seq, pos, true) }
}

impl Core {
    /// A page for the next token of a request in decode. False: it cannot run in this step, because pages that it will
    /// get are still in use by steps in flight, or because it had to give way itself.
    pub(super) fn secure_page(&mut self, slot: Slot, draft: &mut Draft<'_, '_>) -> Result<bool, CoreError> {
        loop {
            let run = self.table.get_mut(slot).run.as_mut().expect("a running request has a slab");
            if self.cache.extend(&mut run.seq, run.planned + 1).is_ok() {
                return Ok(true);
            }
            let saving = self.flights.iter().chain([&draft.flight]).any(|f| !f.saves.is_empty());
            let parking = self.flights.iter().any(|f| !f.parks.is_empty());
            if saving || parking || self.cache.has_leaving() {
                return Ok(false);
            }
            if self.reclaim_parked(None) || self.drop_a_spare() {
                continue;
            }
            if self.table.running.len() == 1 && !draft.flight.parks.is_empty() {
                return Ok(false);
            }
            if self.table.running.len() == 1 && self.flights.is_empty() && self.break_pin() {
                continue;
            }
            let last = *self.table.running.last().expect("the request in need is running");
            assert!(
                self.table.running.len() > 1 || !self.flights.is_empty(),
                "a request that fits into the pool ran short of pages alone"
            );
            if self.table.running.len() == 1 {
                return Ok(false);
            }
            self.gave_way = true;
            match self.park(last, Loss::Memory, 1, draft)? {
                Some(true) => {}
                Some(false) => self.lose(last, Loss::Memory)?,
                None => {
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
        let saved = |slot: &&Slot| self.table.get(**slot).run.as_ref().is_some_and(|run| run.spare.is_some());
        let rest = self.table.running.split_last().map_or(&[][..], |(_, rest)| rest);
        let found = rest.iter().rev().find(saved).or_else(|| self.table.running.first().filter(saved));
        let Some(&slot) = found else { return false };
        let spare = self.table.get_mut(slot).run.as_mut().and_then(|run| run.spare.take());
        let at = self.fence();
        spare.into_iter().for_each(|(_, pages)| self.cache.drop_snapshot(pages, at));
        true
    }

    /// Takes the slab away. What is published stays in the tree; the request waits in its place in line and resumes
    /// there, with the same tokens.
    pub(super) fn lose(&mut self, slot: Slot, loss: Loss) -> Result<(), CoreError> {
        let request = self.table.get_mut(slot);
        request.change(Change::Lose)?;
        let run = request.run.take().expect("a running request has a slab");
        request.explain.preemptions += 1;
        request.computed_before = run.computed;
        let (id, tenant) = (request.id, request.place.tenant);
        self.table.shares.served(tenant, u64::from(run.computed.saturating_sub(run.begun)));
        self.requeue(slot);
        self.let_go(run, true);
        self.counters.preemptions += u64::from(loss == Loss::Memory);
        self.events.push(id, self.last, What::Preempted { loss });
        Ok(())
    }

    /// Gives back what a running request holds, behind the last step that may touch it.
    pub(super) fn let_go(&mut self, mut run: Run, keep_state: bool) {
        let at = self.fence();
        if let Some((pos, pages)) = run.spare.take() {
            let refused = if keep_state {
                self.cache.publish_snapshot(&mut run.seq, pos, pages).err()
            } else {
                Some(pages)
            };
            if let Some(pages) = refused {
                self.cache.drop_snapshot(pages, at);
            }
        }
        self.cache.release(run.seq, at);
        self.slabs.give_back(run.slab, at);
    }

    /// What is given back now may be in use until the last step planned is over.
    pub(super) fn fence(&self) -> Until {
        Until::Step(self.last)
    }
}

//! What follows from a step's result.

use crate::core::Core;
use crate::error::CoreError;
use crate::event::{Loss, What};
use crate::ids::{Step, Ticket};
use crate::mutant::{self, Mutant};
use crate::sched::flight::{Flight, FlightRow, Save};
use crate::sched::policy::Keep;
use crate::sched::request::{Change, Finish, Phase};
use crate::sched::table::Slot;

impl Core {
    /// The result of the oldest step in flight: what its rows sampled, one after the other, and for each row that samples
    /// how many of its tokens are accepted, from the first on. Of a row with none accepted nothing counts: its request waits
    /// again and resumes with the tokens that it had. Rows whose request is gone are ignored.
    ///
    /// Fails, and changes nothing, for another step, another number of tokens or counts, and a count that is negative or
    /// above what the row sampled.
    pub fn commit(&mut self, step: Step, tokens: &[u32], accepted: &[i32]) -> Result<(), CoreError> {
        let Some(flight) = self.flights.front().filter(|f| f.step == step) else {
            return Err(self.wrong_step(step.0, "committed"));
        };
        let whole = flight.check_result(tokens, accepted)?;
        let mut flight = self.flights.pop_front().expect("it was seen");
        self.retire(&flight.tickets);
        self.counters.steps += 1;
        let (mut saves, mut at) = (flight.saves.drain(..), 0);
        for &row in &flight.rows {
            let save = if row.saves { saves.next() } else { None };
            // A row samples one token at most (see `FlightRow`), so tokens and counts go together.
            let sample = at;
            at += row.samples as usize;
            let live = self.is_live(row.slot, row.epoch);
            if !live || (!whole && row.samples > 0 && accepted[sample] == 0) {
                self.forget_row(row.slot, save, live)?;
                continue;
            }
            let token = (row.samples > 0).then(|| (tokens[sample], sample as u32));
            self.commit_row(step, row, save, token)?;
        }
        drop(saves);
        self.recycle(flight);
        Ok(())
    }

    /// A step could not be run: it and later ones never happened. Their requests lose their state and wait in their place
    /// in line; what was committed before stays.
    pub fn rollback(&mut self, step: Step) -> Result<(), CoreError> {
        if !self.flights.iter().any(|f| f.step == step) {
            return Err(self.wrong_step(step.0, "rolled back"));
        }
        self.model.forget_from(step);
        let mut ended = Vec::new();
        while self.flights.back().is_some_and(|f| f.step >= step) {
            let mut flight = self.flights.pop_back().expect("it was seen");
            self.counters.rollbacks += 1;
            for save in flight.saves.drain(..) {
                let at = self.fence();
                self.cache.drop_snapshot(save.pages, at);
            }
            for row in &flight.rows {
                if self.is_live(row.slot, row.epoch) {
                    self.lose(row.slot, Loss::Rollback)?;
                }
            }
            for (slot, epoch) in flight.forks.drain(..) {
                if self.is_live(slot, epoch) {
                    self.lose(slot, Loss::Rollback)?;
                }
            }
            for (slot, saved) in flight.parks.drain(..) {
                let here = self.table.try_get_mut(slot).and_then(|r| r.parked.as_ref());
                if here.is_some_and(|parked| parked.saved == saved) {
                    self.unpark(slot);
                }
            }
            // What its copies would have touched may still be in use by the step before it.
            let heir = self.flights.back_mut().map_or(&mut ended, |before| &mut before.tickets);
            heir.append(&mut flight.tickets);
            self.recycle(flight);
        }
        self.retire(&ended);
        Ok(())
    }

    fn recycle(&mut self, mut flight: Flight) {
        flight.rows.clear();
        flight.parks.clear();
        flight.forks.clear();
        flight.tickets.clear();
        self.spare_flights.push(flight);
    }

    /// Everything before the oldest step in flight is over, and these copies have ended.
    fn retire(&mut self, ended: &[Ticket]) {
        let done = self.flights.front().map_or(self.last, |f| Step(f.step.0 - 1));
        self.tickets.end(ended);
        self.cache.retire(done, ended);
        self.slabs.retire(done, ended);
    }

    /// Whether a row's result still counts.
    fn is_live(&mut self, slot: Slot, epoch: u64) -> bool {
        let run = self.table.try_get_mut(slot).and_then(|r| r.run.as_ref());
        run.is_some_and(|run| run.epoch == epoch || mutant::on(Mutant::LateResultCounts))
    }

    /// A row that counts. `token` comes with its place among the samples.
    fn commit_row(
        &mut self,
        step: Step,
        row: FlightRow,
        save: Option<Save>,
        token: Option<(u32, u32)>,
    ) -> Result<(), CoreError> {
        self.publish(&row);
        if let Some(save) = save {
            self.keep_state(&row, save);
        }
        let request = self.table.get_mut(row.slot);
        let (id, known) = (request.id, request.known());
        if row.prefill {
            self.events.push(id, step, What::Prefill { done: row.end, total: known });
        }
        let Some((token, sample)) = token else {
            let over =
                row.end == known && request.phase == Phase::Decode && request.max_new == request.outputs();
            return if over { self.finish(row.slot, Finish::Length, None) } else { Ok(()) };
        };
        request.change(Change::Token)?;
        request.run.as_mut().expect("a live row has a slab").unknown -= 1;
        let index = request.outputs();
        request.tokens.push(token);
        let stops = request.stop_ids.contains(&token);
        let full = request.outputs() == request.max_new;
        let late = index == 0 && request.deadline_us.is_some_and(|deadline| deadline < self.now_us);
        self.counters.deadline_misses += u64::from(late);
        self.events.push(id, step, What::Token { token, index, sample });
        match (stops, full) {
            (true, _) => self.finish(row.slot, Finish::Stop, Some(token)),
            (false, true) => self.finish(row.slot, Finish::Length, None),
            _ => Ok(()),
        }
    }

    /// Nothing of a row counts: its request is gone, or its token was not accepted.
    #[cold]
    fn forget_row(&mut self, slot: Slot, save: Option<Save>, live: bool) -> Result<(), CoreError> {
        let at = self.fence();
        save.into_iter().for_each(|save| self.cache.drop_snapshot(save.pages, at));
        self.counters.rows_refused += u64::from(live);
        if live { self.lose(slot, Loss::Rollback) } else { Ok(()) }
    }

    /// Full blocks enter the tree.
    fn publish(&mut self, row: &FlightRow) {
        let (block, at) = (self.shape_block(), self.fence());
        let request = self.table.get_mut(row.slot);
        let run = request.run.as_mut().expect("a live row has a slab");
        run.computed = row.end;
        if !self.options.prefix_cache || row.end / block <= run.seq.published_blocks() {
            return;
        }
        let adopted = self.cache.publish(&mut run.seq, &request.tokens.all()[..row.end as usize], at);
        run.adopted.extend(adopted);
    }

    fn keep_state(&mut self, row: &FlightRow, save: Save) {
        let request = self.table.get_mut(row.slot);
        let run = request.run.as_mut().expect("a live row has a slab");
        let refused = match save.keep {
            Keep::Spare => run.spare.replace((row.end, save.pages)).map(|(_, pages)| pages),
            _ => self.cache.publish_snapshot(&mut run.seq, row.end, save.pages).err(),
        };
        if let Some(pages) = refused {
            let at = self.fence();
            self.cache.drop_snapshot(pages, at);
        }
    }

    /// Ends a request in whatever state it is.
    pub(crate) fn finish(&mut self, slot: Slot, reason: Finish, stop: Option<u32>) -> Result<(), CoreError> {
        self.table.get_mut(slot).change(Change::Finish(reason))?;
        self.unpark(slot);
        let mut request = self.table.remove(slot);
        if let Some(run) = request.run.take() {
            let tenant = request.place.tenant;
            self.table.shares.served(tenant, u64::from(run.computed.saturating_sub(run.begun)));
            let whole = matches!(reason, Finish::Stop | Finish::Length);
            self.let_go(run, whole);
            if whole && self.options.prefix_cache && request.prompt > self.block {
                self.zero_hits.stored(&request.tokens.all()[..self.block as usize]);
            }
        }
        self.counters.finished += 1;
        self.counters.aborts += u64::from(reason == Finish::Abort);
        self.archive.keep(request.id, request.explain);
        let outputs = request.outputs();
        self.events.push(request.id, self.last, What::Finished { reason, outputs, stop });
        Ok(())
    }
}

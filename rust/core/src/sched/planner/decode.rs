//! One row for each running request whose prompt is done.

use super::{Planner, tell_pages};
use crate::error::CoreError;
use crate::plan::{DECODE, Row};
use crate::sched::flights::{FlightRow, Save};
use crate::sched::policy::Keep;
use crate::sched::requests::Slot;

impl Planner<'_, '_> {
    /// Writes the rows. Returns the requests whose prompt is not done, in order.
    pub(super) fn plan_decodes(&mut self) -> Result<Vec<Slot>, CoreError> {
        let (mut i, block, mut prefilling) = (0, self.core.memory.block(), Vec::new());
        // Whoever gives way is last in order, so the rows before `i` stay.
        while let Some(&slot) = self.core.requests.running().get(i) {
            i += 1;
            if self.held == Some(slot) {
                continue;
            }
            let request = self.core.requests.get(slot);
            let Some(run) = request.run() else { continue };
            if !run.decoding {
                prefilling.push(slot);
                continue;
            }
            if request.outputs() + run.unknown >= request.max_new || self.plan.room() == 0 {
                continue;
            }
            // A placeholder means a sample of the step before. After a rollback the device's last step may be another one.
            if run.unknown > 0 && run.sampled_at.0 != self.last() {
                continue;
            }
            let covered = run.seq.pages().len() as u32 * block;
            if run.planned < covered || self.secure_page(slot)? {
                self.decode_row(slot);
            }
        }
        Ok(prefilling)
    }

    fn decode_row(&mut self, slot: Slot) {
        let (least, last) = (self.pages_for_a_save(), self.last());
        let request = self.core.requests.get_mut(slot);
        let (id, known) = (request.id, &request.tokens);
        let Some(run) = request.stage.run_mut() else { return };
        let news = run.told != run.seq.pages().len() as u32 || !run.adopted.is_empty();
        if run.planned >= run.hold || (news && !tell_pages(&mut self.plan, run)) {
            return;
        }
        let (pos, end) = (run.planned, run.planned + 1);
        let keep = run.due.keep(end, true);
        let row =
            Row { request: id, slab: run.slab, start: pos, end, flags: DECODE, replay_end: 0, samples: 1 };
        let known = known.get(pos);
        debug_assert!(known.is_some() || run.sampled_at.0 == last, "it comes from the step before");
        let token = known.map_or(-1 - run.sampled_at.1 as i32, |token| token as i32);
        let index = self.plan.decode_row(row, token);
        let memory = &mut self.core.memory;
        let pages = match keep {
            Keep::No => None,
            // While the token before is unknown the request may turn out to have ended there: then the older state is the
            // one to keep, so it is not written over if there is room for both.
            Keep::Spare if known.is_some() => match run.spare.take() {
                Some((_, pages)) => Some(pages),
                None => memory.reserve_state(run, end, least),
            },
            Keep::Spare => {
                memory.reserve_state(run, end, least).or_else(|| run.spare.take().map(|(_, pages)| pages))
            }
            Keep::Publish => memory.reserve_state(run, end, least),
        };
        run.planned = end;
        run.unknown += 1;
        run.sampled_at = (self.flight.step, index);
        let epoch = run.epoch;
        let saves = pages.is_some();
        if let Some(pages) = pages {
            let ticket = memory.open_copy(&mut self.flight.tickets);
            self.plan.save(row.slab, end, pages.pages(), ticket);
            self.flight.saves.push(Save { keep, pages });
        }
        self.context += u64::from(pos);
        self.flight.rows.push(FlightRow { slot, epoch, end, samples: 1, prefill: false, saves });
    }
}

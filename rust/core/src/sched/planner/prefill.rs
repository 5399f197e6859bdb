//! Pieces of prompts, and admissions.

use super::{Planner, tell_pages};
use crate::error::CoreError;
use crate::plan::{ALL_LOGITS, REPLAY, RESET, Row};
use crate::sched::budget::LEAST_CHUNK;
use crate::sched::flights::{FlightRow, Save};
use crate::sched::policy::Keep;
use crate::sched::request::Start;
use crate::sched::requests::Slot;

impl Planner<'_, '_> {
    /// Pieces of prompts and admissions, whoever is next in fairness first (see `fairness.rs`). Every other step is for the prompt of which least
    /// is left, so that a short one waits for one step of a long one, and the long one gets half of the time at least.
    pub(super) fn plan_prefills(&mut self, mut prefilling: Vec<Slot>) -> Result<(), CoreError> {
        let (mut tried, short_first) = (Vec::new(), self.flight.step.0.is_multiple_of(2));
        let mut open = self.may_admit();
        while self.plan.room() > 0 {
            let piece = self.core.requests.next_piece(&prefilling, short_first);
            let head = if open { self.core.requests.next_waiting(&tried, &self.core.pace) } else { None };
            match (head, piece) {
                (Some(slot), piece)
                    if piece
                        .is_none_or(|i| self.core.requests.goes_before(slot, prefilling[i], short_first)) =>
                {
                    let request = self.core.requests.get(slot);
                    let (forked, n) = (request.forked.is_some(), request.known());
                    if forked || !self.takes_more(n) || !self.admit(slot)? {
                        open = self.core.requests.pass_over(slot, &mut tried);
                        continue;
                    }
                    self.prefill_row(slot)?;
                    self.core.requests.count_passed(&tried);
                    open = self.may_admit();
                }
                (_, Some(i)) => {
                    let slot = prefilling.swap_remove(i);
                    self.prefill_row(slot)?;
                }
                _ => break,
            }
        }
        Ok(())
    }

    /// Whether there is room and time for one more piece of a prompt. The first one may always be there, so that prompts
    /// make progress.
    fn takes_more(&self, from: u32) -> bool {
        self.plan.room() > 0 && (self.pieces == 0 || self.time_for(from, false) >= LEAST_CHUNK)
    }

    /// Tokens of a prompt from `from` on that the step has time for.
    fn time_for(&self, from: u32, replay: bool) -> u32 {
        self.core.pace.tokens_within(self.left_us, from, replay).max(self.floor)
    }

    /// So many of `tokens` tokens of a prompt that the step has one of the sizes of steps, where that leaves enough of them. The step is
    /// full then: with another piece it would be padded to the next size.
    fn sized(&mut self, tokens: u32) -> u32 {
        let planned = self.plan.header().tokens;
        let sizes = &self.core.options.step_sizes;
        let fits = sizes.last().is_some_and(|&most| planned + tokens <= most);
        let size = sizes.iter().rev().find(|&&size| size <= planned + tokens);
        match size {
            Some(&size) if fits && size >= planned + LEAST_CHUNK.min(tokens) => {
                (self.left_us, self.floor) = (0.0, 0);
                size - planned
            }
            _ => tokens,
        }
    }

    /// The next piece of a prompt: to the end of the replay, the next due boundary, the end, or as far as there is room and
    /// time.
    fn prefill_row(&mut self, slot: Slot) -> Result<(), CoreError> {
        let least = self.pages_for_a_save();
        let request = self.core.requests.get(slot);
        let Some(run) = request.run() else { return Ok(()) };
        let (start, len) = (run.planned, request.known());
        let replaying = start < run.replay_end;
        let stop = if replaying { run.replay_end } else { run.due.next(start).unwrap_or(len).min(len) };
        let wanted = stop.min(run.hold);
        let stop = wanted.min(start + self.plan.room());
        let begins = !matches!(run.start, Start::Running);
        let mut time = self.time_for(start, replaying);
        if self.pieces == 0 || begins {
            time = time.max(LEAST_CHUNK);
        }
        if stop <= start || time < LEAST_CHUNK.min(stop - start) {
            return Ok(());
        }
        let mut end = stop.min(start.saturating_add(time));
        if end < wanted && !replaying {
            end = start + self.sized(end - start);
        }
        let request = self.core.requests.get_mut(slot);
        let (id, tenant) = (request.id, request.place.tenant);
        let samples = u32::from(end == len && len - request.prompt < request.max_new);
        let all_logits = request.all_logits && start < request.prompt;
        let Some(run) = request.stage.run_mut() else { return Ok(()) };
        if !tell_pages(&mut self.plan, run) {
            return Ok(());
        }
        let began = std::mem::replace(&mut run.start, Start::Running);
        let bit = |on: bool, flag: i32| if on { flag } else { 0 };
        let flags =
            bit(matches!(began, Start::Empty), RESET) | bit(all_logits, ALL_LOGITS) | bit(replaying, REPLAY);
        if let Start::Saved(pos, pages, ticket) = began {
            self.plan.restore(run.slab, pos, &pages, ticket);
        }
        // Before the end of the replay the state is not exact.
        let keep = if end >= run.replay_end { run.due.keep(end, false) } else { Keep::No };
        let replay_end = if replaying { run.replay_end } else { 0 };
        let row = Row { request: id, slab: run.slab, start, end, flags, replay_end, samples };
        let index = self.plan.row(row, &request.tokens.all()[start as usize..end as usize]);
        run.planned = end;
        if samples > 0 {
            run.unknown = 1;
            run.sampled_at = (self.flight.step, index);
        }
        let epoch = run.epoch;
        let memory = &mut self.core.memory;
        let pages = if keep == Keep::No { None } else { memory.reserve_state(run, end, least) };
        let saves = pages.is_some();
        if let Some(pages) = pages {
            let ticket = memory.open_copy(&mut self.flight.tickets);
            self.plan.save(row.slab, end, pages.pages(), ticket);
            self.flight.saves.push(Save { keep, pages });
        }
        self.flight.rows.push(FlightRow { slot, epoch, end, samples, prefill: true, saves });
        if end == len {
            request.prompt_planned()?;
        }
        self.floor = self.floor.saturating_sub(end - start);
        self.charge(tenant, start, end, replaying);
        Ok(())
    }

    /// Books a piece of a prompt: on the step's time and on its tenant.
    fn charge(&mut self, tenant: u32, start: u32, end: u32, replay: bool) {
        let (load_us, us) = self.core.pace.piece_us(start, end, replay);
        self.pieces += 1;
        self.load_us += load_us;
        self.left_us -= us;
        self.core.requests.charge(tenant, us);
    }
}

//! One plan: who takes over or gives way first, then decode rows, then pieces of prompts until the step is full or its time
//! is spent.

use crate::core::Core;
use crate::error::CoreError;
use crate::ids::Step;
use crate::mutant::{self, Mutant};
use crate::plan::{ALL_LOGITS, DECODE, PlanWriter, REPLAY, RESET, Row, StepHeader};
use crate::sched::budget::{LEAST_CHUNK, Work};
use crate::sched::flight::{Flight, FlightRow, Save};
use crate::sched::memory::reserve_state;
use crate::sched::policy::Keep;
use crate::sched::request::{Change, Phase, Request, Run, Start};
use crate::sched::table::Slot;

/// A step being written: its buffer, and what is remembered of it.
pub(super) struct Draft<'w, 'a> {
    pub plan: &'w mut PlanWriter<'a>,
    pub flight: Flight,
    /// Tokens before the rows in decode, in all.
    pub context: u64,
    /// Predicted time that is left for prompts.
    pub left_us: f64,
    /// Tokens of prompts that it may take in any case.
    pub floor: u32,
    /// Predicted time of the pieces of prompts, before correction.
    pub load_us: f64,
    /// Pieces of prompts.
    pub pieces: u32,
}

impl Core {
    /// Writes the next step into `out`. `None`: nothing can run now (finish the steps in flight, or submit something). A step
    /// may have no rows and only copy states.
    ///
    /// Fails when `out` is shorter than [`Core::plan_schema`] says, or when as many steps are in flight as allowed.
    pub fn plan(&mut self, out: &mut [i32]) -> Result<Option<StepHeader>, CoreError> {
        let step = Step(self.last.0 + 1);
        if self.flights.len() == self.options.max_in_flight as usize {
            return Err(self.wrong_step(step.0, "planned"));
        }
        let mut writer = PlanWriter::new(&self.schema, out, step)?;
        let mut flight = self.spare_flights.pop().unwrap_or_default();
        flight.step = step;
        self.gave_way = false;
        self.keep_order();
        let mut draft = Draft {
            plan: &mut writer,
            flight,
            context: 0,
            left_us: f64::INFINITY,
            floor: 0,
            load_us: 0.0,
            pieces: 0,
        };
        let mut prefilling = std::mem::take(&mut self.prefilling);
        self.plan_forks(&mut draft)?;
        self.make_way(&mut draft)?;
        self.plan_decodes(&mut draft, &mut prefilling)?;
        self.set_budget(&mut draft);
        self.plan_prefills(&mut draft, &mut prefilling)?;
        prefilling.clear();
        self.prefilling = prefilling;
        let Draft { mut flight, context, load_us, .. } = draft;
        let header = writer.header();
        if header.rows + header.copies == 0 {
            self.spare_flights.push(flight);
            return Ok(None);
        }
        let fixed_us = self.model.fixed_work(header.decode_rows, context, header.copies);
        self.model.expect(step, Work { fixed_us, load_us }, header.decode_rows);
        (flight.samples, flight.sampled_rows) = (header.samples, header.sampled_rows);
        self.flights.push_back(flight);
        self.last = step;
        Ok(Some(writer.finish()))
    }

    /// What running decodes leave of the step's time.
    fn set_budget(&mut self, draft: &mut Draft<'_, '_>) {
        let header = draft.plan.header();
        let rows = header.decode_rows;
        if rows == 0 {
            return;
        }
        let alone = self.model.decodes_us(self.model.fixed_work(rows, draft.context, 0));
        if let Some(budget) = self.options.step_budget.of(alone) {
            let fixed_us = self.model.fixed_work(rows, draft.context, header.copies);
            draft.left_us = budget - self.model.predict(Work { fixed_us, load_us: 0.0 });
            draft.floor = self.options.step_budget.floor();
        }
    }

    /// One row for each running request whose prompt is done; the others are put into `prefilling`, in order.
    fn plan_decodes(
        &mut self,
        draft: &mut Draft<'_, '_>,
        prefilling: &mut Vec<Slot>,
    ) -> Result<(), CoreError> {
        let (mut i, block) = (0, self.shape_block());
        // Whoever gives way is last in order, so the rows before `i` stay.
        while let Some(&slot) = self.table.running.get(i) {
            i += 1;
            if self.held == Some(slot) {
                continue;
            }
            let request = self.table.get(slot);
            if request.phase == Phase::Prefill {
                prefilling.push(slot);
                continue;
            }
            let run = request.run.as_ref().expect("a running request has a slab");
            if request.outputs() + run.unknown >= request.max_new || draft.plan.room() == 0 {
                continue;
            }
            // A placeholder means a sample of the step before. After a rollback the device's last step may be another one.
            if run.unknown > 0 && run.sampled_at.0 != self.last {
                continue;
            }
            let covered = run.seq.pages().len() as u32 * block;
            if run.planned < covered || self.secure_page(slot, draft)? {
                self.decode_row(slot, draft);
            }
        }
        Ok(())
    }

    fn decode_row(&mut self, slot: Slot, draft: &mut Draft<'_, '_>) {
        let least = self.pages_for_a_save();
        let request = self.table.get_mut(slot);
        let run = request.run.as_mut().expect("a running request has a slab");
        let news = run.told != run.seq.pages().len() as u32 || !run.adopted.is_empty();
        if run.planned >= run.hold || (news && !tell_pages(draft.plan, run)) {
            return;
        }
        let (pos, end) = (run.planned, run.planned + 1);
        let keep = run.due.keep(end, true);
        let row = Row {
            request: request.id,
            slab: run.slab,
            start: pos,
            end,
            flags: DECODE,
            replay_end: 0,
            samples: 1,
        };
        let known = request.tokens.get(pos);
        debug_assert!(known.is_some() || run.sampled_at.0 == self.last, "it comes from the step before");
        let token = known.map_or(-1 - run.sampled_at.1 as i32, |token| token as i32);
        let index = draft.plan.decode_row(row, token);
        let pages = match keep {
            Keep::No => None,
            // While the token before is unknown the request may turn out to have ended there: then the older state is the
            // one to keep, so it is not written over if there is room for both.
            Keep::Spare if known.is_some() => match run.spare.take() {
                Some((_, pages)) => Some(pages),
                None => reserve_state(&mut self.cache, run, end, least),
            },
            Keep::Spare => reserve_state(&mut self.cache, run, end, least)
                .or_else(|| run.spare.take().map(|(_, pages)| pages)),
            Keep::Publish => reserve_state(&mut self.cache, run, end, least),
        };
        run.planned = end;
        run.unknown += 1;
        run.sampled_at = (draft.flight.step, index);
        let epoch = run.epoch;
        if let Some(pages) = &pages {
            let ticket = self.tickets.open(&mut draft.flight.tickets);
            draft.plan.save(row.slab, end, pages.pages(), ticket);
        }
        let saves = pages.is_some();
        draft.context += u64::from(pos);
        draft.flight.rows.push(FlightRow { slot, epoch, end, samples: 1, prefill: false, saves });
        draft.flight.saves.extend(pages.map(|pages| Save { keep, pages }));
    }

    /// Whether there is room and time for one more piece of a prompt. The first one may always be there, so that prompts
    /// make progress.
    fn takes_more(&self, draft: &Draft<'_, '_>, from: u32) -> bool {
        let time = || self.within(draft.left_us, from, false).max(draft.floor) >= LEAST_CHUNK;
        draft.plan.room() > 0 && (draft.pieces == 0 || time())
    }

    /// Tokens from `from` on that fit into `us` together with a restore and a save.
    fn within(&self, us: f64, from: u32, replay: bool) -> u32 {
        if us == f64::INFINITY {
            return u32::MAX;
        }
        let copies =
            Work { fixed_us: self.model.fixed_work(0, 0, 2) - self.model.fixed_work(0, 0, 0), load_us: 0.0 };
        self.model.tokens_within(us - self.model.predict(copies), from, replay)
    }

    /// Pieces of prompts and admissions, whoever is next in fairness first (see `fairness.rs`).
    fn plan_prefills(
        &mut self,
        draft: &mut Draft<'_, '_>,
        prefilling: &mut Vec<Slot>,
    ) -> Result<(), CoreError> {
        let mut tried = std::mem::take(&mut self.tried);
        tried.clear();
        let mut open = self.may_admit();
        while draft.plan.room() > 0 {
            let piece = self.next_piece(prefilling);
            let head = if open { self.next_waiting(&tried) } else { None };
            match (head, piece) {
                (Some(slot), piece) if piece.is_none_or(|i| self.goes_before(slot, prefilling[i])) => {
                    let (forked, n) = (self.table.get(slot).forked.is_some(), self.table.get(slot).known());
                    if forked || !self.takes_more(draft, n) || !self.admit(slot, draft)? {
                        open = self.pass_over(slot, &mut tried);
                        continue;
                    }
                    self.prefill_row(slot, draft)?;
                    self.count_passed(&tried);
                    open = self.may_admit();
                }
                (_, Some(i)) => {
                    let slot = prefilling.swap_remove(i);
                    self.prefill_row(slot, draft)?;
                }
                _ => break,
            }
        }
        self.tried = tried;
        Ok(())
    }

    /// The next piece of a prompt: to the end of the replay, the next due boundary, the end, or as far as there is room and
    /// time.
    fn prefill_row(&mut self, slot: Slot, draft: &mut Draft<'_, '_>) -> Result<(), CoreError> {
        let least = self.pages_for_a_save();
        let request = self.table.get(slot);
        let run = request.run.as_ref().expect("a running request has a slab");
        let (start, len) = (run.planned, request.tokens.len());
        let replaying = start < run.replay_end;
        let stop = if replaying { run.replay_end } else { run.due.next(start).unwrap_or(len).min(len) };
        let stop = stop.min(run.hold).min(start + draft.plan.room());
        let begins = !matches!(run.start, Start::Running);
        let mut time = self.within(draft.left_us, start, replaying).max(draft.floor);
        if draft.pieces == 0 || begins {
            time = time.max(LEAST_CHUNK);
        }
        if stop <= start || time < LEAST_CHUNK.min(stop - start) {
            return Ok(());
        }
        let request = self.table.get_mut(slot);
        let run = request.run.as_mut().expect("a running request has a slab");
        if !tell_pages(draft.plan, run) {
            return Ok(());
        }
        let end = stop.min(start.saturating_add(time));
        let samples = end == len && len - request.prompt < request.max_new;
        let flags = flags_of(request, start, replaying);
        let run = request.run.as_mut().expect("a running request has a slab");
        if let Start::Saved(pos, pages, ticket) = std::mem::replace(&mut run.start, Start::Running) {
            draft.plan.restore(run.slab, pos, &pages, ticket);
        }
        // Before the end of the replay the state is not exact.
        let keep = if end >= run.replay_end { run.due.keep(end, false) } else { Keep::No };
        let replay_end = if replaying { run.replay_end } else { 0 };
        let samples = u32::from(samples);
        let row = Row { request: request.id, slab: run.slab, start, end, flags, replay_end, samples };
        let index = draft.plan.row(row, &request.tokens.all()[start as usize..end as usize]);
        run.planned = end;
        if samples > 0 {
            run.unknown = 1;
            run.sampled_at = (draft.flight.step, index);
        }
        let epoch = run.epoch;
        let pages = if keep == Keep::No { None } else { reserve_state(&mut self.cache, run, end, least) };
        if let Some(pages) = &pages {
            let ticket = self.tickets.open(&mut draft.flight.tickets);
            draft.plan.save(row.slab, end, pages.pages(), ticket);
        }
        let saves = pages.is_some();
        draft.flight.rows.push(FlightRow { slot, epoch, end, samples, prefill: true, saves });
        draft.flight.saves.extend(pages.map(|pages| Save { keep, pages }));
        let tenant = request.place.tenant;
        if end == len {
            request.change(Change::PromptPlanned)?;
        }
        draft.floor = draft.floor.saturating_sub(end - start);
        self.charge(draft, tenant, self.model.load_work(start, end, replaying));
        Ok(())
    }

    /// Books a piece of a prompt: on the step's time and on its tenant.
    fn charge(&mut self, draft: &mut Draft<'_, '_>, tenant: u32, load_us: f64) {
        draft.pieces += 1;
        draft.load_us += load_us;
        let us = self.model.predict(Work { fixed_us: 0.0, load_us });
        draft.left_us -= us;
        self.table.charge(tenant, us);
    }
}

fn flags_of(request: &Request, start: u32, replaying: bool) -> i32 {
    let empty = matches!(request.run, Some(Run { start: Start::Empty, .. }));
    let bit = |on: bool, flag: i32| if on { flag } else { 0 };
    bit(empty, RESET)
        | bit(request.all_logits && start < request.prompt, ALL_LOGITS)
        | bit(replaying && !mutant::on(Mutant::ReplayWrites), REPLAY)
}

/// Tells the device about pages that it does not know yet. False, and nothing told, when there is no room for them.
fn tell_pages(plan: &mut PlanWriter<'_>, run: &mut Run) -> bool {
    let pages = run.seq.pages();
    let news = run.adopted.len() as u32 + pages.len() as u32 - run.told;
    if news > plan.delta_room() {
        return false;
    }
    for (block, page) in run.adopted.drain(..) {
        plan.delta(run.slab, block, page);
    }
    for (block, &page) in (run.told..).zip(&pages[run.told as usize..]) {
        plan.delta(run.slab, block, page);
    }
    run.told = pages.len() as u32;
    true
}

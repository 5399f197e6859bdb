//! Every invariant of the scheduler, recomputed from scratch.

use std::collections::HashSet;

use crate::core::Core;
use crate::error::Malformed;
use crate::ids::PageId;
use crate::sched::request::{Phase, Request};

impl Core {
    /// Recomputes every invariant from scratch.
    pub fn check(&self) -> Result<(), Malformed> {
        let runs = || self.table.iter_running().filter_map(|r| r.run.as_ref());
        let saving = self.flights.iter().flat_map(|f| &f.saves).map(|s| &s.pages);
        let parked = || self.table.iter().filter_map(|r| r.parked.as_ref());
        let spares = runs().filter_map(|r| r.spare.as_ref()).chain(parked().filter_map(|p| p.spare.as_ref()));
        let held = saving.chain(spares.map(|(_, pages)| pages)).chain(parked().map(|p| &p.state));
        let sequences = || runs().map(|r| &r.seq).chain(parked().map(|p| &p.seq));
        self.cache.check(sequences(), held)?;
        self.slabs.check(runs().map(|r| r.slab))?;
        let copies = self.flights.iter().map(|f| f.tickets.len()).sum::<usize>();
        Malformed::unless(copies == self.tickets.open_count(), "copies end with their step", || {
            format!("{copies} in flight, {} open", self.tickets.open_count())
        })?;
        let ranks: Vec<_> = self.table.iter_running().map(|r| r.rank()).collect();
        Malformed::unless(ranks.is_sorted(), "running order", || format!("{ranks:?}"))?;
        for request in self.table.iter() {
            self.check_request(request)?;
        }
        self.table.queue.check(|tenant| self.table.shares.turn(tenant))?;
        let holders = self.table.iter().filter(|r| r.parked.is_some()).count();
        Malformed::unless(holders == self.parked.len(), "parked requests", || {
            format!("{holders} hold a state, {} are listed", self.parked.len())
        })?;
        let mut writers: HashSet<PageId> = HashSet::new();
        for seq in sequences() {
            for &page in &seq.pages()[seq.published_blocks() as usize..] {
                Malformed::unless(writers.insert(page), "one writer per page", || {
                    format!("{page:?} has two")
                })?;
            }
        }
        for seq in sequences() {
            let shared = &seq.pages()[..seq.published_blocks() as usize];
            let written = shared.iter().find(|p| writers.contains(p));
            Malformed::unless(written.is_none(), "shared pages are not written", || format!("{written:?}"))?;
        }
        Ok(())
    }

    fn check_request(&self, r: &Request) -> Result<(), Malformed> {
        let run = r.run.as_ref();
        let says = |what, holds| {
            Malformed::unless(holds, what, || {
                let (planned, computed, unknown) =
                    run.map_or((0, 0, 0), |x| (x.planned, x.computed, x.unknown));
                let (id, state, known, prompt) = (r.id.0, r.phase.name(), r.known(), r.prompt);
                format!(
                    "request {id} {state}: {prompt} of {known} tokens are its prompt, {planned} planned, {computed} computed, {unknown} unknown"
                )
            })
        };
        let slot = self.table.find(r.id);
        let waiting = slot.is_some_and(|slot| self.table.queue.holds(r.place, slot));
        says(
            "waiting requests have no slab",
            waiting == (r.phase == Phase::Waiting) && waiting == r.run.is_none(),
        )?;
        if let Some(parked) = &r.parked {
            let blocks = parked.pos.div_ceil(self.block) as usize;
            let kept = parked.seq.pages().len() == blocks.max(parked.seq.published_blocks() as usize);
            says("a parked request holds its history", waiting && kept && parked.pos < r.known())?;
        }
        let Some(run) = run else { return Ok(()) };
        let covered = run.seq.pages().len() as u32 * self.block;
        says("pages cover what is planned", run.planned <= covered && run.computed <= run.planned)?;
        says("output within its limit", r.outputs() + run.unknown <= r.max_new)?;
        match r.phase {
            Phase::Prefill => says("prefill has tokens to plan", run.planned < r.known() && run.unknown == 0),
            _ => says(
                "decode is at the newest token",
                run.planned + 1 == r.known() + run.unknown.max(u32::from(r.max_new == 0)),
            ),
        }
    }
}

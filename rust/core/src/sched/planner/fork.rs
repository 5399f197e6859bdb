//! A request that starts from the live state of another.
//!
//! The child shares the published pages, and gets a copy of the slab and of the page that is not full yet, before the
//! forward of the step in which it starts. The parent waits for it at the last position that both have in common, but never
//! for memory: when the copy cannot be had at once, the child starts through the tree like any other.

use super::Planner;
use crate::cache::{Lost, Match};
use crate::error::CoreError;
use crate::event::What;
use crate::ids::RequestId;
use crate::sched::request::{Forked, Run, Stage, Start};
use crate::sched::requests::Slot;

/// What is to be done about a child now.
enum Turn {
    /// The parent is not there yet; it must not go beyond this position.
    Wait(u32),
    /// The parent is there.
    Now(Slot, u32),
    /// There will be no state to take.
    Never,
}

impl Planner<'_, '_> {
    /// Starts the children whose parents are where they part; tells the other parents how far they may go.
    pub(super) fn plan_forks(&mut self) -> Result<(), CoreError> {
        let forks = self.core.requests.take_forks();
        for &(_, parent) in &forks {
            if let Some(run) = self.run_of(parent) {
                run.hold = u32::MAX;
            }
        }
        let mut rest = Vec::new();
        for (id, parent) in forks {
            let Some(slot) = self.core.requests.find(id) else { continue };
            let Some(forked) = self.core.requests.get(slot).forked else { continue };
            match self.turn_of(forked) {
                Turn::Wait(at) => {
                    if let Some(run) = self.run_of(parent) {
                        run.hold = run.hold.min(at);
                    }
                    rest.push((id, parent));
                }
                Turn::Now(parent, at) => {
                    self.core.requests.get_mut(slot).forked = None;
                    self.take_over(slot, parent, at)?;
                }
                Turn::Never => self.core.requests.get_mut(slot).forked = None,
            }
        }
        self.core.requests.keep_forks(rest);
        Ok(())
    }

    fn run_of(&mut self, id: RequestId) -> Option<&mut Run> {
        self.core.requests.find(id).and_then(|slot| self.core.requests.run_mut(slot))
    }

    fn turn_of(&self, forked: Forked) -> Turn {
        let Some(slot) = self.core.requests.find(forked.parent) else { return Turn::Never };
        let parent = self.core.requests.get(slot);
        let at = forked.shared;
        // The name may be another request's by now.
        if parent.place.arrival != forked.arrival {
            return Turn::Never;
        }
        match &parent.stage {
            Stage::Waiting { parked: Some(parked) } if parked.pos > at => Turn::Never,
            Stage::Waiting { .. } => Turn::Wait(at),
            Stage::Running(run) if run.planned > at || (run.planned == at && at < run.replay_end) => {
                Turn::Never
            }
            Stage::Running(run) if run.planned < at || run.computed < at => Turn::Wait(at),
            Stage::Running(Run { start: Start::Running, .. }) => Turn::Now(slot, at),
            Stage::Running(_) => Turn::Never,
        }
    }

    /// The child gets a slab, its own pages and the copies, all or nothing.
    fn take_over(&mut self, slot: Slot, parent: Slot, at: u32) -> Result<(), CoreError> {
        let core = &mut *self.core;
        let block = core.memory.block();
        let full = at / block;
        let n = core.requests.get(slot).known();
        let Some(of) = core.requests.get(parent).run() else { return Ok(()) };
        let needed = n.div_ceil(block) - full;
        let room = core.memory.slabs().free() > 0
            && n.div_ceil(block) <= self.plan.delta_room()
            && of.seq.published_blocks() >= full
            && core.memory.available() >= needed + core.requests.running_count();
        if !room {
            return Ok(());
        }
        let (from_slab, from_page) = (of.slab, of.seq.pages().get(full as usize).copied());
        let child = core.requests.get_mut(slot);
        let (id, prompt) = (child.id, child.prompt);
        let found = Match { history: full * block, ..Match::nothing(Lost::Nothing) };
        let mut seq = core.memory.attach(child, found.history, &found);
        core.memory.extend_surely(&mut seq, n);
        let slab = core.memory.take_slab().expect("a free slab was seen");
        let open = from_page.filter(|_| !at.is_multiple_of(block));
        let pages = open.map(|from| [from, seq.pages()[full as usize]]);
        let ticket = core.memory.open_copy(&mut self.flight.tickets);
        self.plan.fork(from_slab, slab, at, pages.as_ref().map_or(&[], |p| p), ticket);
        let e = &mut child.explain;
        (e.history_matched, e.resumed_at, e.replayed) = (at, at, 0);
        let due = core.options.snapshots.due(block, prompt, n, &found);
        let epoch = core.requests.start(slot, Run::new(slab, seq, at, Start::Running, due))?;
        self.flight.forks.push((slot, epoch));
        let c = &mut core.journal.counters;
        c.forks += 1;
        c.prefix_queries += 1;
        c.prompt_tokens += u64::from(prompt);
        c.matched_tokens += u64::from(at);
        c.resumed_tokens += u64::from(at);
        core.journal.push(id, core.flights.last(), What::Resumed { at, history: at, replayed: 0 });
        Ok(())
    }
}

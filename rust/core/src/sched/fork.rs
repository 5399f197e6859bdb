//! A request that starts from the live state of another.
//!
//! The child shares the published pages, and gets a copy of the slab and of the page that is not full yet, before the
//! forward of the step in which it starts. The parent waits for it at the last position that both have in common, but never
//! for memory: when the copy cannot be had at once, the child starts through the tree like any other.

use crate::cache::{Lost, Match};
use crate::core::Core;
use crate::error::CoreError;
use crate::event::What;
use crate::ids::RequestId;
use crate::mutant::{self, Mutant};
use crate::sched::request::{Change, Forked, Phase, Run, Start, Submit};
use crate::sched::step::Draft;
use crate::sched::table::Slot;

/// What is to be done about a child now.
enum Turn {
    /// The parent is not there yet; it must not go beyond this position.
    Wait(u32),
    /// The parent is there.
    Now(Slot, u32),
    /// There will be no state to take.
    Never,
}

impl Core {
    /// Submits `child` so that it starts from the state of `parent`, which goes on. An empty prompt means all that is known
    /// of the parent. The outcome is that of a request of its own; only work is saved.
    ///
    /// Fails as [`Core::submit`] does, and when the parent is not live.
    pub fn fork(&mut self, parent: RequestId, mut child: Submit) -> Result<(), CoreError> {
        let slot = self.table.find(parent).ok_or(CoreError::UnknownRequest(parent.0))?;
        let of = self.table.get_mut(slot);
        let tokens = of.tokens.all();
        if child.prompt.is_empty() {
            child.prompt = tokens.to_vec();
        }
        let shared = tokens.iter().zip(&child.prompt).take_while(|(a, b)| a == b).count();
        let shared = (shared as u32).min(child.prompt.len() as u32 - 1);
        let fits = shared > 0
            && self.options.prefix_cache
            && child.salt[..] == of.salt[..]
            && !child.all_logits
            && child.priority <= of.place.priority;
        let (id, arrival) = (child.id, of.place.arrival);
        self.submit(child)?;
        if fits && let Some(slot) = self.table.find(id) {
            self.table.get_mut(slot).forked = Some(Forked { parent, arrival, shared });
            self.forks.push((id, parent));
        }
        Ok(())
    }

    /// Starts the children whose parents are where they part; tells the other parents how far they may go.
    pub(super) fn plan_forks(&mut self, draft: &mut Draft<'_, '_>) -> Result<(), CoreError> {
        if self.forks.is_empty() {
            return Ok(());
        }
        let forks = std::mem::take(&mut self.forks);
        for &(_, parent) in &forks {
            if let Some(run) = self.run_of(parent) {
                run.hold = u32::MAX;
            }
        }
        let mut rest = Vec::new();
        for (id, parent) in forks {
            let Some(slot) = self.table.find(id) else { continue };
            let Some(forked) = self.table.get(slot).forked else { continue };
            match self.turn_of(forked) {
                Turn::Wait(at) => {
                    if let Some(run) = self.run_of(parent) {
                        run.hold = run.hold.min(at);
                    }
                    rest.push((id, parent));
                }
                Turn::Now(parent, at) => {
                    self.table.get_mut(slot).forked = None;
                    self.take_over(slot, parent, at, draft)?;
                }
                Turn::Never => self.table.get_mut(slot).forked = None,
            }
        }
        self.forks = rest;
        Ok(())
    }

    fn run_of(&mut self, id: RequestId) -> Option<&mut Run> {
        self.table.find(id).and_then(|slot| self.table.get_mut(slot).run.as_mut())
    }

    /// How far a request that is being admitted may go before its children have their state.
    pub(super) fn hold_of(&self, parent: RequestId, first: u32) -> u32 {
        let mine = self.forks.iter().filter(|f| f.1 == parent);
        let forked = mine.filter_map(|f| self.table.find(f.0).and_then(|slot| self.table.get(slot).forked));
        forked.map(|f| f.shared).filter(|&at| at > first).min().unwrap_or(u32::MAX)
    }

    fn turn_of(&self, forked: Forked) -> Turn {
        let Some(slot) = self.table.find(forked.parent) else { return Turn::Never };
        let parent = self.table.get(slot);
        let at = forked.shared;
        // The name may be another request's by now.
        if parent.place.arrival != forked.arrival {
            return Turn::Never;
        }
        let Some(run) = parent.run.as_ref() else {
            let ahead = parent.parked.as_ref().is_some_and(|p| p.pos > at);
            return if ahead || parent.phase != Phase::Waiting { Turn::Never } else { Turn::Wait(at) };
        };
        if run.planned > at || (run.planned == at && at < run.replay_end) {
            Turn::Never
        } else if run.planned < at || run.computed < at {
            Turn::Wait(at)
        } else if matches!(run.start, Start::Running) {
            Turn::Now(slot, at)
        } else {
            Turn::Never
        }
    }

    /// The child gets a slab, its own pages and the copies, all or nothing.
    fn take_over(
        &mut self,
        slot: Slot,
        parent: Slot,
        at: u32,
        draft: &mut Draft<'_, '_>,
    ) -> Result<(), CoreError> {
        let block = self.shape_block();
        let full = at / block;
        let (child, of) = (self.table.get(slot), self.table.get(parent));
        let of = of.run.as_ref().expect("the parent runs");
        let n = child.known();
        let needed = n.div_ceil(block) - full;
        let room = self.slabs.free() > 0
            && n.div_ceil(block) <= draft.plan.delta_room()
            && of.seq.published_blocks() >= full
            && self.cache.available() >= needed + self.table.running.len() as u32;
        if !room {
            return Ok(());
        }
        let (from_slab, from_page) = (of.slab, of.seq.pages().get(full as usize).copied());
        let child = self.table.get_mut(slot);
        let mut seq = self.cache.attach(&child.salt, child.tokens.all(), full * block, child.hint);
        let taken = self.cache.extend(&mut seq, n);
        assert!(taken.is_ok(), "{needed} pages were available: {taken:?}");
        let slab = self.slabs.take().expect("a free slab was seen");
        let partial = !at.is_multiple_of(block);
        let open = from_page.filter(|_| partial && !mutant::on(Mutant::ForkSharesTail));
        let pages = open.map(|from| [from, seq.pages()[full as usize]]);
        let ticket = self.tickets.open(&mut draft.flight.tickets);
        draft.plan.fork(from_slab, slab, at, pages.as_ref().map_or(&[], |p| p), ticket);
        self.epochs += 1;
        draft.flight.forks.push((slot, self.epochs));
        let request = self.table.get_mut(slot);
        request.change(Change::Admit)?;
        let found = Match {
            history: full * block,
            snapshots: Vec::new(),
            lost: Lost::Nothing,
            snapshot_evicted: None,
        };
        let due = self.options.snapshots.due(block, request.prompt, n, &found);
        request.run = Some(Run::new(self.epochs, slab, seq, at, Start::Running, due));
        let e = &mut request.explain;
        (e.history_matched, e.resumed_at, e.replayed) = (at, at, 0);
        let (id, prompt) = (request.id, u64::from(request.prompt));
        self.table.start(slot);
        self.counters.forks += 1;
        self.counters.prefix_queries += 1;
        self.counters.prompt_tokens += prompt;
        self.counters.matched_tokens += u64::from(at);
        self.counters.resumed_tokens += u64::from(at);
        self.events.push(id, self.last, What::Resumed { at, history: at, replayed: 0 });
        Ok(())
    }
}

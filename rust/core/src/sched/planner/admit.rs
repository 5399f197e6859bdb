//! Admission: over slabs, pages and page-table changes at once, all or nothing.

use super::Planner;
use crate::cache::turns::End;
use crate::cache::{Lost, Match, Sequence};
use crate::cost::Way;
use crate::error::CoreError;
use crate::event::What;
use crate::sched::ends::unpark;
use crate::sched::explain::{Explain, Reason};
use crate::sched::request::{Run, Start};
use crate::sched::requests::Slot;

impl Planner<'_, '_> {
    /// Whether trying to admit makes sense: not in a step for which someone had to give way.
    pub(super) fn may_admit(&self) -> bool {
        self.core.memory.slabs().free() > 0 && !self.gave_way
    }

    /// Whether nothing runs and nothing is in flight: then a request that was taken must fit.
    fn is_alone(&self) -> bool {
        self.core.requests.running().is_empty() && self.core.flights.is_empty()
    }

    /// Gives a waiting request a slab, all pages of its known tokens, and the cheapest start. False: not now.
    pub(super) fn admit(&mut self, slot: Slot) -> Result<bool, CoreError> {
        let alone = self.is_alone();
        let core = &mut *self.core;
        let request = core.requests.get(slot);
        let (n, block) = (request.known(), core.memory.block());
        let room = (core.memory.available(), core.requests.running_count());
        // Looking up a long prompt again can wait until there is more than when it did not fit.
        let hopeless =
            request.blocked.is_some_and(|(available, running)| room.0 <= available && room.1 >= running);
        if (hopeless && !alone && core.requests.parked_count() == 0)
            || core.memory.slabs().free() == 0
            || n.div_ceil(block) > self.plan.delta_room()
        {
            return Ok(false);
        }
        if request.parked().is_some() && self.unparks(slot, alone)? {
            return Ok(true);
        }
        let core = &mut *self.core;
        let request = core.requests.get_mut(slot);
        if request.parked().is_some() {
            // It waits with what it holds: a start through the tree as well would hold its history twice.
            return Ok(false);
        }
        let limit = (n - 1) / block * block;
        let found = core.memory.lookup(request, limit).unwrap_or(Match::nothing(Lost::NeverStored));
        let mut started = self.start_of(slot, &found, alone);
        while started.is_none() && alone && self.core.memory.break_pin() {
            started = self.start_of(slot, &found, alone);
        }
        let Some((way, seq, start)) = started else {
            assert!(
                !alone || self.core.requests.parked_count() > 0,
                "a request that fits into the pool was not admitted alone"
            );
            self.core.requests.get_mut(slot).blocked = Some(room);
            self.core.requests.knows(slot, found.history);
            return Ok(false);
        };
        self.explain_start(slot, &found, way, limit);
        let core = &mut *self.core;
        let slab = core.memory.take_slab().expect("a free slab was seen");
        let request = core.requests.get(slot);
        let due = core.options.snapshots.due(block, request.prompt, n, &found);
        let hold = core.requests.hold_of(request.id, way.first());
        let replay_end = if way.replayed() > 0 { way.resumed_at() } else { 0 };
        let run = Run::new(slab, seq, way.first(), start, due);
        core.requests.start(slot, Run { computed: 0, replay_end, hold, ..run })?;
        Ok(true)
    }

    /// Attaches to the tree and takes pages, if there are enough and each running request could still get one. Alone, a
    /// start that does not need a saved state's pages besides its own is taken as well.
    fn start_of(&mut self, slot: Slot, found: &Match, alone: bool) -> Option<(Way, Sequence, Start)> {
        let n = self.core.requests.get(slot).known();
        let (spared, block) = (self.core.requests.running_count(), self.core.memory.block());
        let mut choices = vec![&found.snapshots[..]];
        if alone {
            choices.push(&[]);
        }
        for snapshots in choices {
            let core = &mut *self.core;
            let way = core.options.cost.cheapest(n, found.history, snapshots, core.replay_tokens);
            let mut seq = core.memory.attach(core.requests.get_mut(slot), way.resumed_at(), found);
            let leased = if matches!(way, Way::Snapshot { .. }) { core.memory.snapshot_pages() } else { 0 };
            let needed = n.div_ceil(block) - seq.pages().len() as u32 + leased + spared;
            while self.core.memory.available() < needed && self.reclaim_juniors(slot, alone) {}
            let memory = &mut self.core.memory;
            if memory.available() < needed {
                memory.release_unused(seq);
                continue;
            }
            let start = match way {
                Way::Snapshot { pos, id } => {
                    let ticket = memory.open_copy(&mut self.flight.tickets);
                    Start::Saved(pos, memory.lease(id, ticket), ticket)
                }
                _ => Start::Empty,
            };
            memory.extend_surely(&mut seq, n);
            return Some((way, seq, start));
        }
        None
    }

    /// Lets a parked request go on from its saved state, if its further pages can be had. Otherwise it may lose what it
    /// holds: when it is alone, or when others need it more.
    fn unparks(&mut self, slot: Slot, alone: bool) -> Result<bool, CoreError> {
        let (block, spared) = (self.core.memory.block(), self.core.requests.running_count());
        loop {
            let request = self.core.requests.get(slot);
            let Some(parked) = request.parked() else { return Ok(false) };
            let needed = request.known().div_ceil(block).saturating_sub(parked.seq.pages().len() as u32);
            // Copies on the device keep the order of steps, so the state need not be there yet.
            if self.flight.tickets.contains(&parked.saved) {
                return Ok(false);
            }
            if self.core.memory.available() >= needed + spared {
                break;
            }
            if !self.reclaim_juniors(slot, alone) {
                if alone {
                    unpark(self.core, slot);
                }
                return Ok(false);
            }
        }
        let core = &mut *self.core;
        let slab = core.memory.take_slab().expect("a free slab was seen");
        let (id, n) = (core.requests.get(slot).id, core.requests.get(slot).known());
        let Some(parked) = core.requests.unpark(slot) else { return Ok(false) };
        let (pos, mut seq, pages) = (parked.pos, parked.seq, parked.state.pages().to_vec());
        core.memory.extend_surely(&mut seq, n);
        let ticket = core.memory.open_copy(&mut self.flight.tickets);
        core.memory.drop_states([parked.state], ticket);
        let hold = core.requests.hold_of(id, pos);
        let run = Run::new(slab, seq, pos, Start::Saved(pos, pages, ticket), parked.due);
        core.requests.start(slot, Run { hold, spare: parked.spare, ..run })?;
        core.journal.counters.unparked += 1;
        let what = What::Resumed { at: pos, history: pos, replayed: 0 };
        core.journal.push(id, core.flights.last(), what);
        Ok(true)
    }

    /// Takes what a parked request junior to this one holds, or any when this one is alone. False: there is none.
    fn reclaim_juniors(&mut self, slot: Slot, alone: bool) -> bool {
        (alone || self.core.requests.has_junior_parked(slot)) && self.reclaim_parked(Some(slot))
    }

    fn explain_start(&mut self, slot: Slot, found: &Match, way: Way, limit: u32) {
        let core = &mut *self.core;
        let request = core.requests.get_mut(slot);
        let reusable = core.memory.reuses(request);
        let c = &mut core.journal.counters;
        c.replayed_tokens += u64::from(way.replayed());
        c.recomputed_tokens += u64::from(request.computed_before.saturating_sub(way.first()));
        let (at, history, replayed) = (way.resumed_at(), found.history, way.replayed());
        if request.explain.preemptions == 0 {
            let reason = if reusable { Reason::of(found, way, limit) } else { Reason::Disabled };
            let prompt_tokens = request.prompt;
            c.prefix_queries += 1;
            c.prompt_tokens += u64::from(prompt_tokens);
            c.matched_tokens += u64::from(history);
            c.resumed_tokens += u64::from(at);
            c.lost[reason as usize] += u64::from(limit - way.first().min(limit));
            let missing = match found.turn.filter(|&(pos, _)| pos > way.first()) {
                Some((_, End::Prompt)) => 0,
                Some((_, End::Output)) => 1,
                None => 2,
            };
            c.stateless[missing] += u64::from(history.saturating_sub(way.first()));
            request.explain = Explain {
                prompt_tokens,
                history_matched: history,
                resumed_at: at,
                replayed,
                reason,
                preemptions: 0,
            };
            if reusable && limit > 0 {
                let first = &request.tokens.all()[..core.memory.block() as usize];
                core.journal.zero_hits.saw(first, at > 0, reason);
            }
        }
        core.journal.push(request.id, core.flights.last(), What::Resumed { at, history, replayed });
    }
}

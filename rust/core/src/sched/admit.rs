//! Admission: over slabs, pages and page-table changes at once, all or nothing.

use crate::cache::{Lost, Match, Sequence};
use crate::core::Core;
use crate::cost::Way;
use crate::error::CoreError;
use crate::event::What;
use crate::fence::Until;
use crate::sched::explain::{Explain, Reason};
use crate::sched::request::{Change, Run, Start};
use crate::sched::step::Draft;
use crate::sched::table::Slot;

impl Core {
    /// Whether trying to admit makes sense: not in a step for which someone had to give way.
    pub(super) fn may_admit(&self) -> bool {
        self.slabs.free() > 0 && !self.gave_way
    }

    /// Gives a waiting request a slab, all pages of its known tokens, and the cheapest start. False: not now.
    pub(super) fn admit(&mut self, slot: Slot, draft: &mut Draft<'_, '_>) -> Result<bool, CoreError> {
        let request = self.table.get(slot);
        let (n, block) = (request.known(), self.shape_block());
        let blocks = n.div_ceil(block);
        let alone = self.table.running.is_empty() && self.flights.is_empty();
        let room = (self.cache.available(), self.table.running.len() as u32);
        // Looking up a long prompt again can wait until there is more than when it did not fit.
        let hopeless =
            request.blocked.is_some_and(|(available, running)| room.0 <= available && room.1 >= running);
        if (hopeless && !alone && self.parked.is_empty())
            || self.slabs.free() == 0
            || blocks > draft.plan.delta_room()
        {
            return Ok(false);
        }
        if request.parked.is_some() && self.unparks(slot, alone, draft)? {
            return Ok(true);
        }
        let request = self.table.get_mut(slot);
        if request.parked.is_some() {
            // It waits with what it holds: a start through the tree as well would hold its history twice.
            return Ok(false);
        }
        let limit = (n - 1) / block * block;
        let found = if self.options.prefix_cache && !request.all_logits {
            self.cache.lookup(&request.salt, request.tokens.all(), limit)
        } else {
            Match { history: 0, snapshots: Vec::new(), lost: Lost::NeverStored, snapshot_evicted: None }
        };
        let mut started = self.start_of(slot, &found, alone, draft);
        while started.is_none() && alone && self.break_pin() {
            started = self.start_of(slot, &found, alone, draft);
        }
        let Some((way, seq, start)) = started else {
            assert!(
                !alone || !self.parked.is_empty(),
                "a request that fits into the pool was not admitted alone"
            );
            self.table.get_mut(slot).blocked = Some(room);
            self.knows(slot, found.history);
            return Ok(false);
        };
        self.explain_start(slot, &found, way, limit);
        let slab = self.slabs.take().expect("a free slab was seen");
        self.epochs += 1;
        let hold = self.hold_of(self.table.get(slot).id, way.first());
        let request = self.table.get_mut(slot);
        request.change(Change::Admit)?;
        request.blocked = None;
        let due = self.options.snapshots.due(block, request.prompt, n, &found);
        request.run = Some(Run {
            computed: 0,
            replay_end: if way.replayed() > 0 { way.resumed_at() } else { 0 },
            hold,
            ..Run::new(self.epochs, slab, seq, way.first(), start, due)
        });
        self.table.start(slot);
        Ok(true)
    }

    /// Attaches to the tree and takes pages, if there are enough and each running request could still get one. Alone, a
    /// start that does not need a saved state's pages besides its own is taken as well.
    fn start_of(
        &mut self,
        slot: Slot,
        found: &Match,
        alone: bool,
        draft: &mut Draft<'_, '_>,
    ) -> Option<(Way, Sequence, Start)> {
        let n = self.table.get(slot).known();
        let spared = self.table.running.len() as u32;
        let mut choices = vec![&found.snapshots[..]];
        if alone {
            choices.push(&[]);
        }
        for snapshots in choices {
            let way = self.options.cost.cheapest(n, found.history, snapshots, self.replay_tokens);
            let request = self.table.get_mut(slot);
            let tokens = request.tokens.all();
            let mut seq = self.cache.attach(&request.salt, tokens, way.resumed_at(), request.hint);
            let leased = if matches!(way, Way::Snapshot { .. }) { self.snapshot_pages } else { 0 };
            let needed = n.div_ceil(self.shape_block()) - seq.pages().len() as u32;
            while self.cache.available() < needed + leased + spared && self.reclaim_juniors(slot, alone) {}
            if self.cache.available() < needed + leased + spared {
                self.cache.release(seq, Until::NOW);
                continue;
            }
            let start = match way {
                Way::Snapshot { pos, id } => {
                    let ticket = self.tickets.open(&mut draft.flight.tickets);
                    Start::Saved(pos, self.cache.lease_snapshot(id, ticket), ticket)
                }
                _ => Start::Empty,
            };
            let taken = self.cache.extend(&mut seq, n);
            assert!(taken.is_ok(), "{needed} pages were available: {taken:?}");
            return Some((way, seq, start));
        }
        None
    }

    /// Lets a parked request go on from its saved state, if its further pages can be had. Otherwise it may lose what it
    /// holds: when it is alone, or when others need it more.
    fn unparks(&mut self, slot: Slot, alone: bool, draft: &mut Draft<'_, '_>) -> Result<bool, CoreError> {
        let (block, spared) = (self.shape_block(), self.table.running.len() as u32);
        loop {
            let request = self.table.get(slot);
            let parked = request.parked.as_ref().expect("it is parked");
            let needed = request.known().div_ceil(block).saturating_sub(parked.seq.pages().len() as u32);
            // Copies on the device keep the order of steps, so the state need not be there yet.
            if draft.flight.tickets.contains(&parked.saved) {
                return Ok(false);
            }
            if self.cache.available() >= needed + spared {
                break;
            }
            if !self.reclaim_juniors(slot, alone) {
                if alone {
                    self.unpark(slot);
                }
                return Ok(false);
            }
        }
        let slab = self.slabs.take().expect("a free slab was seen");
        self.epochs += 1;
        let request = self.table.get_mut(slot);
        let (rank, n) = (request.rank(), request.known());
        let parked = *request.parked.take().expect("it is parked");
        self.parked.remove(&(rank, slot));
        let (pos, mut seq, pages) = (parked.pos, parked.seq, parked.state.pages().to_vec());
        let taken = self.cache.extend(&mut seq, n);
        assert!(taken.is_ok(), "pages were available: {taken:?}");
        let ticket = self.tickets.open(&mut draft.flight.tickets);
        self.cache.drop_snapshot(parked.state, ticket);
        let hold = self.hold_of(self.table.get(slot).id, pos);
        let request = self.table.get_mut(slot);
        request.change(Change::Admit)?;
        request.blocked = None;
        let start = Start::Saved(pos, pages, ticket);
        request.run = Some(Run {
            hold,
            spare: parked.spare,
            ..Run::new(self.epochs, slab, seq, pos, start, parked.due)
        });
        let id = request.id;
        self.table.start(slot);
        self.counters.unparked += 1;
        self.events.push(id, self.last, What::Resumed { at: pos, history: pos, replayed: 0 });
        Ok(true)
    }

    /// Takes what a parked request junior to this one holds, or any when this one is alone. False: there is none.
    fn reclaim_juniors(&mut self, slot: Slot, alone: bool) -> bool {
        let rank = self.table.get(slot).rank();
        let junior = self.parked.last().is_some_and(|&(r, _)| r > rank);
        (alone || junior) && self.reclaim_parked(Some(slot))
    }

    fn explain_start(&mut self, slot: Slot, found: &Match, way: Way, limit: u32) {
        let step = self.last;
        let request = self.table.get_mut(slot);
        let reusable = self.options.prefix_cache && !request.all_logits;
        self.counters.replayed_tokens += u64::from(way.replayed());
        self.counters.recomputed_tokens += u64::from(request.computed_before.saturating_sub(way.first()));
        let (at, history, replayed) = (way.resumed_at(), found.history, way.replayed());
        self.events.push(request.id, step, What::Resumed { at, history, replayed });
        if request.explain.preemptions > 0 {
            return;
        }
        let reason = if reusable { Reason::of(found, way, limit) } else { Reason::Disabled };
        if reusable && limit > 0 {
            self.zero_hits.saw(&request.tokens.all()[..self.block as usize], at > 0, reason);
        }
        let prompt_tokens = request.prompt;
        request.explain = Explain {
            prompt_tokens,
            history_matched: history,
            resumed_at: at,
            replayed,
            reason,
            preemptions: 0,
        };
        let c = &mut self.counters;
        c.prefix_queries += 1;
        c.prompt_tokens += u64::from(prompt_tokens);
        c.matched_tokens += u64::from(history);
        c.resumed_tokens += u64::from(at);
        c.lost[reason as usize] += u64::from(limit - way.first().min(limit));
    }
}

//! Admission: over slabs, pages and page-table changes at once, all or nothing.

use crate::cache::{Lost, Match, Sequence};
use crate::core::Core;
use crate::cost::Way;
use crate::error::CoreError;
use crate::event::What;
use crate::explain::{Explain, Reason};
use crate::ids::Step;
use crate::request::{Change, Rank, Run, Start};
use crate::sched::step::Draft;
use crate::sched::table::Slot;

/// What was there when the first in line could not be admitted: looking up a long prompt again can wait for more.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Blocked {
    rank: Rank,
    available: u32,
    running: usize,
}

impl Blocked {
    fn still_holds(&self, now: &Blocked) -> bool {
        self.rank == now.rank && now.available <= self.available && now.running >= self.running
    }
}

impl Core {
    /// Whether trying to admit makes sense: not in a step for which someone had to give way.
    pub(super) fn may_admit(&self) -> bool {
        self.slabs.free() > 0 && !self.gave_way
    }

    /// Gives the first in line a slab, all pages of its known tokens, and the cheapest start. False: not now.
    pub(super) fn admit(&mut self, slot: Slot, draft: &mut Draft<'_, '_, '_>) -> Result<bool, CoreError> {
        let request = self.table.get(slot);
        let (n, block) = (request.known(), self.shape_block());
        let blocks = n.div_ceil(block);
        let alone = self.table.running.is_empty() && self.flights.is_empty();
        let room = Blocked {
            rank: request.rank,
            available: self.cache.available(),
            running: self.table.running.len(),
        };
        let hopeless = !alone && self.blocked.is_some_and(|before| before.still_holds(&room));
        if hopeless || self.slabs.free() == 0 || blocks > draft.arrays.delta_room() {
            return Ok(false);
        }
        let limit = (n - 1) / block * block;
        let found = if self.options.prefix_cache && !request.all_logits {
            self.cache.lookup(&request.salt, &request.tokens, limit)
        } else {
            Match { history: 0, snapshots: Vec::new(), lost: Lost::NeverStored, snapshot_evicted: None }
        };
        let Some((way, seq, start)) = self.start_of(slot, &found, alone, draft.flight.step) else {
            assert!(!alone, "a request that fits into the pool was not admitted alone");
            self.blocked = Some(room);
            return Ok(false);
        };
        self.blocked = None;
        self.explain_start(slot, &found, way, limit);
        let slab = self.slabs.take().expect("a free slab was seen");
        self.epochs += 1;
        let request = self.table.get_mut(slot);
        request.change(Change::Admit)?;
        request.run = Some(Run {
            epoch: self.epochs,
            slab,
            seq,
            planned: way.first(),
            computed: 0,
            unknown: 0,
            sampled_at: (Step(0), 0),
            replay_end: if way.replayed() > 0 { way.resumed_at() } else { 0 },
            start,
            due: self.options.snapshots.due(block, request.prompt, n, &found),
            told: 0,
            adopted: Vec::new(),
            spare: None,
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
        step: Step,
    ) -> Option<(Way, Sequence, Start)> {
        let request = self.table.get(slot);
        let n = request.known();
        let spared = self.table.running.len() as u32;
        let mut choices = vec![&found.snapshots[..]];
        if alone {
            choices.push(&[]);
        }
        for snapshots in choices {
            let way = self.options.cost.cheapest(n, found.history, snapshots, self.replay_tokens);
            let mut seq = self.cache.attach(&request.salt, &request.tokens, way.resumed_at(), request.hint);
            let leased =
                if matches!(way, Way::Snapshot { .. }) { self.shape.snapshot_pages as u32 } else { 0 };
            let needed = n.div_ceil(self.shape_block()) - seq.pages().len() as u32;
            if self.cache.available() < needed + leased + spared {
                self.cache.release(seq, Step(0));
                continue;
            }
            let start = match way {
                Way::Snapshot { pos, id } => {
                    self.coming = self.coming.max(step);
                    Start::Saved(pos, self.cache.lease_snapshot(id, step))
                }
                _ => Start::Empty,
            };
            let taken = self.cache.extend(&mut seq, n);
            assert!(taken.is_ok(), "{needed} pages were available: {taken:?}");
            return Some((way, seq, start));
        }
        None
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

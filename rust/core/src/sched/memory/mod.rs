//! Memory: the cache, the slabs, what named pins keep, and what waits until it is no longer in use.
//!
//! Everything that a request gives up goes through here *behind* a fence: the last step planned, or the copy that reads it.

mod slabs;

use std::collections::VecDeque;

use self::slabs::Slabs;
use crate::cache::snapshot::SnapshotPages;
use crate::cache::{CacheImage, CacheOptions, Change, KvCache, Match, Sequence, Shortage};
use crate::error::{CoreError, Malformed};
use crate::fence::{Tickets, Until};
use crate::ids::{PageId, PinId, SlabId, SnapshotId, Step, Ticket};
use crate::layout::LayoutSpec;
use crate::options::Options;
use crate::sched::flights::Save;
use crate::sched::policy::{Keep, SnapshotPolicy};
use crate::sched::request::{Parked, Request, Run};

/// What requests compute in and start from.
#[derive(Debug)]
pub struct Memory {
    cache: KvCache,
    slabs: Slabs,
    /// Copies that have not ended.
    tickets: Tickets,
    /// Pins that stand, oldest first.
    pins: VecDeque<PinId>,
    pins_broken: u64,
    reuses: bool,
    block: u32,
    snapshot_pages: u32,
    slab_pages: u32,
}

impl Memory {
    /// All free.
    pub fn new(layout: &LayoutSpec, options: &Options, replay_tokens: u32) -> Result<Self, CoreError> {
        let cache_options = CacheOptions {
            pages: options.pages,
            eviction: options.eviction,
            prefix_cache: options.prefix_cache,
            snapshot_budget: options.snapshot_budget,
            quotas: options.tenants.iter().filter_map(|t| t.quota_pages.map(|q| (t.id, q))).collect(),
            cost: options.cost,
            admit_by_value: options.snapshots == SnapshotPolicy::Auto,
            replay_tokens,
            changes: options.cache_changes,
        };
        Ok(Memory {
            cache: KvCache::new(layout, &cache_options)?,
            slabs: Slabs::new(options.slabs),
            tickets: Tickets::default(),
            pins: VecDeque::new(),
            pins_broken: 0,
            reuses: options.prefix_cache,
            block: layout.block_tokens,
            snapshot_pages: layout.snapshot_pages(),
            slab_pages: layout.slab_pages(),
        })
    }

    /// The cache, to look at.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// The slabs, to look at.
    pub fn slabs(&self) -> &Slabs {
        &self.slabs
    }

    /// Tokens of a page.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Pages of a saved state at a block boundary.
    pub fn snapshot_pages(&self) -> u32 {
        self.snapshot_pages
    }

    /// Pages free or evictable now.
    pub fn available(&self) -> u32 {
        self.cache.available()
    }

    /// Whether prefixes are looked up for a request.
    pub fn reuses(&self, request: &Request) -> bool {
        self.reuses && !request.all_logits
    }

    /// What is known of a request's tokens up to `limit`; `None` where nothing may be reused.
    pub fn lookup(&self, request: &mut Request, limit: u32) -> Option<Match> {
        self.reuses(request).then(|| self.cache.lookup(&request.salt, request.tokens.all(), limit))
    }

    /// Tokens of a waiting request's prefix that are known.
    pub fn known_prefix(&self, request: &mut Request) -> u32 {
        if let Some(parked) = request.parked() {
            return parked.pos;
        }
        let limit = request.known() - 1;
        self.lookup(request, limit).map_or(0, |found| found.history)
    }

    /// A sequence on the first `upto` known tokens of a request, of which `found` was known.
    pub fn attach(&mut self, request: &mut Request, upto: u32, found: &Match) -> Sequence {
        let tokens = request.tokens.all();
        let mut seq = self.cache.attach_found(&request.salt, tokens, upto, request.hint, found);
        seq.asks((request.prompt - 1) / self.block);
        seq
    }

    /// Pages so that the sequence covers `tokens`: all or none.
    pub fn extend(&mut self, seq: &mut Sequence, tokens: u32) -> Result<(), Shortage> {
        self.cache.extend(seq, tokens)
    }

    /// Pages that were seen to be available.
    pub fn extend_surely(&mut self, seq: &mut Sequence, tokens: u32) {
        let taken = self.cache.extend(seq, tokens);
        assert!(taken.is_ok(), "pages were available: {taken:?}");
    }

    /// Gives back a sequence that no step has used.
    pub fn release_unused(&mut self, seq: Sequence) {
        self.cache.release(seq, Until::NOW);
    }

    /// A free slab.
    pub fn take_slab(&mut self) -> Option<SlabId> {
        self.slabs.take()
    }

    /// A new copy of the step being made, whose tickets are in `list`.
    pub fn open_copy(&mut self, list: &mut Vec<Ticket>) -> Ticket {
        self.tickets.open(list)
    }

    /// The pages of a saved state, held until the copy has ended.
    pub fn lease(&mut self, id: SnapshotId, ticket: Ticket) -> Vec<PageId> {
        self.cache.lease_snapshot(id, ticket)
    }

    /// Whether a parked request's state is written.
    pub fn is_written(&self, parked: &Parked) -> bool {
        !self.tickets.is_open(parked.saved)
    }

    /// Whether pages wait until they are no longer in use.
    pub fn has_leaving(&self) -> bool {
        self.cache.has_leaving()
    }

    /// Pages for a state of a run that is worth saving, if at least `least` can be had: a save must not make a request give
    /// way.
    pub fn reserve_state(&mut self, run: &Run, pos: u32, least: u32) -> Option<SnapshotPages> {
        if self.available() < least { None } else { self.cache.reserve_snapshot(&run.seq, pos, true) }
    }

    /// Whether a run can be parked where it is planned to, and `spare` pages more be had.
    pub fn could_park(&self, run: &Run, spare: u32) -> bool {
        let blocks = run.planned.div_ceil(self.block);
        let unused = (run.seq.pages().len() as u32).saturating_sub(blocks);
        run.planned > 0
            && run.planned >= run.replay_end
            && self.available() + unused >= self.state_pages(run.planned) + spare
    }

    /// Pages for the state of a run that is to be parked, for which it gives up those that it does not use. `None`: what is
    /// kept for others is not evicted for a copy; a prompt has its pages back then.
    pub fn reserve_parking(&mut self, run: &mut Run, known: u32) -> Option<SnapshotPages> {
        let pos = run.planned;
        self.cache.shrink(&mut run.seq, pos);
        let reserved = self.cache.reserve(self.state_pages(pos));
        if reserved.is_none() {
            run.told = run.told.min(run.seq.pages().len() as u32);
            if !run.decoding {
                self.extend_surely(&mut run.seq, known);
            }
        }
        reserved
    }

    /// Pages of a saved state at `pos`.
    fn state_pages(&self, pos: u32) -> u32 {
        if pos.is_multiple_of(self.block) { self.snapshot_pages } else { self.slab_pages }
    }

    /// A request has ended as it should.
    pub fn end_turn(&mut self, run: &Run) {
        self.cache.end_turn(&run.seq);
    }

    /// Gives back what a running request holds, in use until then.
    pub fn let_go(&mut self, mut run: Run, keep_state: bool, until: Until) {
        if let Some((pos, pages)) = run.spare.take() {
            let refused = if keep_state {
                self.cache.publish_snapshot(&mut run.seq, pos, pages).err()
            } else {
                Some(pages)
            };
            self.drop_states(refused, until);
        }
        self.cache.release(run.seq, until);
        self.slabs.give_back(run.slab, until);
    }

    /// Gives back the slab of a request that is parked, when its state is written.
    pub fn leave_slab(&mut self, slab: SlabId, saved: Ticket) {
        self.slabs.give_back(slab, saved.into());
    }

    /// Gives back what a parked request holds. A state that is not written yet is lost: what is published can be evicted
    /// and written over at once.
    pub fn let_go_parked(&mut self, parked: Parked, until: Until) {
        // At a boundary of published history the state is a snapshot like any other.
        let written = self.is_written(&parked);
        let Parked { pos, mut seq, state, spare, .. } = parked;
        let state =
            if written { self.cache.publish_snapshot(&mut seq, pos, state).err() } else { Some(state) };
        let spare = spare.and_then(|(pos, pages)| self.cache.publish_snapshot(&mut seq, pos, pages).err());
        self.drop_states(state.into_iter().chain(spare), until);
        self.cache.release(seq, until);
    }

    /// Gives back pages of states, in use until then.
    pub fn drop_states(&mut self, states: impl IntoIterator<Item = SnapshotPages>, until: impl Into<Until>) {
        let until = until.into();
        states.into_iter().for_each(|pages| self.cache.drop_snapshot(pages, until));
    }

    /// The first `end` tokens of a running request are computed: full blocks enter the tree.
    #[inline]
    pub fn computed(&mut self, request: &mut Request, end: u32, until: Until) {
        let Some(run) = request.stage.run_mut() else { return };
        run.computed = end;
        if self.reuses && end / self.block > run.seq.published_blocks() {
            self.publish(request, end, until);
        }
    }

    #[inline(never)]
    fn publish(&mut self, request: &mut Request, end: u32, until: Until) {
        let Some(run) = request.stage.run_mut() else { return };
        let adopted = self.cache.publish(&mut run.seq, &request.tokens.all()[..end as usize], until);
        run.adopted.extend(adopted);
    }

    /// A state at `end` of a run is saved: into the tree, or aside.
    pub fn keep_state(&mut self, run: &mut Run, end: u32, save: Save, until: Until) {
        let refused = match save.keep {
            Keep::Spare => run.spare.replace((end, save.pages)).map(|(_, pages)| pages),
            _ => self.cache.publish_snapshot(&mut run.seq, end, save.pages).err(),
        };
        self.drop_states(refused, until);
    }

    /// All steps up to `done` are over, and these copies have ended.
    pub fn retire(&mut self, done: Step, ended: &[Ticket]) {
        self.tickets.end(ended);
        self.cache.retire(done, ended);
        self.slabs.retire(done, ended);
    }

    /// Keeps the known whole blocks of `tokens` and the saved states on them.
    pub fn pin(&mut self, salt: &[u8], tokens: &[u32]) -> PinId {
        let pin = self.cache.pin(salt, tokens).0;
        self.pins.push_back(pin);
        pin
    }

    /// Ends a pin. False when there is none of that name.
    pub fn unpin(&mut self, pin: PinId) -> bool {
        self.pins.retain(|&p| p != pin);
        self.cache.unpin(pin)
    }

    /// Ends the oldest pin, because a request that `submit` has taken fits no other way. False when there is none.
    pub fn break_pin(&mut self) -> bool {
        let Some(pin) = self.pins.pop_front() else { return false };
        self.pins_broken += 1;
        self.cache.unpin(pin)
    }

    /// Pins ended for requests that did not fit otherwise.
    pub fn pins_broken(&self) -> u64 {
        self.pins_broken
    }

    /// A session is over. False when nothing of it is cached.
    pub fn end_session(&mut self, session: u64) -> bool {
        self.cache.end_session(session)
    }

    /// The time now, for what is kept until a time.
    pub fn set_time(&mut self, now_us: u64) {
        self.cache.set_time(now_us);
    }

    /// Evicts up to `n` saved states. Returns how many went.
    pub fn evict_snapshots(&mut self, n: u32) -> u32 {
        self.cache.evict_snapshots(n)
    }

    /// Evicts up to `n` blocks of history that nobody uses. Returns how many went.
    pub fn evict_history(&mut self, n: u32) -> u32 {
        self.cache.evict_history(n)
    }

    /// Evicts all prefixes that nobody uses. Returns the pages that became free.
    pub fn clear(&mut self) -> u32 {
        self.cache.clear()
    }

    /// What entered and left the tree since the last call.
    pub fn cache_changes(&mut self) -> Vec<Change> {
        self.cache.take_changes()
    }

    /// All that is in the tree.
    pub fn cache_picture(&self) -> Vec<Change> {
        self.cache.picture()
    }

    /// Goes on from the cache of a dump.
    pub fn fill(&mut self, image: &CacheImage) -> Result<(), CoreError> {
        self.cache.fill(image)?;
        self.pins.extend(self.cache.pins());
        Ok(())
    }

    /// Every count, from what requests hold: sequences, saved states, slabs, and copies in flight.
    pub fn check<'a>(
        &'a self,
        sequences: impl Iterator<Item = &'a Sequence>,
        states: impl Iterator<Item = &'a SnapshotPages>,
        slabs: impl Iterator<Item = SlabId>,
        copies: usize,
    ) -> Result<(), Malformed> {
        self.cache.check(sequences, states)?;
        self.slabs.check(slabs)?;
        Malformed::unless(copies == self.tickets.open_count(), "copies end with their step", || {
            format!("{copies} in flight, {} open", self.tickets.open_count())
        })
    }
}

//! Room for what is needed: who goes, and what is remembered of it.

use super::{Eviction, KvCache, Leaving, Shortage};
use crate::cache::eviction::{Item, Standing};
use crate::cache::ghosts::name_of;
use crate::cache::worth::List;
use crate::ids::SnapshotId;

impl KvCache {
    /// Pages free or evictable now.
    pub fn available(&self) -> u32 {
        self.pool.free() + self.tree.unpinned_blocks() + self.evictable_snapshot_pages()
    }

    fn evictable_snapshot_pages(&self) -> u32 {
        // A leased snapshot's pages stay with the lease; leases end with their copy and are few.
        let pages = |l: &Leaving| if let Leaving::Pages(p) = l { p.len() as u32 } else { 0 };
        let leased: u32 = self.leaving.iter().map(pages).sum();
        ((self.snapshots.count() - self.held_snapshots) * self.snapshot_pages).saturating_sub(leased)
    }

    /// Evicts no more than is needed, and only when that will be enough. What is kept until a time goes only for running
    /// requests, not for `copies` of their state.
    pub(super) fn make_room(&mut self, needed: u32, copies: bool) -> Result<(), Shortage> {
        if self.pool.free() >= needed {
            return Ok(());
        }
        let shortage = Shortage { needed, available: self.available() };
        if shortage.available < needed {
            return Err(shortage);
        }
        while self.pool.free() < needed {
            let short = needed - self.pool.free();
            let victim = self.victim().filter(|&(item, _)| !copies || !self.is_kept(item));
            let Some((item, most)) = victim else {
                return Err(Shortage { needed, available: self.pool.free() });
            };
            self.evict(item, short.min(most));
        }
        Ok(())
    }

    /// Who goes next, and how many pages of it at most. Blocks with a state at their end lose that first: it has nothing to
    /// stand on without them.
    pub(super) fn victim(&mut self) -> Option<(Item, u32)> {
        self.relist_expired();
        let (item, most) = self.worst()?;
        let state = if let Item::Blocks(id) = item { self.tree.node(id).snapshot } else { None };
        Some((state.map_or(item, |s| Item::Snapshot(s.0)), most))
    }

    /// Tenants beyond their quota go first, then snapshots beyond their budget, then what is worth least.
    fn worst(&self) -> Option<(Item, u32)> {
        let over = self.quotas.over().find_map(|(t, by)| self.worth.of_tenant(t).map(|item| (item, by)));
        if over.is_some() {
            return over;
        }
        let beyond = self.beyond_budget().then(|| self.worth.victim(Some(true), self.now));
        let worst = beyond.flatten().or_else(|| self.worth.victim(None, self.now));
        worst.map(|item| (item, u32::MAX))
    }

    pub(super) fn list_of(&self, item: Item) -> Option<List> {
        match item {
            Item::Blocks(id) => self.tree.node(id).listed,
            Item::Snapshot(id) => self.snapshots.get(SnapshotId(id)).listed,
        }
    }

    fn is_kept(&self, item: Item) -> bool {
        self.list_of(item) == Some(List::Kept)
    }

    /// Whether snapshots fill more than their share of the pool.
    pub(super) fn beyond_budget(&self) -> bool {
        let most = self.options.snapshot_budget * f64::from(self.pool.len());
        f64::from(self.snapshots.count() * self.snapshot_pages) > most
    }

    /// Evicts a snapshot, or up to `most` blocks from the end of a leaf.
    pub(super) fn evict(&mut self, item: Item, most: u32) {
        match item {
            Item::Snapshot(id) => self.evict_snapshot(SnapshotId(id)),
            Item::Blocks(node) => self.evict_blocks(node, most),
        }
    }

    pub(super) fn evict_snapshot(&mut self, id: SnapshotId) {
        self.unlist_snapshot(id);
        let entry = self.snapshots.remove(id);
        let n = self.tree.node_mut(entry.node);
        (n.snapshot, n.facts.lost_snapshot) = (None, true);
        if !entry.superseded {
            self.worth.evicted(entry.past(), self.now - entry.used, self.snapshot_pages);
        }
        self.quotas.take(entry.tenant, self.snapshot_pages);
        self.weigh_again(&entry);
        entry.pages.0.into_iter().for_each(|p| self.pool.release(p));
        self.counters.snapshots_evicted += 1;
    }

    /// Evicts the last blocks of a leaf, and the state at its end.
    fn evict_blocks(&mut self, id: u32, most: u32) {
        if let Some(snapshot) = self.tree.node(id).snapshot {
            self.evict_snapshot(snapshot);
        }
        self.unlist_blocks(id);
        let n = self.tree.node(id);
        let (facts, parent, root, start) = (n.facts, n.parent, n.root, n.start);
        let count = most.min(n.pages.len() as u32);
        self.remember(id, count);
        let mut popped = std::mem::take(&mut self.popped);
        let whole = self.tree.pop_blocks(id, count, &mut popped);
        debug_assert!(whole || self.tree.node(id).start == start);
        if let Some(changes) = &mut self.changes {
            changes.removed(&popped);
        }
        popped.drain(..).for_each(|p| self.pool.release(p));
        self.popped = popped;
        self.worth.evicted(facts.past(), self.now - facts.used, count);
        self.quotas.take(facts.tenant, count);
        self.counters.evicted_blocks += u64::from(count);
        self.list_blocks(if whole { parent } else { id });
        self.drop_idle_root(root);
    }

    /// Leaves a ghost of the first of the last `count` blocks of a leaf.
    fn remember(&mut self, id: u32, count: u32) {
        let n = self.tree.node(id);
        let first = n.pages.len() - count as usize;
        let before = match first {
            0 => self.tree.node(n.parent).pages.last(),
            i => n.pages.get(i - 1),
        };
        let before = before.map_or(&[][..], |&p| self.tree.tokens_of(p));
        let seed = self.salts[&n.root].1;
        let name = name_of(seed, n.start + first as u32, before, self.tree.tokens_of(n.pages[first]));
        self.ghosts.note(name, n.facts.uses);
    }

    pub(super) fn standing_of(&self, item: Item) -> Standing {
        match item {
            Item::Blocks(id) => self.standing_of_blocks(id),
            Item::Snapshot(id) => self.standing_of_snapshot(SnapshotId(id)),
        }
    }

    fn standing_of_blocks(&self, id: u32) -> Standing {
        let n = self.tree.node(id);
        let f = &n.facts;
        Standing {
            born: f.born,
            used: f.used,
            expiry: f.expiry,
            dead: f.ended,
            level: if f.expiry > 0 && f.expiry <= self.now_us { 0 } else { f.level },
            octave: if self.worth.weighs_cost() { self.octave_of_block(n.end()) } else { 0 },
            past: f.past(),
            tenant: f.tenant,
        }
    }

    fn standing_of_snapshot(&self, id: SnapshotId) -> Standing {
        let e = self.snapshots.get(id);
        Standing {
            born: e.born,
            used: e.used,
            expiry: e.expiry,
            dead: e.superseded,
            level: if e.expiry > 0 && e.expiry <= self.now_us { 0 } else { e.level },
            octave: if self.worth.weighs_cost() { e.octave } else { 0 },
            past: e.past(),
            tenant: e.tenant,
        }
    }

    /// Lists the blocks of a node if it is a leaf that nobody uses.
    pub(super) fn list_blocks(&mut self, id: u32) {
        if self.tree.node(id).is_free_leaf() && self.tree.node(id).listed.is_none() {
            let standing = self.standing_of_blocks(id);
            let list = self.worth.insert(Item::Blocks(id), &standing, self.now_us);
            self.tree.node_mut(id).listed = Some(list);
        }
    }

    /// Takes the blocks of a node off their list, if they are on one.
    pub(super) fn unlist_blocks(&mut self, id: u32) {
        if let Some(list) = self.tree.node_mut(id).listed.take() {
            let standing = self.standing_of_blocks(id);
            self.worth.remove(Item::Blocks(id), list, &standing);
        }
    }

    /// Lists a snapshot unless a pin keeps it.
    pub(super) fn list_snapshot(&mut self, id: SnapshotId) {
        let e = self.snapshots.get(id);
        if e.holds == 0 && e.listed.is_none() {
            let standing = self.standing_of_snapshot(id);
            let list = self.worth.insert(Item::Snapshot(id.0), &standing, self.now_us);
            self.snapshots.get_mut(id).listed = Some(list);
        }
    }

    pub(super) fn unlist_snapshot(&mut self, id: SnapshotId) {
        if let Some(list) = self.snapshots.get_mut(id).listed.take() {
            let standing = self.standing_of_snapshot(id);
            self.worth.remove(Item::Snapshot(id.0), list, &standing);
        }
    }

    /// What was to be kept until now takes its ordinary place.
    fn relist_expired(&mut self) {
        while let Some(item) = self.worth.expired(self.now_us) {
            match item {
                Item::Blocks(id) => {
                    self.unlist_blocks(id);
                    self.list_blocks(id);
                }
                Item::Snapshot(id) => {
                    self.unlist_snapshot(SnapshotId(id));
                    self.list_snapshot(SnapshotId(id));
                }
            }
        }
    }

    /// Evicts up to `n` snapshots, first to go first, and no history. Returns how many went.
    pub fn evict_snapshots(&mut self, n: u32) -> u32 {
        self.relist_expired();
        let mut gone = 0;
        while gone < n
            && let Some(item) = self.worth.victim(Some(true), self.now)
        {
            self.evict(item, 1);
            gone += 1;
        }
        gone
    }

    /// Evicts up to `n` blocks nobody uses, first to go first, each with the snapshot that stands on it.
    pub fn evict_history(&mut self, n: u32) -> u32 {
        self.relist_expired();
        let before = self.counters.evicted_blocks;
        let gone = |cache: &Self| (cache.counters.evicted_blocks - before) as u32;
        while gone(self) < n
            && let Some(item) = self.worth.victim(Some(false), self.now)
        {
            self.evict(item, n - gone(self));
        }
        gone(self)
    }

    /// Evicts everything that nobody uses. Returns the number of pages that became free.
    pub fn clear(&mut self) -> u32 {
        let before = self.pool.free();
        while let Some((item, _)) = self.victim() {
            self.evict(item, u32::MAX);
        }
        self.pool.free() - before
    }

    /// Bytes of bookkeeping: tree, order, snapshots, ghosts and pool; the tokens themselves are left out.
    pub fn metadata_bytes(&self) -> usize {
        let fixed = self.ghosts.bytes() + self.pool.bytes();
        self.tree.metadata_bytes() + self.worth.bytes() + self.snapshots.bytes() + fixed
    }

    /// The policy in force.
    pub fn eviction(&self) -> Eviction {
        self.options.eviction
    }
}

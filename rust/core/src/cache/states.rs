//! Saved states: whether one is worth its pages, where it lies, and what it replaces.

use super::{KvCache, Leaving, Sequence};
use crate::cache::eviction::{Past, Standing};
use crate::cache::snapshot::{Entry, SnapshotPages};
use crate::cache::worth::List;
use crate::fence::Until;
use crate::ids::{PageId, SnapshotId};

/// A state that was used more than once is wanted by more than the one who continues it.
const SHARED: u8 = 2;

/// A state is refused only when it looks worth this much less than what would go for it: snapshots have a budget besides.
const LENIENCY: f64 = 4.0;

/// Every so many states are saved although they look worth less than what they push out: nothing else would show that they
/// have become worth more.
const EXPLORE: u64 = 16;

impl KvCache {
    /// Binary logarithm of the cost that a page saves, relative to a page at the start of a prompt.
    fn octave(&self, saved_us: f64, pages: u32) -> i8 {
        let unit = self.options.cost.compute(0, self.block).max(f64::MIN_POSITIVE);
        (saved_us / (unit * f64::from(pages))).log2().round().clamp(-8.0, 8.0) as i8
    }

    /// Of the block that ends after `end` blocks.
    pub(super) fn octave_of_block(&self, end: u32) -> i8 {
        self.octave(self.options.cost.compute((end - 1) * self.block, end * self.block), 1)
    }

    /// What a state at `pos` of the sequence saves: the way from the state before, or a replay, whichever is cheaper.
    fn saved_by_state(&self, seq: &Sequence, pos: u32) -> f64 {
        let cost = &self.options.cost;
        let live = |id: u32| {
            let n = self.tree.node(id);
            let at = n.end() * self.block;
            n.snapshot.filter(|&s| at < pos && !self.snapshots.get(s).superseded).map(|_| at)
        };
        let before = self.tree.path(seq.cursor).find_map(live).unwrap_or(0);
        let replay = cost.replay_factor * cost.compute(pos.saturating_sub(self.options.replay_tokens), pos);
        cost.compute(before, pos).min(if pos > self.options.replay_tokens { replay } else { f64::INFINITY })
            - cost.restore_us
    }

    /// Pages for the state at `pos` of a sequence, if it is worth them. Without `may_evict` only free pages are taken.
    pub fn reserve_snapshot(&mut self, seq: &Sequence, pos: u32, may_evict: bool) -> Option<SnapshotPages> {
        let n = self.snapshot_pages;
        let short = self.pool.free() < n;
        if !self.options.prefix_cache || (short && !may_evict) {
            return None;
        }
        if self.options.admit_by_value && !self.is_worth_saving(seq, pos, short) {
            self.counters.snapshots_declined += 1;
            if !self.counters.snapshots_declined.is_multiple_of(EXPLORE) {
                return None;
            }
        }
        self.reserve(n)
    }

    /// `n` pages for a state, evicting what must be, but nothing that is to be kept.
    pub fn reserve(&mut self, n: u32) -> Option<SnapshotPages> {
        self.make_room(n, true).ok()?;
        let mut pages = Vec::new();
        self.pool.alloc(n, &mut pages).then_some(SnapshotPages(pages))
    }

    /// Whether a state saves anything and, while memory is short, more than what goes for it. Both are compared at the age
    /// that the victim has reached.
    fn is_worth_saving(&mut self, seq: &Sequence, pos: u32, short: bool) -> bool {
        let saved = self.saved_by_state(seq, pos);
        if saved <= 0.0 || !short {
            return saved > 0.0;
        }
        let Some((item, _)) = self.victim() else { return false };
        if self.list_of(item) != Some(List::Live) {
            return true;
        }
        let theirs = self.standing_of(item);
        let age = self.now.saturating_sub(self.worth.key_of(&theirs));
        let past = Past { snapshot: true, uses: 0, grown: false };
        let octave = self.octave(saved, self.snapshot_pages);
        let mine = Standing { level: seq.hint.level(), octave, past, ..theirs };
        LENIENCY * self.worth.worth(&mine, age) >= self.worth.worth(&theirs, age)
    }

    /// Stores a saved state at position `pos` of the sequence's published path. Hands the pages back when the path is not
    /// published that far or has a state there already.
    pub fn publish_snapshot(
        &mut self,
        seq: &mut Sequence,
        pos: u32,
        pages: SnapshotPages,
    ) -> Result<SnapshotId, SnapshotPages> {
        let blocks = pos / self.block;
        if !pos.is_multiple_of(self.block) || blocks == 0 || blocks > seq.published {
            return Err(pages);
        }
        let node = self.tree.split(self.tree.node_at(seq.cursor, blocks), blocks);
        if self.tree.node(node).snapshot.is_some() {
            return Err(pages);
        }
        self.now += 1;
        let octave = self.octave(self.saved_by_state(seq, pos).max(0.0), self.snapshot_pages);
        let entry = Entry {
            node,
            pages,
            born: self.now,
            used: self.now,
            expiry: seq.hint.expiry(self.now_us),
            tenant: seq.hint.tenant,
            uses: 0,
            level: seq.hint.level(),
            octave,
            superseded: false,
            holds: 0,
            listed: None,
        };
        let id = self.snapshots.insert(entry);
        let n = self.tree.node_mut(node);
        (n.snapshot, n.facts.lost_snapshot) = (Some(id), false);
        self.quotas.add(seq.hint.tenant, self.snapshot_pages);
        self.list_snapshot(id);
        self.supersede_on_path(node);
        self.supersede_in_session(seq, id);
        self.counters.snapshots_taken += 1;
        Ok(id)
    }

    /// The state before a new one, if nothing branches off between them, is the first to go. With `admit_by_value` the one
    /// before that goes at once: two are kept at each tip, since the next prompt may leave out the end of this one's output.
    fn supersede_on_path(&mut self, node: u32) {
        let mut at = self.tree.node(node).parent;
        let mut newest = true;
        while !self.tree.node(at).is_root() && self.tree.node(at).children == 1 {
            if let Some(id) = self.tree.node(at).snapshot {
                if !newest {
                    let e = self.snapshots.get(id);
                    if self.options.admit_by_value && e.superseded && e.holds == 0 {
                        self.evict_snapshot(id);
                    }
                    return;
                }
                self.supersede(id);
                newest = false;
            }
            at = self.tree.node(at).parent;
        }
    }

    /// The newest state of a session replaces the one before.
    fn supersede_in_session(&mut self, seq: &Sequence, id: SnapshotId) {
        let Some(key) = seq.hint.retention.session else { return };
        let born = self.snapshots.get(id).born;
        let before = self.session(key).snapshot.replace((id, born));
        if let Some((old, born)) = before
            && self.snapshots.is(old, born)
            && self.tree.node(self.snapshots.get(old).node).children <= 1
        {
            self.supersede(old);
        }
    }

    pub(super) fn supersede(&mut self, id: SnapshotId) {
        if self.snapshots.get(id).uses < SHARED {
            self.unlist_snapshot(id);
            self.snapshots.get_mut(id).superseded = true;
            self.list_snapshot(id);
        }
    }

    /// Gives back pages of a state that will not be stored, in use until then.
    pub fn drop_snapshot(&mut self, pages: SnapshotPages, until: impl Into<Until>) {
        self.leave(Leaving::Pages(pages.0), until.into());
    }

    /// The pages of a saved state, held until then whatever happens to the snapshot meanwhile.
    pub fn lease_snapshot(&mut self, id: SnapshotId, until: impl Into<Until>) -> Vec<PageId> {
        self.now += 1;
        self.unlist_snapshot(id);
        let (now, now_us) = (self.now, self.now_us);
        let e = self.snapshots.get_mut(id);
        let f = &self.tree.node(e.node).facts;
        self.worth.used(e.past(), now - e.used, e.pages.0.len() as u32);
        (e.used, e.superseded, e.uses) = (now, false, e.uses.saturating_add(1));
        // The blocks below have just been attached with the same hint.
        e.level = if e.expiry <= now_us { f.level } else { e.level.max(f.level) };
        e.expiry = e.expiry.max(f.expiry);
        let pages = e.pages.0.clone();
        self.list_snapshot(id);
        self.counters.snapshots_used += 1;
        pages.iter().for_each(|&p| self.pool.retain(p));
        self.leave(Leaving::Pages(pages.clone()), until.into());
        pages
    }
}

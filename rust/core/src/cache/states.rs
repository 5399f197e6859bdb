//! Saved states: whether one is worth its pages, where it lies, and what it replaces.

use super::{KvCache, Leaving, Sequence};
use crate::cache::eviction::{Past, Standing};
use crate::cache::snapshot::{Entry, SnapshotPages};
use crate::cache::turns::End;
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

    /// What a state at `pos` on the path to `node` saves: the way from the state before, or a replay, whichever is cheaper.
    fn saved_by_state(&self, node: u32, pos: u32) -> f64 {
        let cost = &self.options.cost;
        let live = |id: u32| {
            let n = self.tree.node(id);
            let at = n.end() * self.block;
            n.snapshot.filter(|&s| at < pos && !self.snapshots.get(s).superseded).map(|_| at)
        };
        // From a state further back than a replay begins the way is longer than the replay.
        let from = pos.saturating_sub(self.options.replay_tokens);
        let mut near = self.tree.path(node).take_while(|&id| self.tree.node(id).end() * self.block >= from);
        let before = near.find_map(live).unwrap_or(0);
        let replay = cost.replay_factor * cost.compute(from, pos);
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
        let wanted =
            if seq.asked > 0 && pos > seq.asked * self.block { 1.0 - self.drops_output(seq) } else { 1.0 };
        let saved = wanted * self.saved_by_state(seq.cursor, pos);
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
        let octave = self.octave(self.saved_by_state(seq.cursor, pos).max(0.0), self.snapshot_pages);
        let end = self.options.admit_by_value.then(|| self.end_at(seq, blocks)).flatten();
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
            end,
            drops_output: self.drops_output(seq),
            pair: None,
            superseded: false,
            holds: 0,
            listed: None,
        };
        let id = self.snapshots.insert(entry);
        let n = self.tree.node_mut(node);
        (n.snapshot, n.facts.lost_snapshot) = (Some(id), false);
        self.quotas.add(seq.hint.tenant, self.snapshot_pages);
        self.list_snapshot(id);
        let pair = (end == Some(End::Output)).then(|| self.pair_up(seq, id)).flatten();
        self.supersede_on_path(node, pair);
        self.supersede_in_session(seq, id, pair);
        if end.is_some() {
            self.weigh_turn(id);
        }
        self.counters.snapshots_taken += 1;
        Ok(id)
    }

    /// The state before a new one, if nothing branches off between them, is the first to go. With `admit_by_value` the one
    /// before that goes at once: two are kept at each tip, since the next prompt may leave out the end of this one's output.
    /// Neither is, until a later turn comes, where they are the `pair` of one turn: then the worth of each decides.
    fn supersede_on_path(&mut self, node: u32, pair: Option<SnapshotId>) {
        let mut at = self.tree.node(node).parent;
        let mut newest = true;
        while !self.tree.node(at).is_root() && self.goes_one_way(at) {
            if let Some(id) = self.tree.node(at).snapshot {
                if !newest {
                    let e = self.snapshots.get(id);
                    if self.options.admit_by_value && e.superseded && e.holds == 0 {
                        self.evict_snapshot(id);
                    }
                    return;
                }
                if pair != Some(id) {
                    self.supersede_turn(id);
                }
                newest = false;
            }
            at = self.tree.node(at).parent;
        }
    }

    /// The newest state of a session replaces the one before.
    fn supersede_in_session(&mut self, seq: &Sequence, id: SnapshotId, pair: Option<SnapshotId>) {
        let Some(key) = seq.hint.retention.session else { return };
        let born = self.snapshots.get(id).born;
        let before = self.session(key).snapshot.replace((id, born));
        if let Some((old, born)) = before
            && self.snapshots.is(old, born)
            && pair != Some(old)
            && self.goes_one_way(self.snapshots.get(old).node)
        {
            self.supersede_turn(old);
        }
    }

    /// Which end of its turn the boundary after `blocks` of a sequence is.
    fn end_at(&self, seq: &Sequence, blocks: u32) -> Option<End> {
        let end = if blocks > seq.asked { End::Output } else { End::Prompt };
        (seq.asked > 0 && blocks >= seq.asked).then_some(end)
    }

    /// Makes a state at an output's end and the one at its prompt's end a pair; returns the latter.
    fn pair_up(&mut self, seq: &Sequence, output: SnapshotId) -> Option<SnapshotId> {
        let node = self.tree.node_at(seq.cursor, seq.asked);
        let n = self.tree.node(node);
        let prompt = n.snapshot.filter(|&s| n.end() == seq.asked && !self.snapshots.get(s).superseded)?;
        let born = (self.snapshots.get(prompt).born, self.snapshots.get(output).born);
        let drops_output = self.snapshots.get(output).drops_output;
        let e = self.snapshots.get_mut(prompt);
        (e.end, e.drops_output, e.pair) = (Some(End::Prompt), drops_output, Some((output, born.1)));
        self.snapshots.get_mut(output).pair = Some((prompt, born.0));
        Some(prompt)
    }

    /// The other state of a turn, if it is there.
    pub(super) fn other_end(&self, id: SnapshotId) -> Option<SnapshotId> {
        self.snapshots.get(id).pair.filter(|&(other, born)| self.snapshots.is(other, born)).map(|pair| pair.0)
    }

    /// Values both states of a turn by what each saves beside the other, times the likelihood that it is the one wanted.
    fn weigh_turn(&mut self, id: SnapshotId) {
        let other = self.other_end(id);
        if !self.worth.weighs_cost() {
            let prompt_goes = self.snapshots.get(id).drops_output < 0.5;
            let end = if prompt_goes { End::Prompt } else { End::Output };
            for s in [id, other.unwrap_or(id)] {
                if other.is_some() && self.snapshots.get(s).end == Some(end) {
                    self.supersede(s);
                }
            }
            return;
        }
        for id in [Some(id), other].into_iter().flatten() {
            let e = self.snapshots.get(id);
            let wanted = match e.end {
                Some(End::Output) => 1.0 - e.drops_output,
                // Others want it as well, or it serves for both.
                _ if e.uses > 0 || other.is_none() => 1.0,
                _ => e.drops_output,
            };
            let pos = self.tree.node(e.node).end() * self.block;
            let octave =
                self.octave((wanted * self.saved_by_state(e.node, pos)).max(0.0), self.snapshot_pages);
            self.unlist_snapshot(id);
            self.snapshots.get_mut(id).octave = octave;
            self.list_snapshot(id);
        }
    }

    /// A state of a turn has gone: what the other one saves is more now.
    pub(super) fn weigh_again(&mut self, gone: &Entry) {
        let other = gone.pair.filter(|&(other, born)| self.snapshots.is(other, born));
        if let Some((other, _)) = other
            && !self.snapshots.get(other).superseded
        {
            self.weigh_turn(other);
        }
    }

    /// A later turn has come: neither state of this one is needed for the next.
    fn supersede_turn(&mut self, id: SnapshotId) {
        let other = self.other_end(id);
        [Some(id), other].into_iter().flatten().for_each(|s| self.supersede(s));
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

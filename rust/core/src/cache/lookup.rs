//! What is known of a prompt, and why not more.

use super::KvCache;
use crate::cache::ghosts::name_of;
use crate::cache::tree::{Walk, hash_block};
use crate::cache::turns::End;
use crate::ids::SnapshotId;

/// Why a prefix was not known any further.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lost {
    /// All of it was known.
    Nothing,
    /// The next block was never stored.
    NeverStored,
    /// The next block was stored once and evicted.
    HistoryEvicted,
    /// The first block is known, but under another salt only.
    Salt,
    /// The prompt has no whole block that could be shared.
    BelowBlock,
}

/// What is known of a prompt.
#[derive(Clone, Debug)]
pub struct Match {
    /// Tokens with history, a multiple of the block size.
    pub history: u32,
    /// Saved states on the way, by position, ascending; all within `history`.
    pub snapshots: Vec<(u32, SnapshotId)>,
    /// Why `history` ends where it ends.
    pub lost: Lost,
    /// The deepest position at which a saved state was evicted.
    pub snapshot_evicted: Option<u32>,
    /// The deepest end of an earlier turn, and its position.
    pub turn: Option<(u32, End)>,
    /// The way to where `history` ends.
    pub(crate) walk: Walk,
}

impl Match {
    /// No token is known.
    pub fn nothing(lost: Lost) -> Match {
        Match {
            history: 0,
            snapshots: Vec::new(),
            lost,
            snapshot_evicted: None,
            turn: None,
            walk: Walk::default(),
        }
    }
}

impl KvCache {
    /// How far whole blocks of `tokens` are known, at most `limit` tokens. Changes nothing, recency included.
    pub fn lookup(&self, salt: &[u8], tokens: &[u32], limit: u32) -> Match {
        let limit = limit.min(tokens.len() as u32) / self.block;
        if limit == 0 {
            return Match::nothing(Lost::BelowBlock);
        }
        let Some(&root) = self.roots.get(salt) else {
            return Match::nothing(self.loss(self.seed(salt), tokens, 0));
        };
        let walk = self.tree.walk(root, &tokens[..(limit * self.block) as usize]);
        let (mut snapshots, mut evicted) = (Vec::new(), None);
        for n in self.tree.path(walk.node).map(|id| self.tree.node(id)) {
            if n.end() <= walk.blocks {
                snapshots.extend(n.snapshot.map(|s| (n.end() * self.block, s)));
                evicted = evicted.max(n.facts.lost_snapshot.then_some(n.end() * self.block));
            }
        }
        snapshots.reverse();
        let lost = if walk.blocks == limit {
            Lost::Nothing
        } else {
            self.loss(self.salts[&root].1, tokens, walk.blocks)
        };
        let turn = self.last_turn(walk.node, walk.blocks);
        let turn = turn.map(|(id, t)| (self.tree.node(id).end() * self.block, t.end));
        Match { history: walk.blocks * self.block, snapshots, lost, snapshot_evicted: evicted, turn, walk }
    }

    /// Why block `index` of `tokens` is not known.
    fn loss(&self, seed: u64, tokens: &[u32], index: u32) -> Lost {
        if self.ghosts.find(self.name(seed, tokens, index)).is_some() {
            Lost::HistoryEvicted
        } else if index == 0 && self.tree.is_first_of_any(&tokens[..self.block as usize]) {
            Lost::Salt
        } else {
            Lost::NeverStored
        }
    }

    /// The name of block `index` of `tokens` among the evicted ones.
    pub(super) fn name(&self, seed: u64, tokens: &[u32], index: u32) -> u64 {
        let (at, block) = ((index * self.block) as usize, self.block as usize);
        let before = if index == 0 { &[][..] } else { &tokens[at - block..at] };
        name_of(seed, index, before, &tokens[at..at + block])
    }

    pub(super) fn seed(&self, salt: &[u8]) -> u64 {
        let words: Vec<u32> = salt.iter().map(|&b| u32::from(b)).collect();
        hash_block(self.fingerprint, &words)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cache::retention::Hint;
    use crate::cache::{CacheOptions, Eviction};
    use crate::ids::{PageId, Step};
    use crate::layout::presets;

    const BLOCK: u32 = 4;

    fn store(cache: &mut KvCache, tokens: &[u32]) -> Vec<PageId> {
        let known = cache.lookup(b"", tokens, tokens.len() as u32).history;
        let mut seq = cache.attach(b"", tokens, known, Hint::default());
        cache.extend(&mut seq, tokens.len() as u32).unwrap();
        cache.publish(&mut seq, tokens, Step(0));
        let pages = seq.pages().to_vec();
        cache.release(seq, Step(0));
        pages
    }

    /// Pages of the first `blocks` blocks, by way of an earlier lookup.
    fn pages_by(cache: &mut KvCache, found: &Match, tokens: &[u32], blocks: u32) -> Vec<PageId> {
        let seq = cache.attach_found(b"", tokens, blocks * BLOCK, Hint::default(), found);
        let pages = seq.pages().to_vec();
        cache.release(seq, Step(0));
        pages
    }

    #[test]
    fn a_lookup_finds_the_same_pages_after_the_tree_has_changed() {
        let options = CacheOptions { pages: 32, eviction: Eviction::LRU, ..CacheOptions::default() };
        let mut cache = KvCache::new(&presets::toy(BLOCK, 6, 3), &options).unwrap();
        let prompt: Vec<u32> = (0..8 * BLOCK).collect();
        let pages = store(&mut cache, &prompt);
        let found = cache.lookup(b"", &prompt, 8 * BLOCK);
        let branch = [&prompt[..4 * BLOCK as usize], &[77; 16]].concat();
        store(&mut cache, &branch);
        assert!(cache.tree.part_of(found.walk, 0, 8).is_some(), "an edge was split: no look at tokens");
        for blocks in [0, 2, 4, 7, 8] {
            assert_eq!(pages_by(&mut cache, &found, &prompt, blocks), pages[..blocks as usize]);
        }
        assert_eq!(cache.evict_history(16), 12);
        (0..3).for_each(|i| drop(store(&mut cache, &[90 + i; 8])));
        let pages = store(&mut cache, &prompt);
        assert!(cache.tree.part_of(found.walk, 0, 8).is_none(), "its node may be another's now");
        assert_eq!(pages_by(&mut cache, &found, &prompt, 8), pages);
    }
}

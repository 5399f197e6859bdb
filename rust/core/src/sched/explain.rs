//! What of a prompt was reused, and why not more.

use std::collections::{HashMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::cache::tree::hash_block;
use crate::cache::{Lost, Match};
use crate::cost::Way;
use crate::ids::RequestId;

/// Why less was reused than the prompt's whole blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Reason {
    /// All of it was reused.
    #[default]
    None,
    /// The next block was never stored.
    NeverStored,
    /// The saved state there was evicted.
    SnapshotEvicted,
    /// The next block was evicted.
    HistoryEvicted,
    /// The prompt's first block is known, but under another salt only.
    Salt,
    /// The prompt has no whole block before its last token.
    BelowBlock,
    /// There was more history, but starting earlier was cheaper.
    DeclinedByCost,
    /// Prefix reuse is off, or all logits were asked for.
    Disabled,
}

impl Reason {
    /// Every reason, in the order of `stats()`.
    pub const ALL: [Reason; 8] = [
        Reason::None,
        Reason::NeverStored,
        Reason::SnapshotEvicted,
        Reason::HistoryEvicted,
        Reason::Salt,
        Reason::BelowBlock,
        Reason::DeclinedByCost,
        Reason::Disabled,
    ];

    /// As it reads in usage, metrics and logs.
    pub fn name(self) -> &'static str {
        match self {
            Reason::None => "none",
            Reason::NeverStored => "never_stored",
            Reason::SnapshotEvicted => "snapshot_evicted",
            Reason::HistoryEvicted => "history_evicted",
            Reason::Salt => "salt",
            Reason::BelowBlock => "below_block",
            Reason::DeclinedByCost => "declined_by_cost",
            Reason::Disabled => "disabled",
        }
    }

    /// The reason for taking `way` where `found` was known and `limit` tokens could have been reused at most. What was
    /// known but not used comes before what was not known.
    pub fn of(found: &Match, way: Way, limit: u32) -> Reason {
        let evicted_beyond = found.snapshot_evicted.is_some_and(|p| p > way.first());
        if limit == 0 {
            Reason::BelowBlock
        } else if way.resumed_at() < found.history || way.replayed() > 0 {
            match way {
                _ if evicted_beyond => Reason::SnapshotEvicted,
                _ if way.resumed_at() < found.history => Reason::DeclinedByCost,
                _ => Self::of_lost(found.lost),
            }
        } else {
            Self::of_lost(found.lost)
        }
    }

    fn of_lost(lost: Lost) -> Reason {
        match lost {
            Lost::Nothing => Reason::None,
            Lost::NeverStored => Reason::NeverStored,
            Lost::HistoryEvicted => Reason::HistoryEvicted,
            Lost::Salt => Reason::Salt,
            Lost::BelowBlock => Reason::BelowBlock,
        }
    }
}

/// The explanation of one request. Counts are tokens of its first admission; preemptions are counted to the end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Explain {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens with history in the tree.
    pub history_matched: u32,
    /// Tokens whose history was used.
    pub resumed_at: u32,
    /// Of these, tokens that were run again to rebuild the state.
    pub replayed: u32,
    /// Why not more.
    pub reason: Reason,
    /// How often it lost its slab.
    pub preemptions: u32,
}

impl Explain {
    /// Prompt tokens that were not run at all.
    pub fn cached_tokens(&self) -> u32 {
        self.resumed_at - self.replayed
    }
}

/// Notices prefixes that come again and again and never hit: then something is set up wrongly, and nobody would see it.
///
/// Only what could have been hit counts: a whole block that a request before had stored when it ended.
#[derive(Debug)]
pub struct ZeroHits {
    /// Names of first blocks that were stored, by their last bits.
    stored: Box<[u64]>,
    misses: u32,
    warnings: u64,
}

impl Default for ZeroHits {
    fn default() -> Self {
        ZeroHits { stored: vec![0; 4096].into_boxed_slice(), misses: 0, warnings: 0 }
    }
}

impl ZeroHits {
    /// Repeated prefixes in a row without one hit that make a warning.
    pub const LIMIT: u32 = 32;

    /// A request has ended whose prompt began with the block `start`.
    pub fn stored(&mut self, start: &[u32]) {
        let (slot, name) = self.place(start);
        self.stored[slot] = name;
    }

    fn place(&self, start: &[u32]) -> (usize, u64) {
        let name = hash_block(1, start).max(1);
        (name as usize % self.stored.len(), name)
    }

    /// A prompt that begins with the block `start` was looked up. `hit`: some of it was reused; `reason`: why not more.
    pub fn saw(&mut self, start: &[u32], hit: bool, reason: Reason) {
        let (slot, name) = self.place(start);
        if hit {
            self.misses = 0;
        } else if self.stored[slot] == name && reason != Reason::DeclinedByCost {
            self.misses += 1;
            if self.misses == Self::LIMIT {
                (self.misses, self.warnings) = (0, self.warnings + 1);
            }
        }
    }

    /// Warnings so far.
    pub fn warnings(&self) -> u64 {
        self.warnings
    }
}

/// Explanations of finished requests, the last [`Archive::LIMIT`] of them.
#[derive(Debug, Default)]
pub struct Archive {
    by_id: HashMap<RequestId, (u64, Explain)>,
    order: VecDeque<(u64, RequestId)>,
    next: u64,
}

impl Archive {
    /// Explanations kept.
    pub const LIMIT: usize = 4096;

    /// Keeps one; the oldest goes when there are too many.
    pub fn keep(&mut self, id: RequestId, explain: Explain) {
        self.next += 1;
        self.by_id.insert(id, (self.next, explain));
        self.order.push_back((self.next, id));
        if self.order.len() > Self::LIMIT
            && let Some((at, old)) = self.order.pop_front()
            && self.by_id.get(&old).is_some_and(|e| e.0 == at)
        {
            self.by_id.remove(&old);
        }
    }

    /// The explanation of a finished request.
    pub fn get(&self, id: RequestId) -> Option<Explain> {
        self.by_id.get(&id).map(|e| e.1)
    }

    /// Drops one. Returns whether it was there.
    pub fn forget(&mut self, id: RequestId) -> bool {
        self.by_id.remove(&id).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeated_prefixes_that_never_hit_make_one_warning_and_a_hit_ends_the_count() {
        let mut zero = ZeroHits::default();
        let missed = |zero: &mut ZeroHits, n| (0..n).for_each(|_| zero.saw(&[5000], false, Reason::Salt));
        (0..1000u32).for_each(|i| {
            zero.saw(&[i], false, Reason::NeverStored);
            zero.stored(&[i]);
        });
        assert_eq!(zero.warnings(), 0, "nothing came twice");
        missed(&mut zero, 2 * ZeroHits::LIMIT);
        assert_eq!(zero.warnings(), 0, "nobody has stored it: they came at the same time");
        zero.stored(&[5000]);
        (0..2 * ZeroHits::LIMIT).for_each(|_| zero.saw(&[5000], false, Reason::DeclinedByCost));
        assert_eq!(zero.warnings(), 0, "starting anew was cheaper: nothing was lost");
        missed(&mut zero, ZeroHits::LIMIT - 1);
        zero.saw(&[5000], true, Reason::None);
        missed(&mut zero, ZeroHits::LIMIT - 1);
        assert_eq!(zero.warnings(), 0);
        missed(&mut zero, 1);
        assert_eq!(zero.warnings(), 1);
    }

    #[test]
    fn the_reason_names_what_was_lost_first() {
        let found =
            |history, lost, snapshot_evicted| Match { history, snapshot_evicted, ..Match::nothing(lost) };
        let replay = Way::Replay { from: 2, to: 8 };
        assert_eq!(Reason::of(&found(0, Lost::BelowBlock, None), Way::Cold, 0), Reason::BelowBlock);
        assert_eq!(Reason::of(&found(0, Lost::NeverStored, None), Way::Cold, 8), Reason::NeverStored);
        assert_eq!(Reason::of(&found(0, Lost::HistoryEvicted, None), Way::Cold, 8), Reason::HistoryEvicted);
        assert_eq!(Reason::of(&found(8, Lost::Nothing, None), replay, 8), Reason::None);
        assert_eq!(Reason::of(&found(8, Lost::Nothing, Some(8)), replay, 8), Reason::SnapshotEvicted);
        assert_eq!(Reason::of(&found(8, Lost::NeverStored, None), Way::Cold, 12), Reason::DeclinedByCost);
    }

    #[test]
    fn the_archive_forgets_the_oldest() {
        let mut archive = Archive::default();
        for i in 0..=Archive::LIMIT as u64 {
            archive.keep(RequestId(i), Explain::default());
        }
        assert!(archive.get(RequestId(0)).is_none() && archive.get(RequestId(1)).is_some());
        assert!(archive.forget(RequestId(1)) && !archive.forget(RequestId(1)));
    }
}

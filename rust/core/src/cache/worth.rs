//! The order in which blocks and snapshots that nobody uses go.
//!
//! Each of them lies in one **shelf**, sorted by age; a shelf holds what is worth equally much at equal age. The victim is
//! the head of the shelf whose head is worth least, so finding it costs a look at each shelf that is not empty (some
//! twenty) and O(log n) to keep them sorted:
//!
//! ```text
//!   value = 4^priority * 2^octave * likelihood(class, age)        lru: 4^priority / age        fifo: the same since stored
//!           hint         saved cost   learned, falls with age
//!           of owner     per page     (see reuse.rs)
//! ```
//!
//! Only leaves of the tree are listed; a block's predecessor is listed when the block has gone, so prefixes go tail first.

use std::collections::{BTreeMap, BTreeSet};

use crate::cache::eviction::Eviction;
use crate::cache::reuse::Reuse;
use crate::error::Malformed;

/// What can go.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Item {
    /// A saved state, by the index of its entry.
    Snapshot(u32),
    /// The blocks of a leaf, by node.
    Blocks(u32),
}

impl Item {
    pub fn is_snapshot(self) -> bool {
        matches!(self, Item::Snapshot(_))
    }
}

/// Which shelf.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Shelf {
    /// Superseded states and ended sessions.
    Dead,
    /// Sorted by value.
    Live {
        /// Priority of retention, -8 to 8.
        level: i8,
        /// Class of reuse, see `reuse.rs`.
        class: u8,
        /// Binary logarithm of the saved cost per page; 0 is a block at the start of a prompt.
        octave: i8,
    },
    /// Kept until a time.
    Kept,
}

/// Where an item lies: its shelf, and its key there (an age, or an expiry).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Spot {
    pub shelf: Shelf,
    pub key: u64,
}

/// What decides an item's place.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Standing {
    pub born: u64,
    pub used: u64,
    pub expiry: u64,
    pub dead: bool,
    pub level: i8,
    pub class: u8,
    pub octave: i8,
    pub tenant: u32,
}

/// One shelf by kind, for victims of one kind only.
type Sorted = BTreeSet<(u64, Item)>;

/// All items that can go.
#[derive(Debug)]
pub(crate) struct Worth {
    eviction: Eviction,
    shelves: BTreeMap<(Shelf, bool), Sorted>,
    /// Items of tenants that have a quota, least recently used first.
    tenants: BTreeMap<u32, Sorted>,
}

/// Limits of a priority; beyond them it counts as the limit.
pub(crate) const LEVELS: i8 = 8;

impl Worth {
    /// Empty; `tenants` are those with a quota.
    pub fn new(eviction: Eviction, tenants: impl Iterator<Item = u32>) -> Self {
        Worth { eviction, shelves: BTreeMap::new(), tenants: tenants.map(|t| (t, Sorted::new())).collect() }
    }

    /// Lists an item and returns its place.
    pub fn insert(&mut self, item: Item, s: &Standing, now_us: u64) -> Spot {
        let age = if self.eviction == Eviction::Fifo { s.born } else { s.used };
        let place = if s.dead {
            Spot { shelf: Shelf::Dead, key: age }
        } else if s.expiry > now_us {
            Spot { shelf: Shelf::Kept, key: s.expiry }
        } else {
            let by_value = self.eviction == Eviction::Value;
            let (class, octave) = if by_value { (s.class, s.octave) } else { (0, 0) };
            Spot { shelf: Shelf::Live { level: s.level, class, octave }, key: age }
        };
        self.shelves.entry((place.shelf, item.is_snapshot())).or_default().insert((place.key, item));
        if let Some(sorted) = self.tenants.get_mut(&s.tenant) {
            sorted.insert((age, item));
        }
        place
    }

    /// Takes an item out of its place.
    pub fn remove(&mut self, item: Item, place: Spot, s: &Standing) {
        let shelf = (place.shelf, item.is_snapshot());
        if let Some(sorted) = self.shelves.get_mut(&shelf) {
            sorted.remove(&(place.key, item));
            if sorted.is_empty() {
                self.shelves.remove(&shelf);
            }
        }
        if let Some(sorted) = self.tenants.get_mut(&s.tenant) {
            sorted.remove(&(if self.eviction == Eviction::Fifo { s.born } else { s.used }, item));
        }
    }

    /// One item whose time to be kept is over.
    pub fn expired(&self, now_us: u64) -> Option<Item> {
        let heads = [false, true].map(|kind| self.shelves.get(&(Shelf::Kept, kind)).and_then(Sorted::first));
        heads.into_iter().flatten().find(|(expiry, _)| *expiry <= now_us).map(|(_, item)| *item)
    }

    /// The first to go of a tenant with a quota.
    pub fn of_tenant(&self, tenant: u32) -> Option<Item> {
        self.tenants.get(&tenant).and_then(Sorted::first).map(|(_, item)| *item)
    }

    /// The first to go: of snapshots (`Some(true)`), of blocks (`Some(false)`), or of both. `clock` is the newest age.
    pub fn victim(&self, snapshots: Option<bool>, reuse: &Reuse, clock: u64) -> Option<Item> {
        let mut best: Option<(u8, f64, (u64, Item))> = None;
        for ((shelf, kind), sorted) in &self.shelves {
            if snapshots.is_some_and(|wanted| wanted != *kind) {
                continue;
            }
            let Some(&head) = sorted.first() else { continue };
            let (rank, value) = match *shelf {
                Shelf::Dead => (0, 0.0),
                Shelf::Live { .. } => (1, self.value(*shelf, clock.saturating_sub(head.0), reuse)),
                Shelf::Kept => (2, 0.0),
            };
            let first = match &best {
                None => true,
                Some((r, v, h)) => {
                    (rank, value).partial_cmp(&(*r, *v)).is_none_or(|o| o.then(head.cmp(h)).is_lt())
                }
            };
            if first {
                best = Some((rank, value, head));
            }
        }
        best.map(|(_, _, (_, item))| item)
    }

    /// What an item of a shelf is worth at an age.
    pub fn value(&self, shelf: Shelf, age: u64, reuse: &Reuse) -> f64 {
        let Shelf::Live { level, class, octave } = shelf else { return 0.0 };
        let likelihood = match self.eviction {
            Eviction::Value => reuse.likelihood(class, age),
            Eviction::Lru | Eviction::Fifo => 1.0 / (age as f64 + 0.5),
        };
        4f64.powi(level.into()) * 2f64.powi(octave.into()) * likelihood
    }

    /// Items listed.
    pub fn len(&self) -> usize {
        self.shelves.values().map(BTreeSet::len).sum()
    }

    /// Bytes of bookkeeping, estimated.
    pub fn bytes(&self) -> usize {
        2 * size_of::<(u64, Item)>() * (self.len() + self.tenants.values().map(BTreeSet::len).sum::<usize>())
    }

    /// Whether an item lies where it says.
    pub fn check(&self, item: Item, place: Spot) -> Result<(), Malformed> {
        let there = self.shelves.get(&(place.shelf, item.is_snapshot()));
        Malformed::unless(there.is_some_and(|q| q.contains(&(place.key, item))), "place in the order", || {
            format!("{item:?} is not at {place:?}")
        })
    }
}

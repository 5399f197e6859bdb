//! Which cached page goes first: the policies, and what each of them has to do.
//!
//! A policy orders what can go. What is the same for all of them is done around it (`worth.rs`): what is over goes before, and
//! what is to be kept until a time after everything else; priorities; tenants' quotas; and of the tree only leaves are listed,
//! so prefixes go tail first. A policy is a file here and its place in [`Eviction::ALL`]; the settings, the simulator and the
//! tests take it from there.

mod fifo;
mod lru;
mod reuse;
mod value;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::CoreError;

/// The value of `eviction`: a policy by its name.
#[derive(Clone, Copy)]
pub struct Eviction {
    name: &'static str,
    make: fn() -> Box<dyn Policy>,
}

impl Eviction {
    /// Every policy, in the order of messages; the first is the default.
    pub const ALL: [Eviction; 3] = [Eviction::VALUE, Eviction::LRU, Eviction::FIFO];

    /// As it reads in settings.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// The policy with nothing listed.
    pub(crate) fn policy(self) -> Box<dyn Policy> {
        (self.make)()
    }
}

impl Default for Eviction {
    fn default() -> Self {
        Self::ALL[0]
    }
}

impl PartialEq for Eviction {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Eviction {}

impl fmt::Debug for Eviction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl FromStr for Eviction {
    type Err = CoreError;

    fn from_str(text: &str) -> Result<Self, CoreError> {
        Self::ALL.into_iter().find(|e| e.name == text).ok_or_else(|| {
            let valid = format!("valid values are {}", Self::ALL.map(Eviction::name).join(", "));
            CoreError::config("eviction", format!("{text:?}"), valid)
        })
    }
}

impl Serialize for Eviction {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl<'de> Deserialize<'de> for Eviction {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// What can go.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Item {
    /// A saved state, by the index of its entry.
    Snapshot(u32),
    /// The blocks of a leaf, by node.
    Blocks(u32),
}

impl Item {
    /// Whether it is a saved state.
    pub fn is_snapshot(self) -> bool {
        matches!(self, Item::Snapshot(_))
    }
}

/// How something cached has been used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Past {
    /// It is a saved state.
    pub snapshot: bool,
    /// Later requests that came for it and did not just continue it.
    pub uses: u8,
    /// It continued a known prefix when it was stored.
    pub grown: bool,
}

/// What is known of an item that can go. Nothing of it changes while the item is listed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Standing {
    /// When it was stored, on the cache's counter of operations.
    pub born: u64,
    /// When it was used last.
    pub used: u64,
    /// Kept at least until then.
    pub expiry: u64,
    /// Superseded, or of a session that is over.
    pub dead: bool,
    /// Priority of retention, -8 to 8.
    pub level: i8,
    /// Binary logarithm of the cost that it saves per page; 0 is a block at the start of a prompt. 0 for all that is listed
    /// where [`Policy::weighs_cost`] is not.
    pub octave: i8,
    /// Whose quota it counts against.
    pub tenant: u32,
    /// How it has been used.
    pub past: Past,
}

/// Items among which a policy is asked for the first to go: of one priority and one kind.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Group {
    /// Priority of retention.
    pub level: i8,
    /// Saved states, or blocks.
    pub snapshot: bool,
}

/// The first of a group to go.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Head {
    /// What it is worth now beside others of its priority.
    pub worth: f64,
    /// What its age counts from; between equals the smaller goes first.
    pub key: u64,
    /// Which it is.
    pub item: Item,
}

/// An order in which what nobody uses goes.
pub trait Policy: fmt::Debug + Send + Sync {
    /// An item of a group can go from now on.
    fn insert(&mut self, group: Group, item: Item, standing: &Standing);

    /// It cannot go any more, or has gone.
    fn remove(&mut self, group: Group, item: Item, standing: &Standing);

    /// The first of a group to go. `now` is the newest time on the counter of operations.
    fn victim(&self, group: Group, now: u64) -> Option<Head>;

    /// What something of this standing is worth at an age, on the scale of [`Head::worth`].
    fn worth(&self, standing: &Standing, age: u64) -> f64 {
        by_age(standing.octave, age)
    }

    /// Ages count from when something was stored, not from its last use.
    fn goes_by_birth(&self) -> bool {
        false
    }

    /// It matters what recomputation would cost.
    fn weighs_cost(&self) -> bool {
        false
    }

    /// So many pages were used at an age.
    fn used(&mut self, _past: Past, _age: u64, _pages: u32) {}

    /// So many pages were evicted at an age.
    fn evicted(&mut self, _past: Past, _age: u64, _pages: u32) {}

    /// What it has learned, for a dump.
    fn learnt(&self) -> Vec<f64> {
        Vec::new()
    }

    /// Goes on with what another has learned. False when that cannot be.
    fn set_learnt(&mut self, learnt: &[f64]) -> bool {
        learnt.is_empty()
    }
}

/// Worth that falls with age alone, for what saves so much.
fn by_age(octave: i8, age: u64) -> f64 {
    2f64.powi(octave.into()) / (age as f64 + 0.5)
}

/// Groups of items on shelves, each sorted by age: what a shelf holds is worth equally much at equal age, so that only
/// heads are compared.
#[derive(Debug)]
struct Shelves<S>(BTreeMap<(Group, S), BTreeSet<(u64, Item)>>);

impl<S: Ord + Copy> Shelves<S> {
    fn new() -> Self {
        Shelves(BTreeMap::new())
    }

    fn insert(&mut self, group: Group, shelf: S, key: u64, item: Item) {
        self.0.entry((group, shelf)).or_default().insert((key, item));
    }

    fn remove(&mut self, group: Group, shelf: S, key: u64, item: Item) {
        if let Some(sorted) = self.0.get_mut(&(group, shelf)) {
            sorted.remove(&(key, item));
            if sorted.is_empty() {
                self.0.remove(&(group, shelf));
            }
        }
    }

    /// The head that is worth least, of the shelves of a group, the first of which is `first`.
    fn least(&self, group: Group, first: S, worth: impl Fn(S, u64) -> f64) -> Option<Head> {
        let shelves = self.0.range((group, first)..).take_while(|((g, _), _)| *g == group);
        let heads = shelves.filter_map(|((_, shelf), sorted)| {
            sorted.first().map(|&(key, item)| Head { worth: worth(*shelf, key), key, item })
        });
        heads.min_by(|a, b| a.worth.total_cmp(&b.worth).then((a.key, a.item).cmp(&(b.key, b.item))))
    }
}

#[cfg(test)]
mod tests;

//! What can go, and which of it goes first, whatever the policy.
//!
//! ```text
//!   over      superseded states and ended sessions, the oldest first
//!   live      the head of the group that is worth least:  4^priority * worth by the policy (see eviction/)
//!   kept      what is to be kept until a time, the nearest time first
//! ```
//!
//! Only leaves of the tree are listed; a block's predecessor is listed when the block has gone, so prefixes go tail first.

use std::collections::{BTreeMap, BTreeSet};

use crate::cache::eviction::{Eviction, Group, Item, Past, Policy, Standing};
use crate::error::Malformed;

/// Highest and lowest level of a priority; beyond them it counts as the limit.
pub(crate) const LEVELS: i8 = 8;

/// Groups: a level and a kind each.
const GROUPS: usize = 2 * (2 * LEVELS as usize + 1);

/// Where an item is listed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum List {
    /// Superseded states and ended sessions.
    Over,
    /// In the order of the policy.
    Live,
    /// Kept until a time.
    Kept,
}

/// Items by age or time.
type Sorted = BTreeSet<(u64, Item)>;

/// All that can go.
#[derive(Debug)]
pub(crate) struct Worth {
    policy: Box<dyn Policy>,
    by_birth: bool,
    weighs_cost: bool,
    /// By kind: blocks, snapshots.
    over: [Sorted; 2],
    kept: [Sorted; 2],
    /// Items of each group in the policy's order, and which groups have any, as bits.
    live: [u32; GROUPS],
    some: u64,
    /// Of tenants with a quota, by age.
    tenants: BTreeMap<u32, Sorted>,
}

fn place_of(group: Group) -> usize {
    2 * (group.level + LEVELS) as usize + usize::from(group.snapshot)
}

/// The groups of these bits.
fn groups(mut bits: u64) -> impl Iterator<Item = Group> {
    std::iter::from_fn(move || {
        let place = bits.trailing_zeros();
        bits &= bits.wrapping_sub(1);
        (place < u64::BITS).then(|| Group { level: (place / 2) as i8 - LEVELS, snapshot: place % 2 == 1 })
    })
}

impl Worth {
    /// Empty; `tenants` are those with a quota.
    pub fn new(eviction: Eviction, tenants: impl Iterator<Item = u32>) -> Self {
        let policy = eviction.policy();
        Worth {
            by_birth: policy.goes_by_birth(),
            weighs_cost: policy.weighs_cost(),
            policy,
            over: Default::default(),
            kept: Default::default(),
            live: [0; GROUPS],
            some: 0,
            tenants: tenants.map(|t| (t, Sorted::new())).collect(),
        }
    }

    /// Whether ages count from when something was stored.
    pub fn goes_by_birth(&self) -> bool {
        self.by_birth
    }

    /// Whether it matters what recomputation would cost.
    pub fn weighs_cost(&self) -> bool {
        self.weighs_cost
    }

    /// What an item's age counts from.
    pub fn key_of(&self, s: &Standing) -> u64 {
        if self.by_birth { s.born } else { s.used }
    }

    /// Lists an item and returns where.
    pub fn insert(&mut self, item: Item, s: &Standing, now_us: u64) -> List {
        let (kind, key) = (usize::from(item.is_snapshot()), self.key_of(s));
        let list = match () {
            () if s.dead => List::Over,
            () if s.expiry > now_us => List::Kept,
            () => List::Live,
        };
        match list {
            List::Over => drop(self.over[kind].insert((key, item))),
            List::Kept => drop(self.kept[kind].insert((s.expiry, item))),
            List::Live => {
                let group = Group { level: s.level, snapshot: item.is_snapshot() };
                let place = place_of(group);
                self.live[place] += 1;
                self.some |= 1 << place;
                self.policy.insert(group, item, s);
            }
        }
        if let Some(sorted) = self.tenants.get_mut(&s.tenant) {
            sorted.insert((key, item));
        }
        list
    }

    /// Takes an item out of its list.
    pub fn remove(&mut self, item: Item, list: List, s: &Standing) {
        let (kind, key) = (usize::from(item.is_snapshot()), self.key_of(s));
        match list {
            List::Over => drop(self.over[kind].remove(&(key, item))),
            List::Kept => drop(self.kept[kind].remove(&(s.expiry, item))),
            List::Live => {
                let group = Group { level: s.level, snapshot: item.is_snapshot() };
                let place = place_of(group);
                self.live[place] -= 1;
                self.some &= !(u64::from(self.live[place] == 0) << place);
                self.policy.remove(group, item, s);
            }
        }
        if let Some(sorted) = self.tenants.get_mut(&s.tenant) {
            sorted.remove(&(key, item));
        }
    }

    /// One item whose time to be kept is over.
    pub fn expired(&self, now_us: u64) -> Option<Item> {
        let heads = self.kept.iter().filter_map(Sorted::first);
        heads.into_iter().find(|(expiry, _)| *expiry <= now_us).map(|(_, item)| *item)
    }

    /// The first to go of a tenant with a quota.
    pub fn of_tenant(&self, tenant: u32) -> Option<Item> {
        self.tenants.get(&tenant).and_then(Sorted::first).map(|(_, item)| *item)
    }

    /// The first to go: of snapshots (`Some(true)`), of blocks (`Some(false)`), or of both. `clock` is the newest age.
    pub fn victim(&self, snapshots: Option<bool>, clock: u64) -> Option<Item> {
        let wanted = |kind: bool| snapshots.is_none_or(|s| s == kind);
        let first = |lists: &[Sorted; 2]| {
            let heads = [false, true].into_iter().filter(|&kind| wanted(kind));
            heads.filter_map(|kind| lists[usize::from(kind)].first()).min().map(|&(_, item)| item)
        };
        let live = || {
            let heads = groups(self.some).filter(|g| wanted(g.snapshot));
            let heads = heads.filter_map(|g| self.policy.victim(g, clock).map(|head| (g, head)));
            let heads = heads.map(|(g, head)| (of_level(g.level) * head.worth, head.key, head.item));
            heads.min_by(|a, b| a.0.total_cmp(&b.0).then((a.1, a.2).cmp(&(b.1, b.2)))).map(|head| head.2)
        };
        first(&self.over).or_else(live).or_else(|| first(&self.kept))
    }

    /// What something of this standing is worth at an age.
    pub fn worth(&self, s: &Standing, age: u64) -> f64 {
        of_level(s.level) * self.policy.worth(s, age)
    }

    /// So many pages were used at an age.
    pub fn used(&mut self, past: Past, age: u64, pages: u32) {
        self.policy.used(past, age, pages);
    }

    /// So many pages were evicted at an age.
    pub fn evicted(&mut self, past: Past, age: u64, pages: u32) {
        self.policy.evicted(past, age, pages);
    }

    /// What the policy has learned, for a dump.
    pub fn learnt(&self) -> Vec<f64> {
        self.policy.learnt()
    }

    /// Goes on with what another has learned. False when that cannot be.
    pub fn set_learnt(&mut self, learnt: &[f64]) -> bool {
        self.policy.set_learnt(learnt)
    }

    /// Items listed.
    pub fn len(&self) -> usize {
        let listed = self.over.iter().chain(&self.kept).map(BTreeSet::len).sum::<usize>();
        listed + self.live.iter().map(|&n| n as usize).sum::<usize>()
    }

    /// Bytes of bookkeeping, estimated.
    pub fn bytes(&self) -> usize {
        2 * size_of::<(u64, Item)>() * (self.len() + self.tenants.values().map(BTreeSet::len).sum::<usize>())
    }

    /// Whether items are where they say, and each group's first is one of its own.
    pub fn check<'a>(
        &'a self,
        listed: impl Iterator<Item = (Item, List, Standing)> + 'a,
        clock: u64,
    ) -> Result<(), Malformed> {
        let mut live: BTreeMap<Group, BTreeSet<Item>> = BTreeMap::new();
        for (item, list, s) in listed {
            let kind = usize::from(item.is_snapshot());
            let there = match list {
                List::Over => self.over[kind].contains(&(self.key_of(&s), item)),
                List::Kept => self.kept[kind].contains(&(s.expiry, item)),
                List::Live => {
                    let group = Group { level: s.level, snapshot: item.is_snapshot() };
                    live.entry(group).or_default().insert(item)
                }
            };
            Malformed::unless(there, "listed", || format!("{item:?} is not in {list:?}"))?;
        }
        for group in groups((1 << GROUPS) - 1) {
            let own = live.get(&group);
            let counted = own.map_or(0, BTreeSet::len);
            let head = self.policy.victim(group, clock).map(|head| head.item);
            let right = (head.is_some(), self.some >> place_of(group) & 1 == 1) == (counted > 0, counted > 0)
                && head.is_none_or(|item| own.is_some_and(|o| o.contains(&item)));
            Malformed::unless(right && counted == self.live[place_of(group)] as usize, "groups", || {
                format!(
                    "{group:?} has {counted}, counted {}, its first is {head:?}",
                    self.live[place_of(group)]
                )
            })?;
        }
        Ok(())
    }
}

/// How much a priority counts.
fn of_level(level: i8) -> f64 {
    4f64.powi(level.into())
}

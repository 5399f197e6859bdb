//! Who goes next, as the oracle has it: every rule of eviction written down plainly.

use dsv4_core::cache::Eviction;

use super::{Facts, Prefix, World};

/// What an item's age counts from.
pub type Age = fn(&Facts) -> u64;
/// The policies by which the older of two goes first.
pub const AGES: [(Eviction, Age); 2] = [(Eviction::LRU, |f| f.used), (Eviction::FIFO, |f| f.born)];

/// What can be evicted; states before blocks, as in the cache.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Item {
    State(Prefix),
    Block(Prefix),
}

impl World {
    /// Lets the oracle evict as much as the cache did during `act`: the same, or what it may.
    pub fn follow<R>(&mut self, only_states: Option<bool>, act: impl FnOnce(&mut Self) -> R) -> R {
        let evicted = |w: &Self| w.cache.counters().evicted_blocks + w.cache.counters().snapshots_evicted;
        let before = evicted(self);
        let result = act(self);
        let size = |w: &Self| (w.blocks.len() + w.states.len()) as u64;
        let end = size(self) - (evicted(self) - before);
        if self.age.is_none() {
            let (blocks, states) = self.cached();
            let gone: Vec<Prefix> = self.blocks.keys().filter(|p| !blocks.contains(p)).cloned().collect();
            gone.iter().for_each(|p| assert!(!self.pinned(p), "{p:?} went, but it is in use"));
            self.blocks.retain(|p, _| blocks.contains(p));
            let gone: Vec<Prefix> = self.states.keys().filter(|p| !states.contains(p)).cloned().collect();
            gone.iter()
                .for_each(|p| assert!(!self.keeps_state(p), "the state at {p:?} went, but it is pinned"));
            self.states.retain(|p, _| states.contains(p));
        }
        while size(self) > end {
            let item = self.victim(only_states).expect("the cache evicted, the oracle has nothing to evict");
            self.remove(&item);
        }
        result
    }

    /// All that may go, with what is known of it.
    fn candidates(&self) -> Vec<(Item, Facts)> {
        let blocks = self.blocks.iter().filter(|(p, _)| !self.pinned(p) && self.children(p).next().is_none());
        let states = self.states.iter().filter(|(p, _)| !self.keeps_state(p));
        let blocks = blocks.map(|(p, f)| (Item::Block(p.clone()), *f));
        states.map(|(p, f)| (Item::State(p.clone()), *f)).chain(blocks).collect()
    }

    /// What goes next: of tenants beyond their quota, of states beyond their budget, else superseded states, then by age and
    /// priority, then what was to be kept. Blocks lose the state at their end before they go.
    fn victim(&self, only_states: Option<bool>) -> Option<Item> {
        match self.worst(only_states) {
            Some(Item::Block(p)) if only_states.is_none() && self.states.contains_key(&p) => {
                Some(Item::State(p))
            }
            other => other,
        }
    }

    fn worst(&self, only_states: Option<bool>) -> Option<Item> {
        let age = self.age.unwrap_or(|f| f.used);
        let mut all = self.candidates();
        if let Some(states) = only_states {
            all.retain(|(item, _)| matches!(item, Item::State(_)) == states);
        } else {
            for (tenant, limit) in &self.options.quotas {
                let blocks = self.blocks.values().filter(|f| f.tenant == *tenant).count();
                let states = self.states.values().filter(|f| f.tenant == *tenant).count();
                let theirs = all.iter().filter(|(_, f)| f.tenant == *tenant);
                let first = theirs.min_by_key(|(item, f)| (age(f), item.clone()));
                if blocks + states * self.state_pages() > *limit as usize && first.is_some() {
                    return first.map(|(item, _)| item.clone());
                }
            }
            let most = self.options.snapshot_budget * f64::from(self.options.pages);
            let any_state = all.iter().any(|(item, _)| matches!(item, Item::State(_)));
            if (self.states.len() * self.state_pages()) as f64 > most && any_state {
                all.retain(|(item, _)| matches!(item, Item::State(_)));
            }
        }
        let (blocks, states) = self.cached();
        let there = |item: &Item| match item {
            Item::State(p) => states.contains(p),
            Item::Block(p) => blocks.contains(p),
        };
        let rank = |item: &Item, f: &Facts| {
            let level = if f.expiry > 0 && f.expiry <= self.now_us { 0 } else { f.level };
            let value = 4f64.powi(level.into()) / ((self.now - age(f)) as f64 + 0.5);
            match () {
                () if f.superseded => (0, 0.0, age(f), false, item.clone()),
                // Equal times are in no particular order.
                () if f.expiry > self.now_us => (2, 0.0, f.expiry, there(item), item.clone()),
                () => (1, value, age(f), false, item.clone()),
            }
        };
        all.iter().map(|(item, f)| rank(item, f)).min_by(|a, b| a.partial_cmp(b).unwrap()).map(|r| r.4)
    }

    fn remove(&mut self, item: &Item) {
        match item {
            Item::State(p) => {
                self.states.remove(p);
            }
            Item::Block(p) => {
                self.states.remove(p);
                self.blocks.remove(p);
            }
        }
    }
}

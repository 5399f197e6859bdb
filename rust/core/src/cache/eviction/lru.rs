//! The least recently used goes first.

use super::{Eviction, Group, Head, Item, Policy, Shelves, Standing, by_age};

impl Eviction {
    /// The least recently used.
    pub const LRU: Eviction = Eviction { name: "lru", make: || Box::new(Lru(Shelves::new())) };
}

#[derive(Debug)]
struct Lru(Shelves<()>);

impl Policy for Lru {
    fn insert(&mut self, group: Group, item: Item, standing: &Standing) {
        self.0.insert(group, (), standing.used, item);
    }

    fn remove(&mut self, group: Group, item: Item, standing: &Standing) {
        self.0.remove(group, (), standing.used, item);
    }

    fn victim(&self, group: Group, now: u64) -> Option<Head> {
        self.0.least(group, (), |(), used| by_age(0, now.saturating_sub(used)))
    }
}

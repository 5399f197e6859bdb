//! The oldest goes first, used or not.

use super::{Eviction, Group, Head, Item, Policy, Shelves, Standing, by_age};

impl Eviction {
    /// The oldest, used or not.
    pub const FIFO: Eviction = Eviction { name: "fifo", make: || Box::new(Fifo(Shelves::new())) };
}

#[derive(Debug)]
struct Fifo(Shelves<()>);

impl Policy for Fifo {
    fn insert(&mut self, group: Group, item: Item, standing: &Standing) {
        self.0.insert(group, (), standing.born, item);
    }

    fn remove(&mut self, group: Group, item: Item, standing: &Standing) {
        self.0.remove(group, (), standing.born, item);
    }

    fn victim(&self, group: Group, now: u64) -> Option<Head> {
        self.0.least(group, (), |(), born| by_age(0, now.saturating_sub(born)))
    }

    fn goes_by_birth(&self) -> bool {
        true
    }
}

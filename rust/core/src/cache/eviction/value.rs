//! What saves least goes first: recomputation saved times likelihood of reuse, per byte.
//!
//! ```text
//!   worth = 2^octave * likelihood(class, age)
//!           saved cost   learned, falls with age
//!           per page     (see reuse.rs)
//! ```
//!
//! Items of one class and octave share a shelf, so finding the victim costs a look at each shelf that is not empty (some
//! twenty) and O(log n) to keep them sorted.

use super::reuse::{CLASSES, Reuse, class_of};
use super::{Eviction, Group, Head, Item, Past, Policy, Shelves, Standing};

impl Eviction {
    /// What saves least: recomputation saved times likelihood of reuse, per byte.
    pub const VALUE: Eviction =
        Eviction { name: "value", make: || Box::new(Value { shelves: Shelves::new(), reuse: Reuse::new() }) };
}

#[derive(Debug)]
struct Value {
    /// By class and octave.
    shelves: Shelves<(u8, i8)>,
    reuse: Reuse,
}

impl Value {
    fn worth_of(&self, (class, octave): (u8, i8), age: u64) -> f64 {
        2f64.powi(octave.into()) * self.reuse.likelihood(class, age)
    }
}

fn shelf_of(standing: &Standing) -> (u8, i8) {
    (class_of(standing.past), standing.octave)
}

impl Policy for Value {
    fn insert(&mut self, group: Group, item: Item, standing: &Standing) {
        self.shelves.insert(group, shelf_of(standing), standing.used, item);
    }

    fn remove(&mut self, group: Group, item: Item, standing: &Standing) {
        self.shelves.remove(group, shelf_of(standing), standing.used, item);
    }

    fn victim(&self, group: Group, now: u64) -> Option<Head> {
        self.shelves.least(group, (0, i8::MIN), |shelf, used| self.worth_of(shelf, now.saturating_sub(used)))
    }

    fn worth(&self, standing: &Standing, age: u64) -> f64 {
        self.worth_of(shelf_of(standing), age)
    }

    fn weighs_cost(&self) -> bool {
        true
    }

    fn used(&mut self, past: Past, age: u64, pages: u32) {
        self.reuse.left(class_of(past), age, pages, true);
    }

    fn evicted(&mut self, past: Past, age: u64, pages: u32) {
        self.reuse.left(class_of(past), age, pages, false);
    }

    fn learnt(&self) -> Vec<f64> {
        let (uses, exposure) = self.reuse.sums();
        [uses, exposure].concat()
    }

    fn set_learnt(&mut self, learnt: &[f64]) -> bool {
        let (uses, exposure) = learnt.split_at(learnt.len().min(CLASSES));
        let (Ok(uses), Ok(exposure)) = (uses.try_into(), exposure.try_into()) else { return false };
        self.reuse = Reuse::from_sums(uses, exposure);
        true
    }
}

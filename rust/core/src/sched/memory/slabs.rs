//! Slabs: one per running request, handed out again only when nothing in flight can touch them.

use crate::error::Malformed;
use crate::fence::{Fence, Until};
use crate::ids::{SlabId, Step, Ticket};

/// Free slabs, and those that may still be in use.
#[derive(Debug)]
pub struct Slabs {
    total: u32,
    free: Vec<SlabId>,
    leaving: Fence<SlabId>,
}

impl Slabs {
    /// All free; slab 0 is handed out first.
    pub fn new(total: u32) -> Self {
        let free = (0..total).rev().map(SlabId).collect();
        Slabs { total, free, leaving: Fence::default() }
    }

    /// Slabs in all.
    pub fn total(&self) -> u32 {
        self.total
    }

    /// Slabs that can be taken now.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Takes one.
    pub fn take(&mut self) -> Option<SlabId> {
        self.free.pop()
    }

    /// Gives one back that is in use until then.
    pub fn give_back(&mut self, slab: SlabId, until: Until) {
        self.free.extend(self.leaving.put(slab, until));
    }

    /// Whether slabs wait until they are no longer in use.
    pub fn has_leaving(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// All steps up to `done` are over, and these copies have ended.
    pub fn retire(&mut self, done: Step, ended: &[Ticket]) {
        self.free.extend(self.leaving.retire(done, ended));
    }

    /// Every slab is free, leaving or in `used`, and in one of them only.
    pub fn check(&self, used: impl Iterator<Item = SlabId>) -> Result<(), Malformed> {
        let mut seen = vec![0u32; self.total as usize];
        self.free
            .iter()
            .chain(self.leaving.iter())
            .copied()
            .chain(used)
            .for_each(|s| seen[s.0 as usize] += 1);
        match seen.iter().position(|&n| n != 1) {
            Some(slab) => Err(Malformed {
                what: "slabs conserved",
                detail: format!("slab {slab} is held {} times", seen[slab]),
            }),
            None => Ok(()),
        }
    }
}

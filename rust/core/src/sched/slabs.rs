//! Slabs: one per running request, handed out again only when no step in flight can touch them.

use crate::error::Malformed;
use crate::ids::{SlabId, Step};
use crate::mutant::{self, Mutant};

/// Free slabs, and those that wait for a step to end.
#[derive(Debug)]
pub struct Slabs {
    total: u32,
    free: Vec<SlabId>,
    leaving: Vec<(Step, SlabId)>,
    done: Step,
}

impl Slabs {
    /// All free; slab 0 is handed out first.
    pub fn new(total: u32) -> Self {
        let free = (0..total).rev().map(SlabId).collect();
        Slabs { total, free, leaving: Vec::new(), done: Step(0) }
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

    /// Gives one back behind step `at`.
    pub fn give_back(&mut self, slab: SlabId, at: Step) {
        if at <= self.done || mutant::on(Mutant::SlabAtOnce) {
            self.free.push(slab);
        } else {
            self.leaving.push((at, slab));
        }
    }

    /// Slabs that wait for a step to end.
    pub fn leaving(&self) -> u32 {
        self.leaving.len() as u32
    }

    /// All steps up to `done` are over.
    pub fn retire(&mut self, done: Step) {
        self.done = self.done.max(done);
        let (free, done) = (&mut self.free, self.done);
        self.leaving.retain(|&(at, slab)| {
            let over = at <= done;
            if over {
                free.push(slab);
            }
            !over
        });
    }

    /// Every slab is free, leaving or in `used`, and in one of them only.
    pub fn check(&self, used: impl Iterator<Item = SlabId>) -> Result<(), Malformed> {
        let mut seen = vec![0u32; self.total as usize];
        let leaving = self.leaving.iter().map(|&(_, s)| s);
        self.free.iter().copied().chain(leaving).chain(used).for_each(|s| seen[s.0 as usize] += 1);
        match seen.iter().position(|&n| n != 1) {
            Some(slab) => Err(Malformed {
                what: "slabs conserved",
                detail: format!("slab {slab} is held {} times", seen[slab]),
            }),
            None => Ok(()),
        }
    }
}

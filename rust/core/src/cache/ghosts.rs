//! What was evicted lately: why a prefix is no longer known, and how often it had been used.
//!
//! A block is named by a hash of its salt, its place, its tokens and those of the block before. Equal hashes of different
//! prefixes only make an explanation wrong. The table has a fixed size; a later entry overwrites.

use crate::cache::tree::hash_block;

#[derive(Clone, Copy, Debug, Default)]
struct Ghost {
    key: u64,
    uses: u8,
}

/// Evicted blocks by hash.
#[derive(Debug)]
pub(crate) struct Ghosts(Box<[Ghost]>);

/// The name of block `index`, which holds `tokens` and follows `before` (empty for the first).
pub(crate) fn name_of(seed: u64, index: u32, before: &[u32], tokens: &[u32]) -> u64 {
    hash_block(hash_block(seed ^ u64::from(index).wrapping_mul(0x9e37_79b9_7f4a_7c15), before), tokens).max(1)
}

impl Ghosts {
    /// Room for as many as the pool has pages, and not less than 65,536: 1 MiB.
    pub fn new(pages: u32) -> Self {
        let slots = pages.next_power_of_two().clamp(1 << 16, 1 << 20);
        Ghosts(vec![Ghost::default(); slots as usize].into_boxed_slice())
    }

    fn slot(&self, key: u64) -> usize {
        key as usize & (self.0.len() - 1)
    }

    /// Remembers an evicted block and its uses.
    pub fn note(&mut self, key: u64, uses: u8) {
        let slot = self.slot(key);
        self.0[slot] = Ghost { key, uses };
    }

    /// The uses of a block that was evicted.
    pub fn find(&self, key: u64) -> Option<u8> {
        let ghost = self.0[self.slot(key)];
        (ghost.key == key).then_some(ghost.uses)
    }

    /// Every entry, for a dump.
    pub fn iter(&self) -> impl Iterator<Item = (u64, u8)> + '_ {
        self.0.iter().filter(|g| g.key != 0).map(|g| (g.key, g.uses))
    }

    /// Bytes of the table.
    pub fn bytes(&self) -> usize {
        size_of_val(&*self.0)
    }
}

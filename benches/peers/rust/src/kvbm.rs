//! NVIDIA's KV block manager, the logical half: blocks by sequence hash with leases.

use dynamo_tokens::TokenBlockSequence;
use kvbm_logical::manager::FrequencyTrackingCapacity;
use kvbm_logical::registry::BlockRegistry;
use kvbm_logical::testing::TestMeta;
use kvbm_logical::{BlockManager, KvbmSequenceHashProvider};

use crate::systems::PrefixCache;
use crate::workload::BLOCK;

/// The manager with its LRU back end.
pub struct Kvbm {
    manager: BlockManager<TestMeta>,
}

impl Kvbm {
    /// Room for `n` blocks.
    pub fn new(n: usize) -> Self {
        let tracker = FrequencyTrackingCapacity::default().create_tracker();
        let registry = BlockRegistry::builder().frequency_tracker(tracker).build();
        let builder = BlockManager::<TestMeta>::builder().block_count(n).block_size(BLOCK).registry(registry);
        Kvbm { manager: builder.with_lru_backend().build().expect("the options are valid") }
    }

    fn sequence(prompt: &[u32]) -> TokenBlockSequence {
        TokenBlockSequence::from_slice(prompt, BLOCK as u32, Some(1337))
    }
}

impl PrefixCache for Kvbm {
    fn name(&self) -> &str {
        "kvbm-logical"
    }

    fn matched(&mut self, prompt: &[u32]) -> usize {
        let hashes: Vec<_> = Self::sequence(prompt).blocks().iter().map(|b| b.kvbm_sequence_hash()).collect();
        self.manager.match_blocks(&hashes).len()
    }

    fn request(&mut self, prompt: &[u32], _: u64) -> Option<usize> {
        let sequence = Self::sequence(prompt);
        let blocks = sequence.blocks();
        let hashes: Vec<_> = blocks.iter().map(|b| b.kvbm_sequence_hash()).collect();
        let mut held = self.manager.match_blocks(&hashes);
        let known = held.len();
        let fresh = self.manager.allocate_blocks(blocks.len() - known);
        let fits = fresh.is_some();
        let fresh = fresh.into_iter().flatten().zip(&blocks[known..]);
        let complete: Vec<_> = fresh.map(|(b, t)| b.complete(t).expect("the block is empty")).collect();
        held.extend(self.manager.register_blocks(complete));
        while held.pop().is_some() {} // from the end, so that a prefix outlives what follows it
        fits.then_some(known)
    }

    fn evict(&mut self, blocks: usize) {
        drop(self.manager.allocate_blocks(blocks).expect("so many can be evicted"));
    }
}

/// Takes and gives back blocks.
impl Kvbm {
    /// `n` at once.
    pub fn churn(&self, n: usize) {
        drop(self.manager.allocate_blocks(n).expect("so many are free"));
    }
}

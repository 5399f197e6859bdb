//! NVIDIA Dynamo's router index: it knows which worker has which blocks, and owns no pages.

use dynamo_kv_router::RadixTree;
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, RouterEvent, compute_block_hash_for_seq,
    compute_seq_hash_for_block,
};

use crate::systems::PrefixCache;
use crate::workload::BLOCK;

const WORKER: u64 = 1;

/// The tree with one worker; `stored` is what an eviction must name.
pub struct Dynamo {
    tree: RadixTree,
    events: u64,
    stored: Vec<ExternalSequenceBlockHash>,
}

impl Dynamo {
    /// An empty index.
    #[expect(clippy::new_without_default, reason = "made like the others")]
    pub fn new() -> Self {
        Dynamo { tree: RadixTree::new(), events: 0, stored: Vec::new() }
    }

    fn hashes(prompt: &[u32]) -> Vec<LocalBlockHash> {
        compute_block_hash_for_seq(prompt, BLOCK as u32, Default::default())
    }

    fn apply(&mut self, data: KvCacheEventData) {
        self.events += 1;
        let event = RouterEvent::new(WORKER, KvCacheEvent { event_id: self.events, data, dp_rank: 0 });
        self.tree.apply_event(event).expect("the event is valid");
    }
}

impl PrefixCache for Dynamo {
    fn name(&self) -> &str {
        "dynamo-kv-router"
    }

    fn matched(&mut self, prompt: &[u32]) -> usize {
        let found = self.tree.find_matches(Self::hashes(prompt), false);
        found.scores.values().max().copied().unwrap_or(0) as usize
    }

    fn request(&mut self, prompt: &[u32], _: u64) -> Option<usize> {
        let local = Self::hashes(prompt);
        let known = self.tree.find_matches(local.clone(), false).scores.values().max().copied().unwrap_or(0);
        if (known as usize) < local.len() {
            let names = compute_seq_hash_for_block(&local).into_iter().map(ExternalSequenceBlockHash);
            let named: Vec<_> = local.iter().copied().zip(names).collect();
            self.stored.extend(named[known as usize..].iter().map(|n| n.1));
            let blocks = named.into_iter().map(|(tokens_hash, block_hash)| KvCacheStoredBlockData {
                tokens_hash,
                block_hash,
                mm_extra_info: None,
            });
            let stored =
                KvCacheStoreData { parent_hash: None, start_position: None, blocks: blocks.collect() };
            self.apply(KvCacheEventData::Stored(stored));
        }
        Some(known as usize)
    }

    fn evict(&mut self, blocks: usize) {
        let block_hashes = self.stored.drain(..blocks).collect();
        self.apply(KvCacheEventData::Removed(KvCacheRemoveData { block_hashes }));
    }
}

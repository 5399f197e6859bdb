//! What a cache must do to be compared, dsv4's, and a floor: the least that any cache with hashes must do.

use dsv4_core::cache::retention::Hint;
use dsv4_core::cache::{CacheOptions, Eviction, KvCache};
use dsv4_core::ids::Step;
use dsv4_core::layout::{LayoutSpec, presets};
use rustc_hash::FxHashMap;

use crate::workload::chain;

/// A cache of blocks of [`BLOCK`](crate::workload::BLOCK) tokens, driven from raw tokens.
pub trait PrefixCache {
    /// As it is called in tables.
    fn name(&self) -> &str;

    /// Blocks of the prompt that are cached. Holds nothing afterwards.
    fn matched(&mut self, prompt: &[u32]) -> usize;

    /// A whole request: match, pin, take pages for the rest, publish, release. Blocks that were cached; `None` when
    /// there was no room.
    fn request(&mut self, prompt: &[u32], now_us: u64) -> Option<usize>;

    /// Evicts that many blocks, the least recently used first.
    fn evict(&mut self, blocks: usize);

    /// Bytes of tokens that it keeps for each cached block, to compare or to give back.
    fn token_bytes(&self) -> usize {
        0
    }
}

/// Makes a cache with room for that many blocks.
pub type Maker = fn(usize) -> Box<dyn PrefixCache>;

/// Every system in this build, dsv4 first.
pub fn all() -> Vec<Maker> {
    let makers: &[Maker] = &[
        |n| Box::new(Ours::new(n, Eviction::LRU)),
        |n| Box::new(Floor::new(n)),
        #[cfg(feature = "dynamo")]
        |_| Box::new(crate::dynamo::Dynamo::new()),
        #[cfg(feature = "kvbm")]
        |n| Box::new(crate::kvbm::Kvbm::new(n)),
    ];
    makers.to_vec()
}

/// dsv4's tree and pool with all of V4's components.
pub struct Ours {
    /// The cache itself.
    pub cache: KvCache,
    name: String,
    block: usize,
}

impl Ours {
    /// With Flash's layout.
    pub fn new(blocks: usize, eviction: Eviction) -> Self {
        Self::with_layout(&presets::flash(), blocks, eviction)
    }

    /// With any layout.
    pub fn with_layout(layout: &LayoutSpec, blocks: usize, eviction: Eviction) -> Self {
        let options = CacheOptions { pages: blocks as u32, eviction, ..CacheOptions::default() };
        let cache = KvCache::new(layout, &options).expect("the options are valid");
        let name =
            if eviction == Eviction::LRU { "dsv4".to_owned() } else { format!("dsv4 {}", eviction.name()) };
        Ours { cache, name, block: layout.block_tokens as usize }
    }
}

impl PrefixCache for Ours {
    fn name(&self) -> &str {
        &self.name
    }

    fn matched(&mut self, prompt: &[u32]) -> usize {
        self.cache.lookup(b"", prompt, prompt.len() as u32).history as usize / self.block
    }

    fn request(&mut self, prompt: &[u32], now_us: u64) -> Option<usize> {
        let n = (prompt.len() / self.block * self.block) as u32;
        self.cache.set_time(now_us);
        let known = self.cache.lookup(b"", prompt, n).history;
        let mut seq = self.cache.attach(b"", prompt, known, Hint::default());
        let fits = self.cache.extend(&mut seq, n).is_ok();
        if fits {
            self.cache.publish(&mut seq, prompt, Step(0));
        }
        self.cache.release(seq, Step(0));
        self.cache.retire(Step(0), &[]);
        fits.then_some(known as usize / self.block)
    }

    fn evict(&mut self, blocks: usize) {
        assert_eq!(self.cache.evict_history(blocks as u32), blocks as u32);
    }

    fn token_bytes(&self) -> usize {
        4 * self.block
    }
}

const NONE: u32 = u32::MAX;

/// A chain of 64-bit hashes in a hash map, and a list of least recent use in flat arrays. It trusts hashes, keeps one
/// kind of page, no state, no tenants.
pub struct Floor {
    map: FxHashMap<u64, u32>,
    hash: Vec<u64>,
    links: Vec<[u32; 2]>,
    refs: Vec<u32>,
    free: Vec<u32>,
    ends: [u32; 2],
    held: Vec<u32>,
}

const OLDER: usize = 0;
const NEWER: usize = 1;

impl Floor {
    /// Room for `n` blocks.
    pub fn new(n: usize) -> Self {
        Floor {
            map: FxHashMap::with_capacity_and_hasher(n, Default::default()),
            hash: vec![0; n],
            links: vec![[NONE; 2]; n],
            refs: vec![0; n],
            free: (0..n as u32).rev().collect(),
            ends: [NONE; 2],
            held: Vec::new(),
        }
    }

    fn unlink(&mut self, b: u32) {
        let [older, newer] = self.links[b as usize];
        let mut set = |at: u32, side: usize, to: u32| match at {
            NONE => self.ends[1 - side] = to,
            at => self.links[at as usize][side] = to,
        };
        set(older, NEWER, newer);
        set(newer, OLDER, older);
    }

    fn append(&mut self, b: u32) {
        let newest = self.ends[NEWER];
        self.links[b as usize] = [newest, NONE];
        match newest {
            NONE => self.ends[OLDER] = b,
            at => self.links[at as usize][NEWER] = b,
        }
        self.ends[NEWER] = b;
    }

    fn oldest(&mut self) -> Option<u32> {
        let b = self.ends[OLDER];
        if b == NONE {
            return None;
        }
        self.unlink(b);
        self.map.remove(&self.hash[b as usize]);
        Some(b)
    }

    /// Takes and gives back pages.
    pub fn churn(&mut self, n: usize) {
        let at = self.free.len() - n;
        self.held.extend(self.free.drain(at..));
        self.free.append(&mut self.held);
    }
}

impl PrefixCache for Floor {
    fn name(&self) -> &str {
        "floor"
    }

    fn matched(&mut self, prompt: &[u32]) -> usize {
        chain(prompt).iter().take_while(|h| self.map.contains_key(h)).count()
    }

    fn request(&mut self, prompt: &[u32], _: u64) -> Option<usize> {
        let chain = chain(prompt);
        while let Some(&b) = chain.get(self.held.len()).and_then(|h| self.map.get(h)) {
            if self.refs[b as usize] == 0 {
                self.unlink(b);
            }
            self.refs[b as usize] += 1;
            self.held.push(b);
        }
        let hits = self.held.len();
        let mut fits = true;
        for &hash in &chain[hits..] {
            let Some(b) = self.free.pop().or_else(|| self.oldest()) else {
                fits = false;
                break;
            };
            (self.hash[b as usize], self.refs[b as usize]) = (hash, 1);
            self.map.insert(hash, b);
            self.held.push(b);
        }
        while let Some(b) = self.held.pop() {
            self.refs[b as usize] -= 1;
            if self.refs[b as usize] == 0 {
                self.append(b);
            }
        }
        fits.then_some(hits)
    }

    fn evict(&mut self, blocks: usize) {
        for _ in 0..blocks {
            let b = self.oldest().expect("so many are cached");
            self.free.push(b);
        }
    }
}

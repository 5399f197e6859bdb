//! The cache against a naive oracle: sets of whole prefixes, no sharing tricks, the same LRU written down plainly.
//!
//! Tiny worlds (vocabulary 2, blocks of 4, a few pages) make equal prefixes, adoption and exhaustion common. After every
//! operation: `check()`, the same prefixes and snapshots cached, and every page that a sequence names holds what it should.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{Rng, for_seeds};
use dsv4_core::cache::{CacheOptions, Eviction, KvCache, Lost, Sequence};
use dsv4_core::ids::{PageId, Step};
use dsv4_core::layout::{LayoutSpec, presets};
use dsv4_core::retention::Hint;

const BLOCK: usize = 4;
type Prefix = (u8, Vec<u32>);

/// What ought to be cached: last use by prefix.
#[derive(Default)]
struct Oracle {
    blocks: BTreeMap<Prefix, u64>,
    snapshots: BTreeMap<Prefix, u64>,
}

struct Live {
    seq: Sequence,
    salt: u8,
    tokens: Vec<u32>,
    computed: usize,
}

struct World {
    rng: Rng,
    layout: LayoutSpec,
    cache: KvCache,
    oracle: Oracle,
    live: Vec<Live>,
    leaving: Vec<(u64, Live)>,
    /// What the device would hold: the prefix whose last block a page stores.
    content: Vec<Option<Prefix>>,
    now: u64,
    step: u64,
    done: u64,
}

fn blocks_of(tokens: &[u32]) -> impl Iterator<Item = Vec<u32>> + '_ {
    (1..=tokens.len() / BLOCK).map(|b| tokens[..b * BLOCK].to_vec())
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let layout = presets::toy(BLOCK as u32, 6, 3);
        let pages = 8 + rng.below(33) as u32;
        let options = CacheOptions { pages, eviction: Eviction::Lru, ..CacheOptions::default() };
        World {
            cache: KvCache::new(&layout, &options).unwrap(),
            content: vec![None; pages as usize],
            rng,
            layout,
            oracle: Oracle::default(),
            live: Vec::new(),
            leaving: Vec::new(),
            now: 0,
            step: 0,
            done: 0,
        }
    }

    fn pinned(&self, prefix: &Prefix) -> bool {
        let at = self.live.iter().chain(self.leaving.iter().map(|(_, l)| l));
        at.into_iter().any(|l| {
            l.salt == prefix.0
                && l.seq.published_blocks() as usize * BLOCK >= prefix.1.len()
                && l.tokens.starts_with(&prefix.1)
        })
    }

    /// The block that LRU takes next: nobody uses it, nothing continues it, longest unused, deepest first.
    fn victim(&self) -> Option<(u64, Prefix)> {
        let leaf = |p: &Prefix| {
            !self
                .oracle
                .blocks
                .keys()
                .any(|q| q.0 == p.0 && q.1.len() == p.1.len() + BLOCK && q.1.starts_with(&p.1))
        };
        let free = self.oracle.blocks.iter().filter(|(p, _)| !self.pinned(p) && leaf(p));
        free.map(|(p, &used)| (used, usize::MAX - p.1.len(), p.clone())).min().map(|(used, _, p)| (used, p))
    }

    fn oldest_snapshot(&self) -> Option<(u64, Prefix)> {
        self.oracle.snapshots.iter().map(|(p, &used)| (used, p.clone())).min()
    }

    fn evict_one(&mut self) {
        match (self.victim(), self.oldest_snapshot()) {
            (Some((block, _)), Some((snapshot, p))) if snapshot <= block => {
                self.oracle.snapshots.remove(&p);
            }
            (Some((_, p)), _) => self.evict_block(&p),
            (None, Some((_, p))) => {
                self.oracle.snapshots.remove(&p);
            }
            (None, None) => panic!("the cache evicted, the oracle has nothing to evict"),
        }
    }

    fn evict_block(&mut self, prefix: &Prefix) {
        self.oracle.snapshots.remove(prefix);
        self.oracle.blocks.remove(prefix);
    }

    /// Lets the oracle evict until it has evicted as much as the cache did during `act`.
    fn follow<R>(&mut self, act: impl FnOnce(&mut Self) -> R) -> R {
        let before = self.cache.counters();
        let result = act(self);
        let after = self.cache.counters();
        let evicted = |c: dsv4_core::cache::CacheCounters| c.evicted_blocks + c.snapshots_evicted;
        let target = evicted(after) - evicted(before);
        let size = |w: &Self| (w.oracle.blocks.len() + w.oracle.snapshots.len()) as u64;
        let end = size(self) - target;
        while size(self) > end {
            self.evict_one();
        }
        result
    }

    fn begin(&mut self) {
        let salt = self.rng.below(2) as u8;
        let n = 1 + self.rng.below(30) as usize;
        let tokens: Vec<u32> = (0..n).map(|_| u32::from(self.rng.below(4) == 0)).collect();
        let found = self.cache.lookup(&[salt], &tokens, n as u32 - 1);
        let known =
            blocks_of(&tokens[..n - 1]).take_while(|b| self.oracle.blocks.contains_key(&(salt, b.clone())));
        assert_eq!(found.history as usize, known.count() * BLOCK, "history of {tokens:?}");
        let saved = blocks_of(&tokens[..found.history as usize])
            .filter(|b| self.oracle.snapshots.contains_key(&(salt, b.clone())))
            .map(|b| b.len() as u32);
        assert_eq!(found.snapshots.iter().map(|s| s.0).collect::<Vec<_>>(), saved.collect::<Vec<_>>());
        assert_eq!(
            found.lost == Lost::Nothing,
            n > BLOCK && found.history as usize == (n - 1) / BLOCK * BLOCK
        );
        if let Some(&(pos, id)) = found.snapshots.last() {
            self.now += 1;
            self.cache.lease_snapshot(id, Step(self.step));
            self.oracle.snapshots.insert((salt, tokens[..pos as usize].to_vec()), self.now);
        }
        self.now += 1;
        let seq = self.cache.attach(&[salt], &tokens, found.history, Hint::default());
        self.live.push(Live { seq, salt, tokens, computed: found.history as usize });
    }

    fn compute(&mut self, i: usize) {
        let n = 1 + self.rng.below(9) as usize;
        let upto = (self.live[i].computed + n).min(self.live[i].tokens.len());
        let mut live = self.live.swap_remove(i);
        let need = upto.div_ceil(BLOCK) - live.seq.pages().len().min(upto.div_ceil(BLOCK));
        // The sequence pins its path also while it is out of `live`.
        self.leaving.push((u64::MAX, live));
        let available = self.cache.available();
        let ok = self.follow(|w| {
            let (_, live) = w.leaving.last_mut().unwrap();
            w.cache.extend(&mut live.seq, upto as u32).is_ok()
        });
        live = self.leaving.pop().unwrap().1;
        assert!(
            ok || need as u32 > available || self.cache.leaving_pages() > 0,
            "{need} of {available} refused"
        );
        if ok {
            for block in live.computed / BLOCK..upto / BLOCK {
                let page = live.seq.pages()[block].0 as usize;
                self.content[page] = Some((live.salt, live.tokens[..(block + 1) * BLOCK].to_vec()));
            }
            live.computed = upto;
            self.now += u64::from(upto as u32 / BLOCK as u32 > live.seq.published_blocks());
            let at = Step(self.step);
            self.cache.publish(&mut live.seq, &live.tokens[..upto], at);
            for b in blocks_of(&live.tokens[..upto]) {
                self.oracle.blocks.entry((live.salt, b)).or_insert(self.now);
            }
        }
        self.live.push(live);
    }

    fn save(&mut self, i: usize) {
        let evict = self.rng.below(2) == 0;
        let Some(pages) = self.follow(|w| w.cache.reserve_snapshot(evict)) else { return };
        pages.pages().iter().for_each(|p| self.content[p.0 as usize] = None);
        let live = &mut self.live[i];
        let pos = self.rng.below(live.tokens.len() as u64 / BLOCK as u64 + 2) as usize * BLOCK;
        match self.cache.publish_snapshot(&mut live.seq, pos as u32, pages) {
            Ok(_) => {
                self.now += 1;
                let fresh = self.oracle.snapshots.insert((live.salt, live.tokens[..pos].to_vec()), self.now);
                assert!(fresh.is_none() && pos <= live.seq.published_blocks() as usize * BLOCK);
            }
            Err(pages) => self.cache.drop_snapshot(pages, Step(self.step)),
        }
    }

    fn release(&mut self, i: usize) {
        let live = self.live.swap_remove(i);
        if self.step <= self.done {
            let Live { seq, salt, tokens, .. } = live;
            self.let_go(salt, &tokens[..seq.published_blocks() as usize * BLOCK]);
            self.cache.release(seq, Step(self.step));
        } else {
            // The cache owns the sequence from here; the oracle keeps a stand-in that pins the same prefix.
            let twin =
                Live { seq: self.twin(&live), salt: live.salt, tokens: live.tokens.clone(), computed: 0 };
            self.leaving.push((self.step, twin));
            self.cache.release(live.seq, Step(self.step));
        }
    }

    /// A second sequence at the same place, so that the stand-in has a published length.
    fn twin(&mut self, live: &Live) -> Sequence {
        self.now += 1;
        let upto = live.seq.published_blocks() * BLOCK as u32;
        self.cache.attach(&[live.salt], &live.tokens, upto, Hint::default())
    }

    fn let_go(&mut self, salt: u8, published: &[u32]) {
        self.now += 1;
        for b in blocks_of(published) {
            self.oracle.blocks.insert((salt, b), self.now);
        }
    }

    fn retire(&mut self) {
        self.done = self.step;
        self.cache.retire(Step(self.done));
        for (_, live) in std::mem::take(&mut self.leaving) {
            let published = live.seq.published_blocks() as usize * BLOCK;
            self.cache.release(live.seq, Step(self.done));
            self.now += 2; // the sequence and its stand-in
            let now = self.now;
            for b in blocks_of(&live.tokens[..published]) {
                self.oracle.blocks.insert((live.salt, b), now);
            }
        }
    }

    fn operate(&mut self) {
        let i = if self.live.is_empty() { 0 } else { self.rng.below(self.live.len() as u64) as usize };
        match self.rng.below(if self.live.is_empty() { 5 } else { 16 }) {
            0 | 1 if self.live.len() < 5 => self.begin(),
            2 => self.step += 1,
            3 => self.retire(),
            4 => {
                let n = self.rng.below(3) as u32;
                if self.rng.below(2) == 0 {
                    let victims = self.cache.evict_snapshots(n);
                    for _ in 0..victims {
                        let (_, p) = self.oldest_snapshot().unwrap();
                        self.oracle.snapshots.remove(&p);
                    }
                } else {
                    let victims = self.cache.evict_history(n);
                    (0..victims).for_each(|_| self.victim().map(|(_, p)| self.evict_block(&p)).unwrap());
                }
            }
            5..=10 if !self.live.is_empty() => self.compute(i),
            11..=13 if !self.live.is_empty() => self.save(i),
            14 | 15 if !self.live.is_empty() => self.release(i),
            _ => {}
        }
    }

    fn check(&self) {
        let live = self.live.iter().chain(self.leaving.iter().map(|(_, l)| l));
        self.cache.check(live.clone().map(|l| &l.seq), std::iter::empty()).unwrap();
        assert_eq!(self.cache.cached_blocks() as usize, self.oracle.blocks.len());
        assert_eq!(self.cache.snapshots() as usize, self.oracle.snapshots.len());
        for l in &self.live {
            for (b, &PageId(page)) in l.seq.pages().iter().enumerate().take(l.computed / BLOCK) {
                let should = Some((l.salt, l.tokens[..(b + 1) * BLOCK].to_vec()));
                assert_eq!(self.content[page as usize], should, "block {b} of a running sequence");
            }
        }
    }
}

#[test]
fn behaves_like_the_oracle() {
    for_seeds(1000, |seed| {
        let mut world = World::new(seed);
        for _ in 0..150 {
            world.operate();
            world.check();
        }
        assert!(world.layout.snapshot_pages() >= 1);
    });
}

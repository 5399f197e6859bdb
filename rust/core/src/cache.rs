//! The cache: pool, tree and snapshots behind one door. The scheduler moves [`Sequence`]s through it.
//!
//! ```text
//!   lookup ──▶ attach ──▶ extend ──▶ publish ──▶ … ──▶ release
//!              pins the    takes      full blocks      unpins; what was not published is freed
//!              known path  pages      enter the tree
//! ```
//!
//! **Fences.** What a step in flight may still read or write is given back *behind* that step: it waits in `leaving` until
//! [`KvCache::retire`] says that the step is done. Nothing else frees a page that was in use.
//!
//! **Who holds a page.** The tree (a block or a snapshot), each sequence whose table names it, private snapshots, leases.
//! A request that publishes a block which the tree already has adopts the tree's page, so a running request's published
//! prefix always consists of pinned pages of the tree (docs/decisions/0003).

use std::collections::HashMap;

use crate::cost::CostModel;
use crate::error::{CoreError, Malformed};
pub use crate::eviction::Eviction;
use crate::ids::{PageId, PinId, SnapshotId, Step};
use crate::layout::LayoutSpec;
use crate::pool::PagePool;
use crate::retention::Hint;
use crate::snapshot::{SnapshotPages, Snapshots};
use crate::tree::{Tree, hash_block};

/// How much memory there is and how it is used.
#[derive(Clone, Debug)]
pub struct CacheOptions {
    /// Pages of the pool.
    pub pages: u32,
    /// Which cached page goes first.
    pub eviction: Eviction,
    /// Off: nothing is looked up or kept.
    pub prefix_cache: bool,
    /// Largest share of the pool that snapshots may fill while memory is short.
    pub snapshot_budget: f64,
    /// Tenants with a quota of cached pages.
    pub quotas: Vec<(u32, u32)>,
    /// What recomputation costs.
    pub cost: CostModel,
}

impl Default for CacheOptions {
    fn default() -> Self {
        CacheOptions {
            pages: 1,
            eviction: Eviction::default(),
            prefix_cache: true,
            snapshot_budget: 0.1,
            quotas: Vec::new(),
            cost: CostModel::default(),
        }
    }
}

/// Why a prefix was not known any further.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lost {
    /// All of it was known.
    Nothing,
    /// The next block was never stored under this salt.
    NeverStored,
    /// The next block was stored once and evicted.
    HistoryEvicted,
    /// The prompt has no whole block that could be shared.
    BelowBlock,
}

/// What is known of a prompt.
#[derive(Clone, Debug)]
pub struct Match {
    /// Tokens with history, a multiple of the block size.
    pub history: u32,
    /// Saved states on the way, by position, ascending; all within `history`.
    pub snapshots: Vec<(u32, SnapshotId)>,
    /// Why `history` ends where it ends.
    pub lost: Lost,
    /// The deepest position at which a saved state was evicted.
    pub snapshot_evicted: Option<u32>,
}

/// A running request's place in the cache. Give it back with [`KvCache::release`].
#[derive(Debug)]
pub struct Sequence {
    root: u32,
    cursor: u32,
    published: u32,
    pages: Vec<PageId>,
    hint: Hint,
}

impl Sequence {
    /// The page of each block, known and private ones.
    pub fn pages(&self) -> &[PageId] {
        &self.pages
    }

    /// Blocks that are in the tree.
    pub fn published_blocks(&self) -> u32 {
        self.published
    }
}

/// Not enough pages, also after evicting everything that can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shortage {
    /// Pages asked for.
    pub needed: u32,
    /// Pages free or evictable now.
    pub available: u32,
}

#[derive(Debug)]
enum Leaving {
    Sequence(Sequence),
    Pages(Vec<PageId>),
}

/// Counters that only grow.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheCounters {
    /// Blocks evicted.
    pub evicted_blocks: u64,
    /// Snapshots stored in the tree.
    pub snapshots_taken: u64,
    /// Snapshots leased for a resume.
    pub snapshots_used: u64,
    /// Snapshots evicted.
    pub snapshots_evicted: u64,
    /// Pages given back because the tree had an equal block.
    pub adopted_blocks: u64,
}

/// Entries of the record of evicted blocks, by hash; a later one overwrites.
const GHOSTS: usize = 1 << 14;

/// Pool, tree and snapshots.
#[derive(Debug)]
pub struct KvCache {
    block: u32,
    snapshot_pages: u32,
    fingerprint: u64,
    enabled: bool,
    pool: PagePool,
    tree: Tree,
    snapshots: Snapshots,
    roots: HashMap<Box<[u8]>, u32>,
    salts: HashMap<u32, Box<[u8]>>,
    leaving: Vec<(Step, Leaving)>,
    done: Step,
    now: u64,
    ghosts: Box<[u64]>,
    counters: CacheCounters,
    now_us: u64,
    pins: HashMap<PinId, Sequence>,
    last_pin: u64,
    /// The node at which a session was last let go.
    sessions: HashMap<u64, u32>,
}

impl KvCache {
    /// An empty cache.
    pub fn new(layout: &LayoutSpec, options: &CacheOptions) -> Result<Self, CoreError> {
        if options.pages == 0 {
            return Err(CoreError::config("pages", 0, "the pool needs at least one page"));
        }
        Ok(KvCache {
            block: layout.block_tokens,
            snapshot_pages: layout.snapshot_pages(),
            fingerprint: layout.fingerprint(),
            enabled: options.prefix_cache,
            pool: PagePool::new(options.pages),
            tree: Tree::new(layout.block_tokens),
            snapshots: Snapshots::new(),
            roots: HashMap::new(),
            salts: HashMap::new(),
            leaving: Vec::new(),
            done: Step(0),
            now: 0,
            ghosts: vec![0; GHOSTS].into_boxed_slice(),
            counters: CacheCounters::default(),
            now_us: 0,
            pins: HashMap::new(),
            last_pin: 0,
            sessions: HashMap::new(),
        })
    }

    /// How far whole blocks of `tokens` are known, at most `limit` tokens. Changes nothing, recency included.
    pub fn lookup(&self, salt: &[u8], tokens: &[u32], limit: u32) -> Match {
        let limit = limit.min(tokens.len() as u32) / self.block;
        let nothing = |lost| Match { history: 0, snapshots: Vec::new(), lost, snapshot_evicted: None };
        if limit == 0 {
            return nothing(Lost::BelowBlock);
        }
        let Some(&root) = self.roots.get(salt) else {
            return nothing(self.loss(self.seed(salt), &tokens[..self.block as usize]));
        };
        let walk = self.tree.walk(root, &tokens[..(limit * self.block) as usize]);
        let (mut snapshots, mut evicted) = (Vec::new(), None);
        let mut at = walk.node;
        while at != root {
            let n = self.tree.node(at);
            if n.end() <= walk.blocks {
                snapshots.extend(n.snapshot.map(|s| (n.end() * self.block, s)));
                evicted = evicted.max(n.lost_snapshot.then_some(n.end() * self.block));
            }
            at = n.parent;
        }
        snapshots.reverse();
        let lost = if walk.blocks == limit {
            Lost::Nothing
        } else {
            let next = (walk.blocks * self.block) as usize;
            self.loss(self.chain_at(walk.node, walk.blocks), &tokens[next..next + self.block as usize])
        };
        Match { history: walk.blocks * self.block, snapshots, lost, snapshot_evicted: evicted }
    }

    fn chain_at(&self, node: u32, blocks: u32) -> u64 {
        let n = self.tree.node(node);
        if blocks == n.end() {
            self.tree.chain_at_end(node)
        } else {
            n.chains[(blocks - n.start) as usize - 1]
        }
    }

    fn loss(&self, chain: u64, next_block: &[u32]) -> Lost {
        let key = hash_block(chain, next_block);
        if self.ghosts[key as usize % GHOSTS] == key { Lost::HistoryEvicted } else { Lost::NeverStored }
    }

    fn seed(&self, salt: &[u8]) -> u64 {
        let words: Vec<u32> = salt.iter().map(|&b| u32::from(b)).collect();
        hash_block(self.fingerprint, &words)
    }

    /// Starts a sequence on the first `upto` known tokens (as `lookup` found them): pins the path, shares its pages.
    pub fn attach(&mut self, salt: &[u8], tokens: &[u32], upto: u32, hint: Hint) -> Sequence {
        self.now += 1;
        let root = self.root(salt);
        let walk = self.tree.walk(root, &tokens[..upto as usize]);
        assert_eq!(walk.blocks * self.block, upto, "attach goes as far as lookup found");
        let cursor = self.tree.split(walk.node, walk.blocks);
        self.tree.pin_path(cursor, self.now);
        let mut pages = vec![PageId(0); walk.blocks as usize];
        let mut at = cursor;
        while at != root {
            let n = self.tree.node(at);
            pages[n.start as usize..n.end() as usize].copy_from_slice(&n.pages);
            at = n.parent;
        }
        pages.iter().for_each(|&p| self.pool.retain(p));
        Sequence { root, cursor, published: walk.blocks, pages, hint }
    }

    /// The time now, in microseconds. Going backwards is ignored.
    pub fn set_time(&mut self, now_us: u64) {
        self.now_us = self.now_us.max(now_us);
    }

    /// Keeps the known whole blocks of `tokens`, and the saved states on them, until [`KvCache::unpin`]. Returns the pin
    /// and the tokens that it keeps.
    pub fn pin(&mut self, salt: &[u8], tokens: &[u32]) -> (PinId, u32) {
        let known = self.lookup(salt, tokens, tokens.len() as u32).history;
        let seq = self.attach(salt, tokens, known, Hint::default());
        self.last_pin += 1;
        self.pins.insert(PinId(self.last_pin), seq);
        (PinId(self.last_pin), known)
    }

    /// Ends a pin. False when there is none of that name.
    pub fn unpin(&mut self, pin: PinId) -> bool {
        let seq = self.pins.remove(&pin);
        let known = seq.is_some();
        seq.into_iter().for_each(|seq| self.let_go(Leaving::Sequence(seq)));
        known
    }

    /// A session is over: what only it used goes first when memory is short. False when nothing of it is cached.
    pub fn end_session(&mut self, session: u64) -> bool {
        self.sessions.remove(&session).is_some()
    }

    fn root(&mut self, salt: &[u8]) -> u32 {
        if let Some(&root) = self.roots.get(salt) {
            return root;
        }
        let root = self.tree.new_root(self.seed(salt));
        self.roots.insert(salt.into(), root);
        self.salts.insert(root, salt.into());
        root
    }

    /// Pages so that the sequence covers `tokens`: all or none. Evicts by policy, but only when that will be enough.
    pub fn extend(&mut self, seq: &mut Sequence, tokens: u32) -> Result<(), Shortage> {
        let needed = tokens.div_ceil(self.block).saturating_sub(seq.pages.len() as u32);
        self.make_room(needed)?;
        let taken = self.pool.alloc(needed, &mut seq.pages);
        debug_assert!(taken, "room was made");
        Ok(())
    }

    /// Pages free or evictable now.
    pub fn available(&self) -> u32 {
        self.pool.free() + self.tree.unpinned_blocks() + self.evictable_snapshot_pages()
    }

    fn evictable_snapshot_pages(&self) -> u32 {
        // A leased snapshot's pages stay with the lease; leases end with their step and are few.
        let leased: u32 = self
            .leaving
            .iter()
            .map(|(_, l)| if let Leaving::Pages(p) = l { p.len() as u32 } else { 0 })
            .sum();
        (self.snapshots.count() * self.snapshot_pages).saturating_sub(leased)
    }

    fn make_room(&mut self, needed: u32) -> Result<(), Shortage> {
        if self.pool.free() >= needed {
            return Ok(());
        }
        let shortage = Shortage { needed, available: self.available() };
        if shortage.available < needed {
            return Err(shortage);
        }
        while self.pool.free() < needed {
            if !self.evict_one() {
                return Err(Shortage { needed, available: self.pool.free() });
            }
        }
        Ok(())
    }

    /// Evicts the least recently used block or snapshot.
    fn evict_one(&mut self) -> bool {
        match (self.tree.victim(), self.snapshots.oldest()) {
            (None, None) => false,
            (Some(node), Some((id, used))) if used <= self.tree.node(node).used => {
                self.evict_snapshot(id);
                true
            }
            (Some(node), _) => {
                self.evict_block(node);
                true
            }
            (None, Some((id, _))) => {
                self.evict_snapshot(id);
                true
            }
        }
    }

    fn evict_snapshot(&mut self, id: SnapshotId) {
        let (node, pages) = self.snapshots.remove(id);
        let n = self.tree.node_mut(node);
        (n.snapshot, n.lost_snapshot) = (None, true);
        pages.0.into_iter().for_each(|p| self.pool.release(p));
        self.counters.snapshots_evicted += 1;
    }

    /// Evicts the last block of a leaf; a snapshot at its end has nothing to stand on then and goes first.
    fn evict_block(&mut self, node: u32) {
        if let Some(id) = self.tree.node(node).snapshot {
            self.evict_snapshot(id);
        }
        let parent = self.tree.node(node).parent;
        let (page, chain) = self.tree.pop_block(node);
        self.pool.release(page);
        self.ghosts[chain as usize % GHOSTS] = chain;
        self.counters.evicted_blocks += 1;
        self.drop_idle_root(parent);
    }

    fn drop_idle_root(&mut self, id: u32) {
        let n = self.tree.node(id);
        if n.children == 0
            && n.pins == 0
            && let Some(salt) = self.salts.remove(&id)
        {
            self.roots.remove(&salt);
            self.tree.remove_root(id);
        }
    }

    /// Puts the full blocks of `tokens` (all that is computed) into the tree. Where the tree has an equal block, the
    /// sequence adopts its page: these (block, page) pairs are returned, and the own page is given back behind `at`.
    pub fn publish(&mut self, seq: &mut Sequence, tokens: &[u32], at: Step) -> Vec<(u32, PageId)> {
        let full = tokens.len() as u32 / self.block;
        let (mut adopted, mut spare) = (Vec::new(), Vec::new());
        if !self.enabled || full <= seq.published {
            return adopted;
        }
        self.now += 1;
        let rest = |from: u32| &tokens[(from * self.block) as usize..(full * self.block) as usize];
        let walk = self.tree.walk(seq.cursor, rest(seq.published));
        // The walk goes down node by node; each one on the way is pinned, the last one ends where the walk ended.
        if walk.blocks > seq.published {
            let last = self.tree.split(walk.node, walk.blocks);
            let mut at_node = last;
            while at_node != seq.cursor {
                self.tree.pin_one(at_node, self.now);
                let n = self.tree.node(at_node);
                for (block, &page) in (n.start..n.end()).zip(&n.pages) {
                    self.pool.retain(page);
                    spare.push(std::mem::replace(&mut seq.pages[block as usize], page));
                    adopted.push((block, page));
                }
                at_node = n.parent;
            }
            (seq.cursor, seq.published) = (last, walk.blocks);
        }
        if full > seq.published {
            let pages = &seq.pages[seq.published as usize..full as usize];
            seq.cursor = self.tree.append(seq.cursor, rest(seq.published), pages, self.now);
            pages.iter().for_each(|&p| self.pool.retain(p));
            seq.published = full;
        }
        self.counters.adopted_blocks += adopted.len() as u64;
        self.leave(Leaving::Pages(spare), at);
        adopted
    }

    /// Pages for a state to be saved. Without `may_evict` only free pages are taken.
    pub fn reserve_snapshot(&mut self, may_evict: bool) -> Option<SnapshotPages> {
        let mut pages = Vec::new();
        let n = self.snapshot_pages;
        let room = self.enabled && if may_evict { self.make_room(n).is_ok() } else { self.pool.free() >= n };
        (room && self.pool.alloc(n, &mut pages)).then_some(SnapshotPages(pages))
    }

    /// Stores a saved state at position `pos` of the sequence's published path. Hands the pages back when the path is not
    /// published that far or has a state there already.
    pub fn publish_snapshot(
        &mut self,
        seq: &mut Sequence,
        pos: u32,
        pages: SnapshotPages,
    ) -> Result<SnapshotId, SnapshotPages> {
        let blocks = pos / self.block;
        if !pos.is_multiple_of(self.block) || blocks == 0 || blocks > seq.published {
            return Err(pages);
        }
        let node = self.tree.node_ending_at(seq.cursor, blocks);
        if self.tree.node(node).snapshot.is_some() {
            return Err(pages);
        }
        self.now += 1;
        let id = self.snapshots.insert(node, pages, self.now);
        let n = self.tree.node_mut(node);
        (n.snapshot, n.lost_snapshot) = (Some(id), false);
        self.counters.snapshots_taken += 1;
        Ok(id)
    }

    /// Gives pages of a state that will not be stored back, behind `at`.
    pub fn drop_snapshot(&mut self, pages: SnapshotPages, at: Step) {
        self.leave(Leaving::Pages(pages.0), at);
    }

    /// The pages of a saved state, held until step `at` is done, whatever happens to the snapshot meanwhile.
    pub fn lease_snapshot(&mut self, id: SnapshotId, at: Step) -> Vec<PageId> {
        self.now += 1;
        self.snapshots.touch(id, self.now);
        self.counters.snapshots_used += 1;
        let pages = self.snapshots.pages(id).to_vec();
        pages.iter().for_each(|&p| self.pool.retain(p));
        self.leave(Leaving::Pages(pages.clone()), at);
        pages
    }

    /// Ends a sequence behind `at`: unpins its path, frees what was not published.
    pub fn release(&mut self, seq: Sequence, at: Step) {
        self.leave(Leaving::Sequence(seq), at);
    }

    fn leave(&mut self, what: Leaving, at: Step) {
        if at <= self.done {
            self.let_go(what);
        } else {
            self.leaving.push((at, what));
        }
    }

    fn let_go(&mut self, what: Leaving) {
        let pages = match what {
            Leaving::Pages(pages) => pages,
            Leaving::Sequence(seq) => {
                self.now += 1;
                self.tree.unpin_path(seq.cursor, self.now);
                seq.hint.retention.session.map(|s| self.sessions.insert(s, seq.cursor));
                self.drop_idle_root(seq.root);
                seq.pages
            }
        };
        pages.into_iter().for_each(|p| self.pool.release(p));
    }

    /// All steps up to `done` are over: what waited behind them is free.
    pub fn retire(&mut self, done: Step) {
        self.done = self.done.max(done);
        let (over, waiting) =
            std::mem::take(&mut self.leaving).into_iter().partition(|(at, _)| *at <= self.done);
        self.leaving = waiting;
        let over: Vec<(Step, Leaving)> = over;
        over.into_iter().for_each(|(_, what)| self.let_go(what));
    }

    /// Evicts up to `n` snapshots, least recently used first, and no history. Returns how many went.
    pub fn evict_snapshots(&mut self, n: u32) -> u32 {
        let evict = |_| self.snapshots.oldest().map(|(id, _)| self.evict_snapshot(id));
        (0..n).map_while(evict).count() as u32
    }

    /// Evicts up to `n` blocks nobody uses, least recently used first, each with the snapshot that stands on it.
    pub fn evict_history(&mut self, n: u32) -> u32 {
        let evict = |_| self.tree.victim().map(|node| self.evict_block(node));
        (0..n).map_while(evict).count() as u32
    }

    /// Evicts everything that nobody uses. Returns the number of pages that became free.
    pub fn clear(&mut self) -> u32 {
        let before = self.pool.free();
        while self.evict_one() {}
        self.pool.free() - before
    }

    /// Pages in all.
    pub fn pages(&self) -> u32 {
        self.pool.len()
    }

    /// Pages that can be taken without evicting.
    pub fn free_pages(&self) -> u32 {
        self.pool.free()
    }

    /// Blocks in the tree.
    pub fn cached_blocks(&self) -> u32 {
        self.tree.blocks()
    }

    /// Snapshots in the tree.
    pub fn snapshots(&self) -> u32 {
        self.snapshots.count()
    }

    /// Pages that wait for a step to end (an upper bound: shared ones count too).
    pub fn leaving_pages(&self) -> u32 {
        let size = |l: &Leaving| match l {
            Leaving::Pages(p) => p.len() as u32,
            Leaving::Sequence(s) => s.pages.len() as u32 - s.published,
        };
        self.leaving.iter().map(|(_, l)| size(l)).sum()
    }

    /// What happened so far.
    pub fn counters(&self) -> CacheCounters {
        self.counters
    }

    /// Bytes of bookkeeping of the tree besides tokens.
    pub fn metadata_bytes(&self) -> usize {
        self.tree.metadata_bytes()
    }

    /// Recomputes every count from scratch. `live` are the sequences and `held` the private snapshots outside the cache.
    pub fn check<'a>(
        &'a self,
        live: impl Iterator<Item = &'a Sequence>,
        held: impl Iterator<Item = &'a SnapshotPages>,
    ) -> Result<(), Malformed> {
        let leaving = self.leaving.iter().map(|(_, l)| l);
        let (mut cursors, mut holders): (Vec<&Sequence>, Vec<PageId>) =
            (live.chain(self.pins.values()).collect(), Vec::new());
        for l in leaving {
            match l {
                Leaving::Sequence(s) => cursors.push(s),
                Leaving::Pages(p) => holders.extend(p),
            }
        }
        let mut pins = vec![0; self.tree.capacity()];
        for seq in &cursors {
            holders.extend(&seq.pages);
            self.check_path(seq, &mut pins)?;
        }
        holders.extend(held.flat_map(|s| &s.0));
        holders.extend(self.tree.ids().flat_map(|id| &self.tree.node(id).pages));
        holders.extend(self.snapshots.iter().flat_map(|(_, _, p)| p));
        self.pool.check(holders.into_iter())?;
        self.tree.check(&pins)?;
        self.snapshots.check()?;
        for (id, node, _) in self.snapshots.iter() {
            let owner = self.tree.node(node).snapshot;
            Malformed::unless(owner == Some(id), "snapshot owner", || {
                format!("{id:?} at node {node}, which has {owner:?}")
            })?;
        }
        let owned = self.tree.ids().filter(|&id| self.tree.node(id).snapshot.is_some()).count() as u32;
        Malformed::unless(owned == self.snapshots.count(), "snapshots", || {
            format!("{owned} nodes have one, {} exist", self.snapshots.count())
        })
    }

    /// A sequence's cursor ends where its published part ends, and its table names the tree's pages up to there.
    fn check_path(&self, seq: &Sequence, pins: &mut [u32]) -> Result<(), Malformed> {
        let mut at = seq.cursor;
        let end = self.tree.node(at).end();
        Malformed::unless(end == seq.published, "cursor", || {
            format!("ends at {end}, published {}", seq.published)
        })?;
        while at != seq.root {
            let n = self.tree.node(at);
            pins[at as usize] += 1;
            let table = &seq.pages[n.start as usize..n.end() as usize];
            Malformed::unless(table == n.pages, "page table", || {
                format!("node {at}: {table:?}, tree {:?}", n.pages)
            })?;
            at = n.parent;
        }
        Ok(())
    }
}

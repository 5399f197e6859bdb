//! The cache: pool, tree and snapshots behind one door. The scheduler moves [`Sequence`]s through it.
//!
//! ```text
//!   lookup ──▶ attach ──▶ extend ──▶ publish ──▶ … ──▶ release
//!              pins the    takes      full blocks      unpins; what was not published is freed
//!              known path  pages      enter the tree
//! ```
//!
//! | file | does |
//! | --- | --- |
//! | `mod.rs` | the life of a sequence, from attach to release |
//! | `lookup.rs` | what is known of a prompt, and why not more |
//! | `evict.rs` | room for what is needed: who goes |
//! | `states.rs` | snapshots: room, admission, what replaces what |
//! | `turns.rs` | which of a turn's two states is gone on from |
//! | `keep.rs` | pins, sessions, time |
//! | `changes.rs` | what entered and left the tree, where someone mirrors it |
//! | `image.rs` | the cache as data, for a dump |
//! | `check.rs` | every count from scratch |
//! | `pool.rs`, `tree.rs`, `snapshot.rs` | what is cached: pages, prefixes, saved states |
//! | `worth.rs`, `eviction/` | the order in which they go, and its policies |
//! | `ghosts.rs` | what went |
//! | `retention.rs` | what clients ask for: priorities, times to live, sessions, quotas |
//!
//! **Fences.** What a step or a copy in flight may still read or write is given back *behind* it: it waits in `leaving` until
//! [`KvCache::retire`] says that the step or copy is over. Nothing else frees a page that was in use.
//!
//! **Who holds a page.** The tree (a block or a snapshot), each sequence whose table names it, private snapshots, leases.
//! A request that publishes a block which the tree already has adopts the tree's page, so a running request's published
//! prefix always consists of pinned pages of the tree (docs/decisions/0003).

mod changes;
mod check;
mod evict;
pub mod eviction;
mod ghosts;
mod image;
mod keep;
mod lookup;
pub mod pool;
pub mod retention;
pub mod snapshot;
mod states;
pub(crate) mod tree;
pub mod turns;
mod worth;

use std::collections::{BTreeMap, HashMap};

pub use self::changes::Change;
use self::changes::Changes;
use self::keep::Pin;
pub use self::lookup::{Lost, Match};
pub use crate::cache::eviction::Eviction;
use crate::cache::ghosts::Ghosts;
use crate::cache::pool::PagePool;
use crate::cache::retention::{Hint, Quotas, Sessions};
use crate::cache::snapshot::Snapshots;
use crate::cache::tree::{Facts, NIL, Tree};
use crate::cache::turns::{Habit, Habits};
use crate::cache::worth::Worth;
use crate::cost::CostModel;
use crate::error::CoreError;
use crate::fence::{Fence, Until};
use crate::ids::{PageId, PinId, Step, Ticket};
use crate::layout::LayoutSpec;
pub use image::CacheImage;

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
    /// While memory is short, a state is only saved where it is worth more than what it pushes out.
    pub admit_by_value: bool,
    /// Tenants with a quota of cached pages.
    pub quotas: Vec<(u32, u32)>,
    /// What recomputation costs.
    pub cost: CostModel,
    /// Tokens of an exact replay.
    pub replay_tokens: u32,
    /// Whether changes of what is cached are kept for [`KvCache::take_changes`].
    pub changes: bool,
}

impl Default for CacheOptions {
    fn default() -> Self {
        CacheOptions {
            pages: 1,
            eviction: Eviction::default(),
            prefix_cache: true,
            snapshot_budget: 0.1,
            admit_by_value: false,
            quotas: Vec::new(),
            cost: CostModel::default(),
            replay_tokens: u32::MAX,
            changes: false,
        }
    }
}

/// A running request's place in the cache. Give it back with [`KvCache::release`].
#[derive(Debug)]
pub struct Sequence {
    root: u32,
    cursor: u32,
    published: u32,
    pages: Vec<PageId>,
    hint: Hint,
    /// It started on a known prefix.
    grown: bool,
    /// Uses of the blocks that it stores again after their eviction.
    again: u8,
    /// The edge that it added last, and when: further blocks join it, unless others have used it since.
    edge: (u32, u64),
    /// Blocks up to the last boundary inside its prompt; 0: it has no turn.
    asked: u32,
    /// What its conversation has gone on from so far.
    habit: Habit,
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

    /// It is a turn: a prompt up to the boundary after so many blocks, and what answers it.
    pub fn asks(&mut self, blocks: u32) {
        self.asked = blocks;
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
    /// States not saved because what they would have pushed out was worth more.
    pub snapshots_declined: u64,
    /// Pages given back because the tree had an equal block.
    pub adopted_blocks: u64,
}

/// Pool, tree and snapshots.
#[derive(Debug)]
pub struct KvCache {
    block: u32,
    snapshot_pages: u32,
    fingerprint: u64,
    options: CacheOptions,
    pool: PagePool,
    tree: Tree,
    snapshots: Snapshots,
    worth: Worth,
    ghosts: Ghosts,
    quotas: Quotas,
    sessions: Sessions,
    habits: Habits,
    pins: BTreeMap<PinId, Pin>,
    last_pin: u64,
    /// Blocks and snapshots that no eviction can reach, because their prefix is pinned by name.
    pinned_blocks: u32,
    held_snapshots: u32,
    roots: HashMap<Box<[u8]>, u32>,
    /// Salt and hash seed by root.
    salts: HashMap<u32, (Box<[u8]>, u64)>,
    leaving: Fence<Leaving>,
    /// Operations so far: what is used later has a higher number.
    now: u64,
    now_us: u64,
    popped: Vec<PageId>,
    changes: Option<Changes>,
    counters: CacheCounters,
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
            pool: PagePool::new(options.pages),
            tree: Tree::new(layout.block_tokens, options.pages),
            snapshots: Snapshots::default(),
            worth: Worth::new(options.eviction, options.quotas.iter().map(|q| q.0)),
            ghosts: Ghosts::new(options.pages),
            quotas: Quotas::new(&options.quotas),
            sessions: Sessions::new(),
            habits: Habits::default(),
            pins: BTreeMap::new(),
            last_pin: 0,
            pinned_blocks: 0,
            held_snapshots: 0,
            roots: HashMap::new(),
            salts: HashMap::new(),
            leaving: Fence::default(),
            now: 0,
            now_us: 0,
            popped: Vec::new(),
            changes: options.changes.then(|| Changes::new(layout.block_tokens, options.pages)),
            counters: CacheCounters::default(),
            options: options.clone(),
        })
    }

    /// Starts a sequence on the first `upto` known tokens (as `lookup` found them): pins the path, shares its pages.
    pub fn attach(&mut self, salt: &[u8], tokens: &[u32], upto: u32, hint: Hint) -> Sequence {
        self.attach_found(salt, tokens, upto, hint, &Match::nothing(Lost::NeverStored))
    }

    /// [`KvCache::attach`] after `found`, the lookup of the same tokens: they are not compared again as long as no block has gone since.
    pub fn attach_found(
        &mut self,
        salt: &[u8],
        tokens: &[u32],
        upto: u32,
        hint: Hint,
        found: &Match,
    ) -> Sequence {
        self.now += 1;
        let root = self.root(salt);
        let again = || self.tree.walk(root, &tokens[..upto as usize]);
        let walk = self.tree.part_of(found.walk, root, upto / self.block).unwrap_or_else(again);
        debug_assert_eq!(walk, again(), "a walk holds until blocks go");
        assert_eq!(walk.blocks * self.block, upto, "attach goes as far as lookup found");
        // Going on from the end of a path says that its owner is still there, not that others want it, too.
        let habit = self.goes_on(walk.node, walk.blocks, hint.tenant);
        let n = self.tree.node(walk.node);
        let goes_on =
            n.children == 0 && walk.blocks == n.end() && tokens.len() as u32 / self.block > walk.blocks;
        let cursor = self.tree.split(walk.node, walk.blocks);
        let mut pages = vec![PageId(0); walk.blocks as usize];
        let mut at = cursor;
        while at != root {
            self.pin_node(at);
            self.count_use(at, !goes_on, &hint);
            let n = self.tree.node(at);
            pages[n.start as usize..n.end() as usize].copy_from_slice(&n.pages);
            at = n.parent;
        }
        self.pin_node(root);
        pages.iter().for_each(|&p| self.pool.retain(p));
        Sequence {
            root,
            cursor,
            published: walk.blocks,
            pages,
            hint,
            grown: walk.blocks > 0,
            again: 0,
            edge: (NIL, 0),
            asked: 0,
            habit,
        }
    }

    /// A request came for these blocks.
    fn count_use(&mut self, id: u32, by_others: bool, hint: &Hint) {
        let (now, now_us) = (self.now, self.now_us);
        let n = self.tree.node_mut(id);
        let f = &mut n.facts;
        let (past, age) = (f.past(), now - f.used);
        f.uses = f.uses.saturating_add(u8::from(by_others));
        f.grown = !by_others;
        f.level = if f.expiry <= now_us { hint.level() } else { f.level.max(hint.level()) };
        f.expiry = f.expiry.max(hint.expiry(now_us));
        (f.used, f.ended) = (now, false);
        self.worth.used(past, age, n.pages.len() as u32);
    }

    fn pin_node(&mut self, id: u32) {
        if self.tree.pin(id) {
            self.unlist_blocks(id);
        }
    }

    fn root(&mut self, salt: &[u8]) -> u32 {
        if let Some(&root) = self.roots.get(salt) {
            return root;
        }
        let (root, seed) = (self.tree.new_root(), self.seed(salt));
        self.roots.insert(salt.into(), root);
        self.salts.insert(root, (salt.into(), seed));
        root
    }

    fn drop_idle_root(&mut self, id: u32) {
        let n = self.tree.node(id);
        if n.children == 0
            && n.pins == 0
            && let Some((salt, _)) = self.salts.remove(&id)
        {
            self.roots.remove(&salt);
            self.tree.remove_root(id);
        }
    }

    /// Pages so that the sequence covers `tokens`: all or none. Evicts by policy, but only when that will be enough.
    pub fn extend(&mut self, seq: &mut Sequence, tokens: u32) -> Result<(), Shortage> {
        let needed = tokens.div_ceil(self.block).saturating_sub(seq.pages.len() as u32);
        self.make_room(needed, false)?;
        let taken = self.pool.alloc(needed, &mut seq.pages);
        debug_assert!(taken, "room was made");
        Ok(())
    }

    /// Gives back the pages of a sequence beyond `tokens`, which no step in flight touches.
    pub fn shrink(&mut self, seq: &mut Sequence, tokens: u32) {
        let keep = tokens.div_ceil(self.block).max(seq.published) as usize;
        let unused = seq.pages.len().min(keep)..seq.pages.len();
        seq.pages.drain(unused).for_each(|p| self.pool.release(p));
    }

    /// Puts the full blocks of `tokens` (all that is computed) into the tree. Where the tree has an equal block, the
    /// sequence adopts its page: these (block, page) pairs are returned, and the own page is given back, in use until `until`.
    pub fn publish(
        &mut self,
        seq: &mut Sequence,
        tokens: &[u32],
        until: impl Into<Until>,
    ) -> Vec<(u32, PageId)> {
        let full = tokens.len() as u32 / self.block;
        let (mut adopted, mut spare) = (Vec::new(), Vec::new());
        if !self.options.prefix_cache || full <= seq.published {
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
                self.pin_node(at_node);
                self.count_use(at_node, true, &seq.hint);
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
            self.store(seq, tokens, full);
        }
        self.counters.adopted_blocks += adopted.len() as u64;
        if !spare.is_empty() {
            self.leave(Leaving::Pages(spare), until.into());
        }
        adopted
    }

    /// New blocks of the sequence enter the tree.
    fn store(&mut self, seq: &mut Sequence, tokens: &[u32], full: u32) {
        let from = seq.published;
        if let Some(uses) = self.ghosts.find(self.name(self.salts[&seq.root].1, tokens, from)) {
            seq.again = uses.saturating_add(1);
        }
        let pages = &seq.pages[from as usize..full as usize];
        let facts = Facts {
            born: self.now,
            used: self.now,
            expiry: seq.hint.expiry(self.now_us),
            tenant: seq.hint.tenant,
            uses: seq.again,
            grown: seq.grown,
            level: seq.hint.level(),
            ..Facts::default()
        };
        let rest = &tokens[(from * self.block) as usize..(full * self.block) as usize];
        // Blocks of one edge share what is known of them; their time of birth is what `fifo` goes by.
        let known = self.tree.node(seq.cursor).facts;
        let mine = seq.edge == (seq.cursor, known.used) && known.uses == facts.uses;
        let may_grow = mine && !self.worth.goes_by_birth();
        seq.cursor = self.tree.append(seq.cursor, rest, pages, facts, may_grow);
        seq.edge = (seq.cursor, self.now);
        pages.iter().for_each(|&p| self.pool.retain(p));
        if let Some(changes) = &mut self.changes {
            let before = from.checked_sub(1).map(|i| seq.pages[i as usize]);
            let (salt, seed) = &self.salts[&seq.root];
            changes.name_blocks(*seed, before, pages, rest);
            changes.note(changes.stored(before, pages, rest.to_vec(), salt, seq.hint.retention.session));
        }
        self.quotas.add(facts.tenant, full - from);
        seq.published = full;
    }

    /// Ends a sequence that is in use until then: unpins its path, frees what was not published.
    pub fn release(&mut self, seq: Sequence, until: impl Into<Until>) {
        self.leave(Leaving::Sequence(seq), until.into());
    }

    fn leave(&mut self, what: Leaving, until: Until) {
        if let Some(what) = self.leaving.put(what, until) {
            self.let_go(what);
        }
    }

    fn let_go(&mut self, what: Leaving) {
        let pages = match what {
            Leaving::Pages(pages) => pages,
            Leaving::Sequence(seq) => {
                self.now += 1;
                self.unpin_path(seq.cursor, Some(&seq.hint));
                self.move_session(&seq);
                self.drop_idle_root(seq.root);
                seq.pages
            }
        };
        pages.into_iter().for_each(|p| self.pool.release(p));
    }

    /// Takes a cursor's pins back. With a hint the path counts as used now.
    fn unpin_path(&mut self, mut id: u32, hint: Option<&Hint>) {
        loop {
            let (now, now_us) = (self.now, self.now_us);
            let n = self.tree.node_mut(id);
            if let Some(hint) = hint {
                n.facts.used = now;
                n.facts.expiry = n.facts.expiry.max(hint.expiry(now_us));
            }
            let parent = n.parent;
            if self.tree.unpin(id) {
                self.list_blocks(id);
            }
            if parent == NIL {
                return;
            }
            id = parent;
        }
    }

    /// All steps up to `done` are over, and these copies have ended: what waited behind them is free.
    pub fn retire(&mut self, done: Step, ended: &[Ticket]) {
        self.leaving.retire(done, ended).into_iter().for_each(|what| self.let_go(what));
    }

    /// Whether something waits for a step or copy to end, so that there will be more pages soon.
    pub fn has_leaving(&self) -> bool {
        !self.leaving.is_empty()
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

    /// Pages that wait for a step or copy to end (an upper bound: shared ones count too).
    pub fn leaving_pages(&self) -> u32 {
        let size = |l: &Leaving| match l {
            Leaving::Pages(p) => p.len() as u32,
            Leaving::Sequence(s) => s.pages.len() as u32 - s.published,
        };
        self.leaving.iter().map(size).sum()
    }

    /// The layout whose pages these are.
    pub fn fingerprint(&self) -> u64 {
        self.fingerprint
    }

    /// What entered and left the tree since the last call, in order. Whoever turned [`CacheOptions::changes`] on calls it.
    pub fn take_changes(&mut self) -> Vec<Change> {
        self.changes.as_mut().map_or_else(Vec::new, Changes::take)
    }

    /// All that is in the tree, as if it had just been stored in an empty one.
    pub fn picture(&self) -> Vec<Change> {
        let Some(changes) = &self.changes else { return Vec::new() };
        let mut ids: Vec<u32> = self.tree.ids().collect();
        ids.sort_by_key(|&id| (self.tree.node(id).start, id));
        let stored = |id| {
            let n = self.tree.node(id);
            let before = self.tree.node(n.parent).pages.last().copied();
            let tokens = n.pages.iter().flat_map(|&p| self.tree.tokens_of(p)).copied().collect();
            changes.stored(before, &n.pages, tokens, &self.salts[&n.root].0, None)
        };
        ids.into_iter().map(stored).collect()
    }

    /// What happened so far.
    pub fn counters(&self) -> CacheCounters {
        self.counters
    }
}

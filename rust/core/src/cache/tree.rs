//! The radix tree over token blocks: which pages hold the history of which prefix.
//!
//! ```text
//!   root(salt) ── [ b0 b1 b2 ] ──┬── [ b3 b4 ] *        edge = run of blocks
//!                                └── [ b3' ] ── [ … ] * node end = optional snapshot (*)
//! ```
//!
//! - **Tokens lie by page**: the tokens of the block whose history is in page `p` are `tokens[p * block ..][.. block]`. An
//!   edge is then a list of page ids; splitting it moves no token, and pages that follow each other are compared at once.
//! - A child is found by a hash of its first block and then compared token by token; equal hashes never make equal prefixes.
//! - **Pins.** Each running request pins every node from its cursor to the root; its cursor is always a node's end.
//! - **Split** gives the new node the upper part; the lower one keeps its id, its children and the cursors at its end.

use hashbrown::HashTable;
use serde::{Deserialize, Serialize};

use crate::cache::eviction::Past;
use crate::cache::turns::Turn;
use crate::cache::worth::List;
use crate::error::Malformed;
use crate::ids::{PageId, SnapshotId};

/// "No node": parent of roots.
pub(crate) const NIL: u32 = u32::MAX;

/// What the blocks of an edge have in common besides their tokens.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Facts {
    /// When it was stored and when it was used last, on the cache's counters of operations.
    pub born: u64,
    pub used: u64,
    /// Kept at least until then.
    pub expiry: u64,
    /// Whose quota it counts against.
    pub tenant: u32,
    /// Later requests that came for it and did not just continue the path.
    pub uses: u8,
    /// It continued a known prefix when it was stored.
    pub grown: bool,
    /// Priority of retention.
    pub level: i8,
    /// Its owner said that it is over: first to go.
    pub ended: bool,
    /// A snapshot at its end was evicted.
    pub lost_snapshot: bool,
}

impl Facts {
    /// How the blocks have been used.
    pub fn past(&self) -> Past {
        Past { snapshot: false, uses: self.uses, grown: self.grown }
    }
}

/// An edge and the node at its end.
#[derive(Debug)]
pub(crate) struct Node {
    pub parent: u32,
    /// The root above; its own id for a root.
    pub root: u32,
    /// Blocks before this edge.
    pub start: u32,
    pub pages: Vec<PageId>,
    pub children: u32,
    /// Cursors at or below.
    pub pins: u32,
    /// Explicit pins at or below; they are among `pins`.
    pub holds: u32,
    pub snapshot: Option<SnapshotId>,
    /// What a turn has left at its end.
    pub turn: Option<Turn>,
    pub facts: Facts,
    /// Where it is listed among what can go.
    pub listed: Option<List>,
}

impl Node {
    /// Blocks up to and with this edge.
    pub fn end(&self) -> u32 {
        self.start + self.pages.len() as u32
    }

    pub fn is_root(&self) -> bool {
        self.parent == NIL
    }

    /// Nobody uses it and nothing continues it.
    pub fn is_free_leaf(&self) -> bool {
        self.pins == 0 && self.children == 0 && !self.is_root()
    }
}

/// How far a prefix is known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Walk {
    /// The last node with a matched block (or the root).
    pub node: u32,
    /// Blocks matched in all; inside `node`'s edge or at its end.
    pub blocks: u32,
    /// Blocks that had left the tree by then.
    removed: u64,
}

/// The tree. Roots are nodes without blocks; the caller keeps one per salt.
#[derive(Debug)]
pub(crate) struct Tree {
    block: usize,
    tokens: Vec<u32>,
    nodes: Vec<Node>,
    vacant: Vec<u32>,
    children: HashTable<(u64, u32)>,
    /// First blocks of all roots, by hash of their tokens: tells what is known under another salt.
    firsts: HashTable<(u64, u32)>,
    blocks: u32,
    unpinned_blocks: u32,
    /// Blocks that have left it so far.
    removed: u64,
}

/// A fast hash of tokens, continuing from `seed`. Quality matters little: equality is decided by comparing tokens.
pub(crate) fn hash_block(seed: u64, tokens: &[u32]) -> u64 {
    const K: [u64; 4] =
        [0x9e37_79b9_7f4a_7c15, 0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb, 0xd6e8_feb8_6659_fd93];
    let mut lanes = [seed ^ K[0], seed.rotate_left(17) ^ K[1], !seed, seed.rotate_left(41) ^ K[3]];
    let (eights, rest) = tokens.as_chunks::<8>();
    for t in eights {
        for i in 0..4 {
            let word = u64::from(t[2 * i]) | u64::from(t[2 * i + 1]) << 32;
            lanes[i] = (lanes[i] ^ word).wrapping_mul(K[i]).rotate_left(29);
        }
    }
    for &t in rest {
        lanes[0] = (lanes[0] ^ u64::from(t) ^ (1 << 32)).wrapping_mul(K[0]).rotate_left(29);
    }
    let mixed = lanes.into_iter().fold(0u64, |h, l| (h.rotate_left(23) ^ l).wrapping_mul(K[2]));
    (mixed ^ (mixed >> 31)).wrapping_mul(K[1]) ^ (mixed >> 29)
}

/// Pages at the start of `pages` that follow each other.
fn run_of(pages: &[PageId]) -> usize {
    1 + pages.windows(2).take_while(|w| w[1].0 == w[0].0 + 1).count()
}

impl Tree {
    pub fn new(block_tokens: u32, pages: u32) -> Self {
        Tree {
            block: block_tokens as usize,
            tokens: vec![0; block_tokens as usize * pages as usize],
            nodes: Vec::new(),
            vacant: Vec::new(),
            children: HashTable::new(),
            firsts: HashTable::new(),
            blocks: 0,
            unpinned_blocks: 0,
            removed: 0,
        }
    }

    pub fn node(&self, id: u32) -> &Node {
        &self.nodes[id as usize]
    }

    pub fn node_mut(&mut self, id: u32) -> &mut Node {
        &mut self.nodes[id as usize]
    }

    /// Blocks in the tree.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Blocks that eviction can reach.
    pub fn unpinned_blocks(&self) -> u32 {
        self.unpinned_blocks
    }

    /// The tokens of the block in a page of the tree.
    pub fn tokens_of(&self, page: PageId) -> &[u32] {
        &self.tokens[page.0 as usize * self.block..][..self.block]
    }

    fn first_tokens(&self, id: u32) -> &[u32] {
        self.tokens_of(self.node(id).pages[0])
    }

    /// Bytes of bookkeeping besides tokens.
    pub fn metadata_bytes(&self) -> usize {
        let pages: usize = self.nodes.iter().map(|n| n.pages.capacity() * 4).sum();
        let tables = self.children.allocation_size() + self.firsts.allocation_size();
        self.nodes.capacity() * size_of::<Node>() + self.vacant.capacity() * 4 + tables + pages
    }

    /// A node without blocks that is never evicted.
    pub fn new_root(&mut self) -> u32 {
        let id = self.place(NIL, 0, Vec::new(), Facts::default());
        self.node_mut(id).root = id;
        id
    }

    /// Node slots, for callers that count per node.
    pub fn capacity(&self) -> usize {
        self.nodes.len()
    }

    /// Removes a root that has no children and no cursors.
    pub fn remove_root(&mut self, id: u32) {
        debug_assert!(self.node(id).is_root() && self.node(id).children == 0 && self.node(id).pins == 0);
        self.vacant.push(id);
    }

    fn place(&mut self, parent: u32, start: u32, pages: Vec<PageId>, facts: Facts) -> u32 {
        let root = if parent == NIL { NIL } else { self.node(parent).root };
        let node = Node {
            parent,
            root,
            start,
            pages,
            children: 0,
            pins: 0,
            holds: 0,
            snapshot: None,
            turn: None,
            facts,
            listed: None,
        };
        if let Some(id) = self.vacant.pop() {
            self.nodes[id as usize] = node;
            id
        } else {
            self.nodes.push(node);
            self.nodes.len() as u32 - 1
        }
    }

    fn find_child(&self, parent: u32, first_block: &[u32]) -> Option<u32> {
        let key = hash_block(u64::from(parent), first_block);
        let same = |&(k, id): &(u64, u32)| {
            k == key && self.node(id).parent == parent && self.first_tokens(id) == first_block
        };
        self.children.find(key, same).map(|&(_, id)| id)
    }

    fn link_child(&mut self, id: u32) {
        let parent = self.node(id).parent;
        let key = hash_block(u64::from(parent), self.first_tokens(id));
        self.children.insert_unique(key, (key, id), |&(k, _)| k);
        if self.node(parent).is_root() {
            let first = hash_block(0, self.first_tokens(id));
            self.firsts.insert_unique(first, (first, id), |&(k, _)| k);
        }
    }

    fn unlink_child(&mut self, id: u32) {
        let (parent, first) = (self.node(id).parent, self.first_tokens(id));
        let (key, as_first) = (hash_block(u64::from(parent), first), hash_block(0, first));
        if let Ok(entry) = self.children.find_entry(key, |&(_, i)| i == id) {
            entry.remove();
        }
        if self.node(parent).is_root()
            && let Ok(entry) = self.firsts.find_entry(as_first, |&(_, i)| i == id)
        {
            entry.remove();
        }
    }

    /// Whether a prompt that starts with this block is known under any salt.
    pub fn is_first_of_any(&self, first_block: &[u32]) -> bool {
        let key = hash_block(0, first_block);
        self.firsts.find(key, |&(k, id)| k == key && self.first_tokens(id) == first_block).is_some()
    }

    /// Whole blocks at the start of the edge `pages` and of `tokens` that are equal.
    fn common_blocks(&self, pages: &[PageId], tokens: &[u32]) -> usize {
        let most = pages.len().min(tokens.len() / self.block);
        let mut done = 0;
        while done < most {
            let run = run_of(&pages[done..most]);
            let first = pages[done].0 as usize * self.block;
            let (mine, theirs) =
                (&self.tokens[first..][..run * self.block], &tokens[done * self.block..][..run * self.block]);
            // One memory compare for the usual case.
            if mine != theirs {
                let mut pairs = mine.chunks_exact(self.block).zip(theirs.chunks_exact(self.block));
                return done + pairs.position(|(a, b)| a != b).unwrap_or(run);
            }
            done += run;
        }
        done
    }

    /// Follows `tokens` from the end of `from` as far as whole blocks are known.
    pub fn walk(&self, from: u32, tokens: &[u32]) -> Walk {
        let (mut node, mut rest) = (from, tokens);
        let mut blocks = self.node(from).end();
        while rest.len() >= self.block {
            let Some(child) = self.find_child(node, &rest[..self.block]) else {
                break;
            };
            let n = self.node(child);
            let equal = self.common_blocks(&n.pages, rest);
            (node, blocks) = (child, blocks + equal as u32);
            if equal < n.pages.len() {
                break;
            }
            rest = &rest[equal * self.block..];
        }
        Walk { node, blocks, removed: self.removed }
    }

    /// The first `blocks` of an earlier walk from `root`, without a look at tokens. `None` when it did not come so far, or blocks have left
    /// the tree since; to add blocks, or to split edges, moves nothing on the path to a node.
    pub fn part_of(&self, walk: Walk, root: u32, blocks: u32) -> Option<Walk> {
        let holds = blocks > 0
            && blocks <= walk.blocks
            && walk.removed == self.removed
            && self.node(walk.node).root == root;
        holds.then(|| Walk { node: self.node_at(walk.node, blocks), blocks, ..walk })
    }

    /// Makes `blocks` (inside the edge of `id`) a node's end and returns that node; the caller looks after its place.
    pub fn split(&mut self, id: u32, blocks: u32) -> u32 {
        let keep = (blocks - self.node(id).start) as usize;
        if keep == self.node(id).pages.len() {
            return id;
        }
        debug_assert!(keep > 0, "a split keeps at least one block above");
        self.unlink_child(id);
        let n = &mut self.nodes[id as usize];
        let (parent, start, pins, holds) = (n.parent, n.start, n.pins, n.holds);
        let facts = Facts { lost_snapshot: false, ended: false, ..n.facts };
        let lower = n.pages.split_off(keep);
        let upper_pages = std::mem::replace(&mut n.pages, lower);
        let upper = self.place(parent, start, upper_pages, facts);
        let n = &mut self.nodes[id as usize];
        (n.parent, n.start) = (upper, blocks);
        let u = &mut self.nodes[upper as usize];
        (u.children, u.pins, u.holds) = (1, pins, holds);
        self.link_child(upper);
        self.link_child(id);
        upper
    }

    /// Appends blocks below `id`: to its own edge where only this cursor ends there (and `may_grow`), else as a new child
    /// with `facts`. Returns the node at the new end, pinned once like the cursor it replaces.
    pub fn append(&mut self, id: u32, tokens: &[u32], pages: &[PageId], facts: Facts, may_grow: bool) -> u32 {
        let mut done = 0;
        while done < pages.len() {
            let run = run_of(&pages[done..]);
            let (to, size) = (pages[done].0 as usize * self.block, run * self.block);
            self.tokens[to..to + size].copy_from_slice(&tokens[done * self.block..][..size]);
            done += run;
        }
        self.blocks += pages.len() as u32;
        let n = self.node_mut(id);
        if may_grow && !n.is_root() && n.children == 0 && n.pins == 1 && n.snapshot.is_none() {
            n.pages.extend_from_slice(pages);
            (n.facts.used, n.facts.lost_snapshot, n.turn) = (facts.used, false, None);
            return id;
        }
        n.children += 1;
        let start = n.end();
        let child = self.place(id, start, pages.to_vec(), facts);
        self.link_child(child);
        self.node_mut(child).pins = 1;
        child
    }

    /// Pins one node. True when it was free before.
    pub fn pin(&mut self, id: u32) -> bool {
        let n = self.node_mut(id);
        n.pins += 1;
        let first = n.pins == 1 && !n.is_root();
        if first {
            self.unpinned_blocks -= self.node(id).pages.len() as u32;
        }
        first
    }

    /// Takes one pin back. True when that was the last one.
    pub fn unpin(&mut self, id: u32) -> bool {
        let n = self.node_mut(id);
        debug_assert!(n.pins > 0, "node {id} is not pinned");
        n.pins -= 1;
        let last = n.pins == 0 && !n.is_root();
        if last {
            self.unpinned_blocks += self.node(id).pages.len() as u32;
        }
        last
    }

    /// The nodes from `id` to its root, the root included.
    pub fn path(&self, id: u32) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(Some(id), |&at| (self.node(at).parent != NIL).then(|| self.node(at).parent))
    }

    /// Removes the last `n` blocks of a free leaf into `out`, last block first. A node without blocks goes. True when it went.
    pub fn pop_blocks(&mut self, id: u32, n: u32, out: &mut Vec<PageId>) -> bool {
        let keep = self.node(id).pages.len() - n as usize;
        if keep == 0 {
            self.unlink_child(id);
        }
        let node = self.node_mut(id);
        debug_assert!(node.is_free_leaf() && node.snapshot.is_none());
        out.extend(node.pages.drain(keep..).rev());
        (node.facts.lost_snapshot, node.turn) = (false, None);
        let parent = node.parent;
        self.blocks -= n;
        self.unpinned_blocks -= n;
        self.removed += u64::from(n);
        if keep == 0 {
            self.node_mut(id).pages = Vec::new();
            self.node_mut(parent).children -= 1;
            self.vacant.push(id);
        }
        keep == 0
    }

    /// The node on the path to `id` whose end is at `blocks`, or the one whose edge has it inside.
    pub fn node_at(&self, mut id: u32, blocks: u32) -> u32 {
        while self.node(id).start >= blocks {
            id = self.node(id).parent;
        }
        id
    }

    /// Every node with blocks, by id.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        let live = |id: &u32| !self.node(*id).is_root() && !self.node(*id).pages.is_empty();
        (0..self.nodes.len() as u32).filter(live)
    }

    /// Structure, counters and lookups; `pins[id]` is how many cursors lie at or below a node.
    pub fn check(&self, pins: &[u32]) -> Result<(), Malformed> {
        let (mut blocks, mut unpinned, mut firsts) = (0, 0, 0);
        let mut children = vec![0; self.nodes.len()];
        for id in self.ids() {
            let n = self.node(id);
            blocks += n.pages.len() as u32;
            unpinned += if n.pins == 0 { n.pages.len() as u32 } else { 0 };
            children[n.parent as usize] += 1;
            firsts += usize::from(self.node(n.parent).is_root());
            Malformed::unless(n.start == self.node(n.parent).end(), "edge start", || format!("node {id}"))?;
            Malformed::unless(n.pins == pins[id as usize], "pins", || {
                format!("node {id}: {}, cursors {}", n.pins, pins[id as usize])
            })?;
            let found = self.find_child(n.parent, self.first_tokens(id));
            Malformed::unless(found == Some(id), "child lookup", || format!("node {id}, found {found:?}"))?;
        }
        for id in self.ids() {
            let (is, should) = (self.node(id).children, children[id as usize]);
            Malformed::unless(is == should, "children", || format!("node {id}: {is}, counted {should}"))?;
        }
        let linked = (self.children.len(), self.firsts.len());
        let nodes = self.ids().count();
        Malformed::unless(linked == (nodes, firsts), "child tables", || {
            format!("{linked:?} entries, {nodes} nodes, {firsts} below roots")
        })?;
        let sums = (blocks, unpinned) == (self.blocks, self.unpinned_blocks);
        Malformed::unless(sums, "block counters", || {
            format!("counted {blocks} / {unpinned}, kept {} / {}", self.blocks, self.unpinned_blocks)
        })
    }
}

//! The radix tree over token blocks: which pages hold the history of which prefix.
//!
//! ```text
//!   root(salt) ── [ b0 b1 b2 ] ──┬── [ b3 b4 ] *        edge = run of blocks, tokens contiguous
//!                                └── [ b3' ] ── [ … ] * node end = optional snapshot (*)
//! ```
//!
//! - An edge's tokens lie in one vector, so matching a long prefix is a memory compare.
//! - A child is found by a hash of its first block and then compared token by token; equal hashes never make equal prefixes.
//! - **Pins.** Each running request pins every node from its cursor to the root; its cursor is always a node's end.
//! - **Recency.** Unpinned nodes form one list, least recently used first. A path is put to its end leaf before parent,
//!   so a child always lies nearer to the head than its parent and the head is a leaf: the victim is found in O(1).
//! - **Split** gives the new node the upper part; the lower one keeps its id, its children and the cursors at its end.

use hashbrown::HashTable;

use crate::error::Malformed;
use crate::ids::{PageId, SnapshotId};

/// "No node": end of lists, parent of roots.
pub(crate) const NIL: u32 = u32::MAX;

/// An edge and the node at its end.
#[derive(Debug)]
pub(crate) struct Node {
    pub parent: u32,
    /// Blocks before this edge.
    pub start: u32,
    pub tokens: Vec<u32>,
    pub pages: Vec<PageId>,
    /// Running hash of the prefix up to and with each block.
    pub chains: Vec<u64>,
    pub children: u32,
    pub pins: u32,
    pub used: u64,
    pub snapshot: Option<SnapshotId>,
    /// A snapshot at this end was evicted.
    pub lost_snapshot: bool,
    prev: u32,
    next: u32,
}

impl Node {
    /// Blocks up to and with this edge.
    pub fn end(&self) -> u32 {
        self.start + self.pages.len() as u32
    }

    fn is_root(&self) -> bool {
        self.parent == NIL
    }
}

/// How far a prefix is known.
pub(crate) struct Walk {
    /// The last node with a matched block (or the root).
    pub node: u32,
    /// Blocks matched in all; inside `node`'s edge or at its end.
    pub blocks: u32,
}

/// The tree. Roots are nodes without blocks; the caller keeps one per salt.
#[derive(Debug)]
pub(crate) struct Tree {
    block: usize,
    nodes: Vec<Node>,
    vacant: Vec<u32>,
    children: HashTable<(u64, u32)>,
    head: u32,
    tail: u32,
    blocks: u32,
    unpinned_blocks: u32,
}

/// A fast hash of a block, continuing from `seed`. Quality matters little: equality is decided by comparing tokens.
pub(crate) fn hash_block(seed: u64, tokens: &[u32]) -> u64 {
    const K: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut lanes = [seed ^ K, seed.rotate_left(17) ^ 0xbf58_476d_1ce4_e5b9];
    for pair in tokens.chunks(4) {
        for (lane, half) in lanes.iter_mut().zip(pair.chunks(2)) {
            let word = half.iter().fold(1u64, |w, &t| (w << 32) ^ u64::from(t));
            *lane = (*lane ^ word).wrapping_mul(K).rotate_left(29);
        }
    }
    let mixed = lanes[0] ^ lanes[1].rotate_left(32);
    (mixed ^ (mixed >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb) ^ (mixed >> 29)
}

/// Whole blocks at the start of `a` and `b` that are equal.
fn common_blocks(a: &[u32], b: &[u32], block: usize) -> u32 {
    let len = a.len().min(b.len()) / block * block;
    if a[..len] == b[..len] {
        return (len / block) as u32; // one memory compare for the usual case
    }
    let equal = a.chunks_exact(block).zip(b.chunks_exact(block)).take_while(|(x, y)| x == y);
    equal.count() as u32
}

impl Tree {
    pub fn new(block_tokens: u32) -> Self {
        Tree {
            block: block_tokens as usize,
            nodes: Vec::new(),
            vacant: Vec::new(),
            children: HashTable::new(),
            head: NIL,
            tail: NIL,
            blocks: 0,
            unpinned_blocks: 0,
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

    /// Bytes of bookkeeping, tokens and page ids left out.
    pub fn metadata_bytes(&self) -> usize {
        let per_block: usize =
            self.nodes.iter().map(|n| n.chains.capacity() * 8 + n.pages.capacity() * 4).sum();
        self.nodes.capacity() * size_of::<Node>() + self.children.capacity() * 17 + per_block
    }

    /// A node without blocks that is never evicted.
    pub fn new_root(&mut self, seed: u64) -> u32 {
        self.place(NIL, 0, Vec::new(), Vec::new(), vec![seed])
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

    fn place(
        &mut self,
        parent: u32,
        start: u32,
        tokens: Vec<u32>,
        pages: Vec<PageId>,
        chains: Vec<u64>,
    ) -> u32 {
        let node = Node {
            parent,
            start,
            tokens,
            pages,
            chains,
            children: 0,
            pins: 0,
            used: 0,
            snapshot: None,
            lost_snapshot: false,
            prev: NIL,
            next: NIL,
        };
        if let Some(id) = self.vacant.pop() {
            self.nodes[id as usize] = node;
            id
        } else {
            self.nodes.push(node);
            self.nodes.len() as u32 - 1
        }
    }

    /// The hash of the prefix that ends at the end of `id` (the root's is its salt's seed).
    pub fn chain_at_end(&self, id: u32) -> u64 {
        *self.node(id).chains.last().expect("a node has blocks, a root its seed")
    }

    fn child_key(parent: u32, first_block: &[u32]) -> u64 {
        hash_block(u64::from(parent), first_block)
    }

    fn find_child(&self, parent: u32, first_block: &[u32]) -> Option<u32> {
        let (key, nodes, block) = (Self::child_key(parent, first_block), &self.nodes, self.block);
        let same = |&(k, id): &(u64, u32)| {
            let n = &nodes[id as usize];
            k == key && n.parent == parent && n.tokens[..block] == *first_block
        };
        self.children.find(key, same).map(|&(_, id)| id)
    }

    fn link_child(&mut self, id: u32) {
        let n = &self.nodes[id as usize];
        let key = Self::child_key(n.parent, &n.tokens[..self.block]);
        self.children.insert_unique(key, (key, id), |&(k, _)| k);
    }

    fn unlink_child(&mut self, id: u32) {
        let n = &self.nodes[id as usize];
        let key = Self::child_key(n.parent, &n.tokens[..self.block]);
        if let Ok(entry) = self.children.find_entry(key, |&(_, i)| i == id) {
            entry.remove();
        }
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
            let equal = common_blocks(&n.tokens, rest, self.block);
            (node, blocks) = (child, blocks + equal);
            if (equal as usize) < n.pages.len() {
                break;
            }
            rest = &rest[n.tokens.len()..];
        }
        Walk { node, blocks }
    }

    /// Makes `blocks` (inside the edge of `id`) a node's end and returns that node.
    pub fn split(&mut self, id: u32, blocks: u32) -> u32 {
        let keep = (blocks - self.node(id).start) as usize;
        if keep == self.node(id).pages.len() {
            return id;
        }
        debug_assert!(keep > 0, "a split keeps at least one block above");
        self.unlink_child(id);
        let at = keep * self.block;
        let n = &mut self.nodes[id as usize];
        let (parent, start, pins, used) = (n.parent, n.start, n.pins, n.used);
        let (tokens, pages, chains) =
            (n.tokens.split_off(at), n.pages.split_off(keep), n.chains.split_off(keep));
        let above = (
            std::mem::replace(&mut n.tokens, tokens),
            std::mem::replace(&mut n.pages, pages),
            std::mem::replace(&mut n.chains, chains),
        );
        let upper = self.place(parent, start, above.0, above.1, above.2);
        let n = &mut self.nodes[id as usize];
        (n.parent, n.start) = (upper, blocks);
        let u = &mut self.nodes[upper as usize];
        (u.children, u.pins, u.used) = (1, pins, used);
        self.link_child(upper);
        self.link_child(id);
        if pins == 0 {
            self.insert_after(upper, id);
        }
        upper
    }

    /// Appends blocks below `id`: to its own edge where only this cursor ends there, else as a new child. Returns the node
    /// at the new end, pinned once like the cursor it replaces.
    pub fn append(&mut self, id: u32, tokens: &[u32], pages: &[PageId], now: u64) -> u32 {
        let mut chain = self.chain_at_end(id);
        let chains = tokens.chunks_exact(self.block).map(|b| {
            chain = hash_block(chain, b);
            chain
        });
        self.blocks += pages.len() as u32;
        let n = self.node(id);
        if !n.is_root() && n.children == 0 && n.pins == 1 && n.snapshot.is_none() {
            let chains: Vec<u64> = chains.collect();
            let n = self.node_mut(id);
            n.tokens.extend_from_slice(tokens);
            n.pages.extend_from_slice(pages);
            n.chains.extend(chains);
            (n.used, n.lost_snapshot) = (now, false);
            return id;
        }
        let (start, chains) = (n.end(), chains.collect());
        let child = self.place(id, start, tokens.to_vec(), pages.to_vec(), chains);
        self.link_child(child);
        self.node_mut(id).children += 1;
        let c = self.node_mut(child);
        (c.pins, c.used) = (1, now);
        child
    }

    /// Pins one node below an already pinned cursor, as the cursor moves down to it.
    pub fn pin_one(&mut self, id: u32, now: u64) {
        let n = self.node_mut(id);
        n.used = now;
        n.pins += 1;
        if n.pins == 1 && !n.is_root() {
            self.unpinned_blocks -= self.node(id).pages.len() as u32;
            self.unlist(id);
        }
    }

    /// Pins every node from `id` to the root.
    pub fn pin_path(&mut self, mut id: u32, now: u64) {
        while id != NIL {
            self.pin_one(id, now);
            id = self.node(id).parent;
        }
    }

    /// Takes a cursor's pins back; nodes that nobody pins become the most recently used, leaf before parent.
    pub fn unpin_path(&mut self, mut id: u32, now: u64) {
        while id != NIL {
            let n = self.node_mut(id);
            debug_assert!(n.pins > 0, "node {id} is not pinned");
            n.pins -= 1;
            n.used = now;
            let (parent, free) = (n.parent, n.pins == 0 && !n.is_root());
            if free {
                self.unpinned_blocks += self.node(id).pages.len() as u32;
                self.insert_last(id);
            }
            id = parent;
        }
    }

    /// The least recently used unpinned node; it has no children.
    pub fn victim(&self) -> Option<u32> {
        (self.head != NIL).then_some(self.head)
    }

    /// Removes the last block of an unpinned leaf; returns its page and chain hash. A node without blocks goes.
    pub fn pop_block(&mut self, id: u32) -> (PageId, u64) {
        let block = self.block;
        if self.node(id).pages.len() == 1 {
            self.unlink_child(id);
        }
        let n = self.node_mut(id);
        debug_assert!(n.pins == 0 && n.children == 0 && n.snapshot.is_none());
        let page = n.pages.pop().expect("a node has blocks");
        let chain = n.chains.pop().expect("one chain per block");
        n.tokens.truncate(n.pages.len() * block);
        n.lost_snapshot = false;
        let (empty, parent) = (n.pages.is_empty(), n.parent);
        self.blocks -= 1;
        self.unpinned_blocks -= 1;
        if empty {
            self.unlist(id);
            self.node_mut(parent).children -= 1;
            self.vacant.push(id);
        }
        (page, chain)
    }

    /// The node on the path to `id` whose end is at `blocks`, splitting an edge where needed.
    pub fn node_ending_at(&mut self, mut id: u32, blocks: u32) -> u32 {
        while self.node(id).start >= blocks {
            id = self.node(id).parent;
        }
        self.split(id, blocks)
    }

    fn unlist(&mut self, id: u32) {
        let (prev, next) = (self.node(id).prev, self.node(id).next);
        match prev {
            NIL => self.head = next,
            p => self.node_mut(p).next = next,
        }
        match next {
            NIL => self.tail = prev,
            n => self.node_mut(n).prev = prev,
        }
        let n = self.node_mut(id);
        (n.prev, n.next) = (NIL, NIL);
    }

    fn insert_last(&mut self, id: u32) {
        let tail = self.tail;
        let n = self.node_mut(id);
        (n.prev, n.next) = (tail, NIL);
        match tail {
            NIL => self.head = id,
            t => self.node_mut(t).next = id,
        }
        self.tail = id;
    }

    fn insert_after(&mut self, id: u32, before: u32) {
        let next = self.node(before).next;
        if next == NIL {
            return self.insert_last(id);
        }
        let n = self.node_mut(id);
        (n.prev, n.next) = (before, next);
        self.node_mut(before).next = id;
        self.node_mut(next).prev = id;
    }

    /// Every node with blocks, by id.
    pub fn ids(&self) -> impl Iterator<Item = u32> + '_ {
        let dead: std::collections::HashSet<u32> = self.vacant.iter().copied().collect();
        (0..self.nodes.len() as u32).filter(move |id| !dead.contains(id) && !self.node(*id).is_root())
    }

    /// Structure, counters, list order and lookups; `pins[id]` is how many cursors lie at or below a node.
    pub fn check(&self, pins: &[u32]) -> Result<(), Malformed> {
        let (mut blocks, mut unpinned, mut listed) = (0, 0, 0);
        let mut children = vec![0; self.nodes.len()];
        for id in self.ids() {
            let n = self.node(id);
            blocks += n.pages.len() as u32;
            unpinned += if n.pins == 0 { n.pages.len() as u32 } else { 0 };
            listed += u32::from(n.pins == 0);
            children[n.parent as usize] += 1;
            let sizes = (n.tokens.len(), n.chains.len()) == (n.pages.len() * self.block, n.pages.len());
            Malformed::unless(sizes && !n.pages.is_empty(), "edge sizes", || format!("node {id}"))?;
            Malformed::unless(n.start == self.node(n.parent).end(), "edge start", || format!("node {id}"))?;
            Malformed::unless(n.pins == pins[id as usize], "pins", || {
                format!("node {id}: {}, cursors {}", n.pins, pins[id as usize])
            })?;
            let found = self.find_child(n.parent, &n.tokens[..self.block]);
            Malformed::unless(found == Some(id), "child lookup", || format!("node {id}, found {found:?}"))?;
            let chain = n
                .tokens
                .chunks(self.block)
                .zip(&n.chains)
                .try_fold(self.chain_before(id), |before, (tokens, &c)| {
                    (hash_block(before, tokens) == c).then_some(c)
                });
            Malformed::unless(chain.is_some(), "chain hashes", || format!("node {id}"))?;
        }
        for id in self.ids() {
            let (is, should) = (self.node(id).children, children[id as usize]);
            Malformed::unless(is == should, "children", || format!("node {id}: {is}, counted {should}"))?;
        }
        let sums = (blocks, unpinned) == (self.blocks, self.unpinned_blocks);
        Malformed::unless(sums, "block counters", || {
            format!("counted {blocks} / {unpinned}, kept {} / {}", self.blocks, self.unpinned_blocks)
        })?;
        self.check_list(listed)
    }

    fn chain_before(&self, id: u32) -> u64 {
        self.chain_at_end(self.node(id).parent)
    }

    /// The list holds every unpinned node once, children before parents.
    fn check_list(&self, listed: u32) -> Result<(), Malformed> {
        let mut place = vec![u32::MAX; self.nodes.len()];
        let (mut at, mut count) = (self.head, 0);
        while at != NIL {
            place[at as usize] = count;
            count += 1;
            let n = self.node(at);
            Malformed::unless(n.pins == 0 && count <= listed, "recency list", || format!("node {at}"))?;
            at = n.next;
        }
        Malformed::unless(count == listed, "recency list", || format!("{count} listed, {listed} unpinned"))?;
        for id in self.ids().filter(|&id| self.node(id).pins == 0) {
            let parent = self.node(id).parent;
            let ordered = self.node(parent).is_root()
                || self.node(parent).pins > 0
                || place[id as usize] < place[parent as usize];
            Malformed::unless(ordered, "recency order", || {
                format!("node {id} lies after its parent {parent}")
            })?;
        }
        Ok(())
    }
}

//! What is kept because someone said so: pins, sessions, and the time that hints are measured against.

use super::{KvCache, Sequence};
use crate::ids::PinId;
use crate::retention::{Hint, Session};
use crate::tree::NIL;

impl KvCache {
    /// The time now, in microseconds. Going backwards is ignored.
    pub fn set_time(&mut self, now_us: u64) {
        self.now_us = self.now_us.max(now_us);
    }

    /// Pages that would be kept by a pin of the known blocks of `tokens`, besides those that are pinned already.
    pub fn pages_to_pin(&self, salt: &[u8], tokens: &[u32]) -> u32 {
        let Some(&root) = self.roots.get(salt) else { return 0 };
        let walk = self.tree.walk(root, tokens);
        let mut pages = 0;
        for n in
            self.tree.path(walk.node).map(|id| self.tree.node(id)).filter(|n| n.holds == 0 && !n.is_root())
        {
            pages += n.end().min(walk.blocks) - n.start;
            pages += if n.snapshot.is_some() && n.end() <= walk.blocks { self.snapshot_pages } else { 0 };
        }
        pages
    }

    /// Pages kept by pins.
    pub fn pinned_pages(&self) -> u32 {
        self.pinned_blocks + self.held_snapshots * self.snapshot_pages
    }

    /// Keeps the known whole blocks of `tokens`, and the saved states on them, until [`KvCache::unpin`]. Returns the pin and
    /// the tokens that it keeps.
    pub fn pin(&mut self, salt: &[u8], tokens: &[u32]) -> (PinId, u32) {
        self.now += 1;
        let root = self.root(salt);
        let walk = self.tree.walk(root, tokens);
        let cursor = self.tree.split(walk.node, walk.blocks);
        let path: Vec<u32> = self.tree.path(cursor).collect();
        for id in path {
            self.pin_node(id);
            self.hold(id);
        }
        self.last_pin += 1;
        let pin = PinId(self.last_pin);
        let (published, hint) = (walk.blocks, Hint::default());
        let pages = Vec::new();
        self.pins.insert(
            pin,
            Sequence { root, cursor, published, pages, hint, grown: false, again: 0, edge: (NIL, 0) },
        );
        (pin, walk.blocks * self.block)
    }

    pub(super) fn hold(&mut self, id: u32) {
        let n = self.tree.node_mut(id);
        n.holds += 1;
        if n.holds == 1 && n.parent != NIL {
            self.pinned_blocks += n.pages.len() as u32;
            if let Some(snapshot) = n.snapshot {
                self.held_snapshots += 1;
                self.unlist_snapshot(snapshot);
            }
        }
    }

    fn let_loose(&mut self, id: u32) {
        let n = self.tree.node_mut(id);
        n.holds -= 1;
        if n.holds == 0 && n.parent != NIL {
            self.pinned_blocks -= n.pages.len() as u32;
            if let Some(snapshot) = n.snapshot {
                self.held_snapshots -= 1;
                self.list_snapshot(snapshot);
            }
        }
    }

    /// Ends a pin. False when there is none of that name.
    pub fn unpin(&mut self, pin: PinId) -> bool {
        let Some(seq) = self.pins.remove(&pin) else { return false };
        let path: Vec<u32> = self.tree.path(seq.cursor).collect();
        path.into_iter().for_each(|id| self.let_loose(id));
        self.unpin_path(seq.cursor, None);
        self.drop_idle_root(seq.root);
        true
    }

    pub(super) fn session(&mut self, key: u64) -> &mut Session {
        let (tree, snapshots) = (&self.tree, &self.snapshots);
        self.sessions.entry(key, |s| {
            s.tail.is_some_and(|(id, born)| is_node(tree, id, born))
                || s.snapshot.is_some_and(|(id, born)| snapshots.is(id, born))
        })
    }

    /// A sequence ends: its path is the newest of its session, and what only the one before had is first to go.
    pub(super) fn move_session(&mut self, seq: &Sequence) {
        let Some(key) = seq.hint.retention.session.filter(|_| seq.published > 0) else { return };
        let born = self.tree.node(seq.cursor).facts.born;
        let before = self.session(key).tail.replace((seq.cursor, born));
        if let Some((old, born)) = before
            && old != seq.cursor
            && is_node(&self.tree, old, born)
            && self.tree.node(old).is_free_leaf()
        {
            self.end_blocks(old);
        }
    }

    fn end_blocks(&mut self, id: u32) {
        if self.tree.node(id).facts.uses == 0 {
            self.unlist_blocks(id);
            self.tree.node_mut(id).facts.ended = true;
            self.list_blocks(id);
            if let Some(snapshot) = self.tree.node(id).snapshot {
                self.supersede(snapshot);
            }
        }
    }

    /// A session is over: what only it used goes first when memory is short. False when nothing of it is cached.
    pub fn end_session(&mut self, key: u64) -> bool {
        let Some(session) = self.sessions.remove(key) else { return false };
        let Some((mut at, born)) = session.tail else { return false };
        if !is_node(&self.tree, at, born) {
            return false;
        }
        loop {
            let n = self.tree.node(at);
            if n.is_root() || n.children > 1 || n.facts.uses > 0 {
                return true;
            }
            self.end_blocks(at);
            at = self.tree.node(at).parent;
        }
    }
}

fn is_node(tree: &crate::tree::Tree, id: u32, born: u64) -> bool {
    let n = tree.node(id);
    !n.pages.is_empty() && n.facts.born == born
}

//! What is kept because someone said so: pins, sessions, and the time that hints are measured against.

use super::{KvCache, Sequence};
use crate::cache::retention::Session;
use crate::ids::{PinId, SnapshotId};

/// A prefix that is kept: the node at its end, and the states on it.
#[derive(Debug)]
pub(super) struct Pin {
    pub cursor: u32,
    pub states: Vec<SnapshotId>,
}

impl KvCache {
    /// The time now, in microseconds. Going backwards is ignored.
    pub fn set_time(&mut self, now_us: u64) {
        self.now_us = self.now_us.max(now_us);
    }

    /// The time, in microseconds.
    pub fn time(&self) -> u64 {
        self.now_us
    }

    /// Pins that stand, oldest first.
    pub fn pins(&self) -> impl Iterator<Item = PinId> + '_ {
        self.pins.keys().copied()
    }

    /// Pages kept by pins.
    pub fn pinned_pages(&self) -> u32 {
        self.pinned_blocks + self.held_snapshots * self.snapshot_pages
    }

    /// Keeps the known whole blocks of `tokens`, and the states that are saved on them now, until [`KvCache::unpin`].
    /// Returns the pin and the tokens that it keeps.
    pub fn pin(&mut self, salt: &[u8], tokens: &[u32]) -> (PinId, u32) {
        self.now += 1;
        let root = self.root(salt);
        let walk = self.tree.walk(root, tokens);
        let cursor = self.tree.split(walk.node, walk.blocks);
        let states = self.tree.path(cursor).filter_map(|id| self.tree.node(id).snapshot).collect();
        self.last_pin += 1;
        self.hold(PinId(self.last_pin), Pin { cursor, states });
        (PinId(self.last_pin), walk.blocks * self.block)
    }

    pub(super) fn hold(&mut self, name: PinId, pin: Pin) {
        let path: Vec<u32> = self.tree.path(pin.cursor).collect();
        for id in path {
            self.pin_node(id);
            let n = self.tree.node_mut(id);
            n.holds += 1;
            self.pinned_blocks += if n.holds == 1 { n.pages.len() as u32 } else { 0 };
        }
        for &id in &pin.states {
            self.unlist_snapshot(id);
            let e = self.snapshots.get_mut(id);
            e.holds += 1;
            self.held_snapshots += u32::from(e.holds == 1);
        }
        self.pins.insert(name, pin);
    }

    /// Ends a pin. False when there is none of that name.
    pub fn unpin(&mut self, pin: PinId) -> bool {
        let Some(pin) = self.pins.remove(&pin) else { return false };
        let path: Vec<u32> = self.tree.path(pin.cursor).collect();
        for id in path {
            let n = self.tree.node_mut(id);
            n.holds -= 1;
            self.pinned_blocks -= if n.holds == 0 { n.pages.len() as u32 } else { 0 };
        }
        for id in pin.states {
            let e = self.snapshots.get_mut(id);
            e.holds -= 1;
            self.held_snapshots -= u32::from(e.holds == 0);
            self.list_snapshot(id);
        }
        let root = self.tree.node(pin.cursor).root;
        self.unpin_path(pin.cursor, None);
        self.drop_idle_root(root);
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
            && self.is_node(old, born)
            && self.tree.node(old).is_free_leaf()
        {
            self.end_blocks(old);
        }
    }

    pub(super) fn is_node(&self, id: u32, born: u64) -> bool {
        is_node(&self.tree, id, born)
    }

    pub(super) fn end_blocks(&mut self, id: u32) {
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
        if !self.is_node(at, born) {
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

fn is_node(tree: &crate::cache::tree::Tree, id: u32, born: u64) -> bool {
    let n = tree.node(id);
    !n.pages.is_empty() && n.facts.born == born
}

//! Saved states: which pages hold them, which node they belong to, and which goes first.

use crate::error::Malformed;
use crate::ids::{PageId, SnapshotId};

const NIL: u32 = u32::MAX;

/// Pages that hold, or will hold, one saved state. They belong to whoever has this value; give it back to the cache.
#[derive(Debug, PartialEq, Eq)]
pub struct SnapshotPages(pub(crate) Vec<PageId>);

impl SnapshotPages {
    /// The pages in the order in which the snapshot's bytes lie in them.
    pub fn pages(&self) -> &[PageId] {
        &self.0
    }
}

#[derive(Debug)]
struct Entry {
    node: u32,
    pages: SnapshotPages,
    used: u64,
    prev: u32,
    next: u32,
}

/// All snapshots of the tree in one list, least recently used first.
#[derive(Debug)]
pub(crate) struct Snapshots {
    entries: Vec<Option<Entry>>,
    vacant: Vec<u32>,
    head: u32,
    tail: u32,
    count: u32,
}

impl Snapshots {
    pub fn new() -> Self {
        Snapshots { entries: Vec::new(), vacant: Vec::new(), head: NIL, tail: NIL, count: 0 }
    }

    fn entry(&self, id: u32) -> &Entry {
        self.entries[id as usize].as_ref().expect("the snapshot lives")
    }

    fn entry_mut(&mut self, id: u32) -> &mut Entry {
        self.entries[id as usize].as_mut().expect("the snapshot lives")
    }

    /// Snapshots that live.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Adds the state at the end of `node` as the most recently used one.
    pub fn insert(&mut self, node: u32, pages: SnapshotPages, now: u64) -> SnapshotId {
        let entry = Some(Entry { node, pages, used: now, prev: NIL, next: NIL });
        let id = self.vacant.pop().unwrap_or_else(|| {
            self.entries.push(None);
            self.entries.len() as u32 - 1
        });
        self.entries[id as usize] = entry;
        self.count += 1;
        self.insert_last(id);
        SnapshotId(id)
    }

    /// Takes a snapshot out: its node and its pages.
    pub fn remove(&mut self, id: SnapshotId) -> (u32, SnapshotPages) {
        self.unlist(id.0);
        let entry = self.entries[id.0 as usize].take().expect("the snapshot lives");
        self.vacant.push(id.0);
        self.count -= 1;
        (entry.node, entry.pages)
    }

    pub fn pages(&self, id: SnapshotId) -> &[PageId] {
        &self.entry(id.0).pages.0
    }

    /// Makes it the most recently used one.
    pub fn touch(&mut self, id: SnapshotId, now: u64) {
        self.unlist(id.0);
        self.entry_mut(id.0).used = now;
        self.insert_last(id.0);
    }

    /// The least recently used one and when that was.
    pub fn oldest(&self) -> Option<(SnapshotId, u64)> {
        (self.head != NIL).then(|| (SnapshotId(self.head), self.entry(self.head).used))
    }

    /// Every snapshot with its node.
    pub fn iter(&self) -> impl Iterator<Item = (SnapshotId, u32, &[PageId])> {
        let live = self.entries.iter().enumerate();
        live.filter_map(|(i, e)| e.as_ref().map(|e| (SnapshotId(i as u32), e.node, e.pages.0.as_slice())))
    }

    fn unlist(&mut self, id: u32) {
        let (prev, next) = (self.entry(id).prev, self.entry(id).next);
        match prev {
            NIL => self.head = next,
            p => self.entry_mut(p).next = next,
        }
        match next {
            NIL => self.tail = prev,
            n => self.entry_mut(n).prev = prev,
        }
    }

    fn insert_last(&mut self, id: u32) {
        let tail = self.tail;
        let e = self.entry_mut(id);
        (e.prev, e.next) = (tail, NIL);
        match tail {
            NIL => self.head = id,
            t => self.entry_mut(t).next = id,
        }
        self.tail = id;
    }

    /// The list holds every snapshot once, in order of use.
    pub fn check(&self) -> Result<(), Malformed> {
        let (mut at, mut seen, mut last) = (self.head, 0, 0);
        while at != NIL && seen <= self.count {
            let e = self.entry(at);
            Malformed::unless(e.used >= last, "snapshot recency", || format!("snapshot {at}"))?;
            (seen, last, at) = (seen + 1, e.used, e.next);
        }
        let live = self.iter().count() as u32;
        Malformed::unless(seen == live && live == self.count, "snapshot list", || {
            format!("{seen} listed, {live} alive, count {}", self.count)
        })
    }
}

//! Saved states: which pages hold them, which node they belong to, and what decides how long they stay.

use crate::cache::eviction::Past;
use crate::cache::turns::End;
use crate::cache::worth::List;
use crate::error::Malformed;
use crate::ids::{PageId, SnapshotId};

/// Pages that hold, or will hold, one saved state. They belong to whoever has this value; give it back to the cache.
#[derive(Debug, PartialEq, Eq)]
pub struct SnapshotPages(pub(crate) Vec<PageId>);

impl SnapshotPages {
    /// The pages in the order in which the snapshot's bytes lie in them.
    pub fn pages(&self) -> &[PageId] {
        &self.0
    }
}

/// A saved state in the tree.
#[derive(Debug)]
pub(crate) struct Entry {
    pub node: u32,
    pub pages: SnapshotPages,
    pub born: u64,
    pub used: u64,
    pub expiry: u64,
    pub tenant: u32,
    pub uses: u8,
    pub level: i8,
    /// What it saves, see `Standing::octave`.
    pub octave: i8,
    /// Which end of a turn it is at.
    pub end: Option<End>,
    /// The likelihood that the prompt's end is what the next prompt goes on from.
    pub drops_output: f64,
    /// The state at the other end, and when that was stored.
    pub pair: Option<(SnapshotId, u64)>,
    /// A deeper state of the same path or session has replaced it: first to go.
    pub superseded: bool,
    /// Pins that keep it.
    pub holds: u32,
    pub listed: Option<List>,
}

impl Entry {
    /// How the state has been used.
    pub fn past(&self) -> Past {
        Past { snapshot: true, uses: self.uses, grown: false }
    }
}

/// All snapshots of the tree.
#[derive(Debug, Default)]
pub(crate) struct Snapshots {
    entries: Vec<Option<Entry>>,
    vacant: Vec<u32>,
    count: u32,
}

impl Snapshots {
    pub fn get(&self, id: SnapshotId) -> &Entry {
        self.entries[id.0 as usize].as_ref().expect("the snapshot lives")
    }

    pub fn get_mut(&mut self, id: SnapshotId) -> &mut Entry {
        self.entries[id.0 as usize].as_mut().expect("the snapshot lives")
    }

    /// Whether it lives and was stored at `born`.
    pub fn is(&self, id: SnapshotId, born: u64) -> bool {
        self.entries[id.0 as usize].as_ref().is_some_and(|e| e.born == born)
    }

    /// Snapshots that live.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Adds a state.
    pub fn insert(&mut self, entry: Entry) -> SnapshotId {
        self.count += 1;
        if let Some(id) = self.vacant.pop() {
            self.entries[id as usize] = Some(entry);
            return SnapshotId(id);
        }
        self.entries.push(Some(entry));
        SnapshotId(self.entries.len() as u32 - 1)
    }

    /// Takes a snapshot out.
    pub fn remove(&mut self, id: SnapshotId) -> Entry {
        let entry = self.entries[id.0 as usize].take().expect("the snapshot lives");
        self.vacant.push(id.0);
        self.count -= 1;
        entry
    }

    /// Every snapshot.
    pub fn iter(&self) -> impl Iterator<Item = (SnapshotId, &Entry)> {
        let live = self.entries.iter().enumerate();
        live.filter_map(|(i, e)| e.as_ref().map(|e| (SnapshotId(i as u32), e)))
    }

    /// Bytes of bookkeeping.
    pub fn bytes(&self) -> usize {
        self.entries.capacity() * size_of::<Option<Entry>>() + self.vacant.capacity() * 4
    }

    /// The count holds.
    pub fn check(&self) -> Result<(), Malformed> {
        let live = self.iter().count() as u32;
        Malformed::unless(live == self.count, "snapshot count", || {
            format!("{live} alive, count {}", self.count)
        })
    }
}

//! Every count of the cache, from scratch.

use std::collections::BTreeMap;

use super::{KvCache, Leaving, Sequence};
use crate::cache::eviction::Item;
use crate::cache::snapshot::SnapshotPages;
use crate::error::Malformed;
use crate::ids::PageId;

impl KvCache {
    /// Recomputes every count from scratch. `live` are the sequences and `held` the private snapshots outside the cache.
    pub fn check<'a>(
        &'a self,
        live: impl Iterator<Item = &'a Sequence>,
        held: impl Iterator<Item = &'a SnapshotPages>,
    ) -> Result<(), Malformed> {
        let (mut cursors, mut holders): (Vec<&Sequence>, Vec<PageId>) = (live.collect(), Vec::new());
        for l in self.leaving.iter() {
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
        self.check_pins(&mut pins)?;
        holders.extend(held.flat_map(|s| &s.0));
        holders.extend(self.tree.ids().flat_map(|id| &self.tree.node(id).pages));
        holders.extend(self.snapshots.iter().flat_map(|(_, e)| &e.pages.0));
        self.pool.check(holders.into_iter())?;
        self.tree.check(&pins)?;
        self.snapshots.check()?;
        for (id, e) in self.snapshots.iter() {
            let owner = self.tree.node(e.node).snapshot;
            Malformed::unless(owner == Some(id), "snapshot owner", || {
                format!("{id:?} at node {}, which has {owner:?}", e.node)
            })?;
        }
        let owned = self.tree.ids().filter(|&id| self.tree.node(id).snapshot.is_some()).count() as u32;
        Malformed::unless(owned == self.snapshots.count(), "snapshots", || {
            format!("{owned} nodes have one, {} exist", self.snapshots.count())
        })?;
        self.check_order()?;
        self.check_quotas()
    }

    /// A sequence's cursor ends where its published part ends, and its table names the tree's pages up to there.
    fn check_path(&self, seq: &Sequence, pins: &mut [u32]) -> Result<(), Malformed> {
        let end = self.tree.node(seq.cursor).end();
        Malformed::unless(end == seq.published, "cursor", || {
            format!("ends at {end}, published {}", seq.published)
        })?;
        for at in self.tree.path(seq.cursor).filter(|&at| at != seq.root) {
            let n = self.tree.node(at);
            pins[at as usize] += 1;
            let table = &seq.pages[n.start as usize..n.end() as usize];
            Malformed::unless(table == n.pages, "page table", || {
                format!("node {at}: {table:?}, tree {:?}", n.pages)
            })?;
        }
        Ok(())
    }

    /// Named pins: what they hold, in blocks and snapshots.
    fn check_pins(&self, pins: &mut [u32]) -> Result<(), Malformed> {
        let (mut holds, mut kept) = (vec![0; self.tree.capacity()], BTreeMap::new());
        for pin in self.pins.values() {
            for at in self.tree.path(pin.cursor).filter(|&at| !self.tree.node(at).is_root()) {
                pins[at as usize] += 1;
                holds[at as usize] += 1;
            }
            pin.states.iter().for_each(|id| *kept.entry(id.0).or_insert(0) += 1);
        }
        let mut blocks = 0;
        for id in self.tree.ids() {
            let n = self.tree.node(id);
            Malformed::unless(n.holds == holds[id as usize], "named pins", || format!("node {id}"))?;
            blocks += if n.holds > 0 { n.pages.len() as u32 } else { 0 };
        }
        for (id, e) in self.snapshots.iter() {
            let should = kept.get(&id.0).copied().unwrap_or(0);
            Malformed::unless(e.holds == should, "pins of states", || {
                format!("{id:?}: {}, {should}", e.holds)
            })?;
        }
        let snapshots = kept.len() as u32;
        Malformed::unless(
            (blocks, snapshots) == (self.pinned_blocks, self.held_snapshots),
            "pinned pages",
            || {
                format!(
                    "counted {blocks} and {snapshots}, kept {} and {}",
                    self.pinned_blocks, self.held_snapshots
                )
            },
        )
    }

    /// Every leaf that nobody uses and every snapshot that is not pinned is listed once, where it says.
    fn check_order(&self) -> Result<(), Malformed> {
        let mut listed = Vec::new();
        for id in self.tree.ids() {
            let n = self.tree.node(id);
            Malformed::unless(n.is_free_leaf() == n.listed.is_some(), "listed leaves", || {
                format!("node {id}")
            })?;
            listed.extend(n.listed.map(|list| (Item::Blocks(id), list)));
        }
        for (id, e) in self.snapshots.iter() {
            let loose = e.holds == 0;
            Malformed::unless(loose == e.listed.is_some(), "listed snapshots", || format!("{id:?}"))?;
            listed.extend(e.listed.map(|list| (Item::Snapshot(id.0), list)));
        }
        Malformed::unless(listed.len() == self.worth.len(), "order", || {
            format!("{} can go, {} are listed", listed.len(), self.worth.len())
        })?;
        let known = listed.into_iter().map(|(item, list)| (item, list, self.standing_of(item)));
        self.worth.check(known, self.now)
    }

    fn check_quotas(&self) -> Result<(), Malformed> {
        let mut held: BTreeMap<u32, u32> = self.quotas.held().map(|(t, _)| (t, 0)).collect();
        let blocks = self.tree.ids().map(|id| self.tree.node(id));
        let blocks = blocks.map(|n| (n.facts.tenant, n.pages.len() as u32));
        let states = self.snapshots.iter().map(|(_, e)| (e.tenant, self.snapshot_pages));
        for (tenant, pages) in blocks.chain(states) {
            held.entry(tenant).and_modify(|h| *h += pages);
        }
        let kept: BTreeMap<u32, u32> = self.quotas.held().collect();
        Malformed::unless(held == kept, "quotas", || format!("counted {held:?}, kept {kept:?}"))
    }
}

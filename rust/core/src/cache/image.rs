//! The cache as data: what a dump holds of it. Page ids are not part of it: a loaded cache lays its blocks out anew.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::KvCache;
use super::keep::Pin;
use super::turns::{End, Habit, Habits, Turn};
use crate::cache::snapshot::{Entry, SnapshotPages};
use crate::cache::tree::Facts;
use crate::error::CoreError;
use crate::ids::{PinId, SnapshotId};

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Above {
    Salt(usize),
    Node(usize),
}

/// See [`Turn`]; `output` is its node's place.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct TurnImage {
    end: End,
    habit: Habit,
    seen: bool,
    output: Option<usize>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct NodeImage {
    above: Above,
    tokens: Vec<u32>,
    facts: Facts,
    snapshot: Option<SnapshotImage>,
    turn: Option<TurnImage>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct SnapshotImage {
    born: u64,
    used: u64,
    expiry: u64,
    tenant: u32,
    uses: u8,
    level: i8,
    octave: i8,
    end: Option<End>,
    drops_output: f64,
    /// The node of the state at the turn's other end.
    pair: Option<usize>,
    superseded: bool,
}

/// Prefixes with their tokens, snapshots, hints and what was learned of reuse.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CacheImage {
    now: u64,
    now_us: u64,
    salts: Vec<Vec<u8>>,
    /// Predecessors first.
    nodes: Vec<NodeImage>,
    /// Key, node of the newest end, node of the newest snapshot.
    sessions: Vec<(u64, Option<usize>, Option<usize>)>,
    /// Name, end, nodes of the states that it keeps.
    pins: Vec<(PinId, Above, Vec<usize>)>,
    last_pin: u64,
    /// What the policy of eviction has learned.
    learnt: Vec<f64>,
    habits: Habits,
    ghosts: Vec<(u64, u8)>,
}

impl KvCache {
    /// What is cached, for a dump. Running sequences are left out, except for what they have published.
    pub fn image(&self) -> CacheImage {
        let mut ids: Vec<u32> = self.tree.ids().collect();
        ids.sort_by_key(|&id| (self.tree.node(id).start, self.tree.node(id).facts.born, id));
        let index: HashMap<u32, usize> = ids.iter().enumerate().map(|(i, &id)| (id, i)).collect();
        let mut roots: Vec<(&[u8], u32)> = self.roots.iter().map(|(s, &r)| (&**s, r)).collect();
        roots.sort_unstable();
        let above = |id: u32| match index.get(&id) {
            Some(&node) => Above::Node(node),
            None => Above::Salt(roots.iter().position(|r| r.1 == id).expect("a node is below a root")),
        };
        let live =
            |id: u32, born: u64| index.get(&id).copied().filter(|_| self.tree.node(id).facts.born == born);
        let mut sessions: Vec<_> = self
            .sessions
            .iter()
            .map(|(key, s)| {
                let state = s.snapshot.filter(|&(id, born)| self.snapshots.is(id, born));
                let state = state.map(|(id, _)| index[&self.snapshots.get(id).node]);
                (key, s.tail.and_then(|(id, born)| live(id, born)), state)
            })
            .collect();
        sessions.sort_unstable();
        let states = |pin: &Pin| pin.states.iter().map(|&id| index[&self.snapshots.get(id).node]).collect();
        CacheImage {
            now: self.now,
            now_us: self.now_us,
            salts: roots.iter().map(|r| r.0.to_vec()).collect(),
            nodes: ids
                .iter()
                .map(|&id| self.node_image(id, above(self.tree.node(id).parent), &index))
                .collect(),
            sessions,
            pins: self.pins.iter().map(|(&name, pin)| (name, above(pin.cursor), states(pin))).collect(),
            last_pin: self.last_pin,
            learnt: self.worth.learnt(),
            habits: self.habits.clone(),
            ghosts: self.ghosts.iter().collect(),
        }
    }

    fn node_image(&self, id: u32, above: Above, index: &HashMap<u32, usize>) -> NodeImage {
        let n = self.tree.node(id);
        let live = |&(output, born): &(u32, u64)| self.is_node(output, born);
        let turn = n.turn.map(|t| TurnImage {
            end: t.end,
            habit: t.habit,
            seen: t.seen,
            output: Some(t.output).filter(live).and_then(|(output, _)| index.get(&output).copied()),
        });
        NodeImage {
            above,
            tokens: n.pages.iter().flat_map(|&p| self.tree.tokens_of(p)).copied().collect(),
            facts: n.facts,
            snapshot: n.snapshot.map(|id| {
                let e = self.snapshots.get(id);
                let other = self.other_end(id).map(|s| self.snapshots.get(s).node);
                SnapshotImage {
                    born: e.born,
                    used: e.used,
                    expiry: e.expiry,
                    tenant: e.tenant,
                    uses: e.uses,
                    level: e.level,
                    octave: e.octave,
                    end: e.end,
                    drops_output: e.drops_output,
                    pair: other.and_then(|node| index.get(&node).copied()),
                    superseded: e.superseded,
                }
            }),
            turn,
        }
    }

    /// Fills an empty cache with what an image holds.
    pub fn fill(&mut self, image: &CacheImage) -> Result<(), CoreError> {
        let wrong = |what: &str| CoreError::config("dump", what, "it must be what dump() returned");
        (self.now, self.now_us, self.last_pin) = (image.now, image.now_us, image.last_pin);
        let roots: Vec<u32> = image.salts.iter().map(|salt| self.root(salt)).collect();
        let mut nodes: Vec<u32> = Vec::with_capacity(image.nodes.len());
        for n in &image.nodes {
            let above = match n.above {
                Above::Salt(i) => roots.get(i),
                Above::Node(i) => nodes.get(i),
            };
            let above = *above.ok_or_else(|| wrong("a node without predecessor"))?;
            nodes.push(self.fill_node(above, n).ok_or_else(|| wrong("larger than its pool"))?);
        }
        self.fill_turns(image, &nodes);
        self.habits = image.habits.clone();
        for (name, above, states) in &image.pins {
            let cursor = match *above {
                Above::Salt(i) => roots.get(i),
                Above::Node(i) => nodes.get(i),
            };
            let cursor = *cursor.ok_or_else(|| wrong("a pin without prefix"))?;
            let state = |i: &usize| nodes.get(*i).and_then(|&id| self.tree.node(id).snapshot);
            let states: Option<Vec<SnapshotId>> = states.iter().map(state).collect();
            let states = states.ok_or_else(|| wrong("a pin of a state that is not there"))?;
            self.hold(*name, Pin { cursor, states });
        }
        for &(key, tail, state) in &image.sessions {
            let node = |i: Option<usize>| i.and_then(|i| nodes.get(i)).map(|&id| (id, self.tree.node(id)));
            let tail = node(tail).map(|(id, n)| (id, n.facts.born));
            let state = node(state).and_then(|(_, n)| n.snapshot).map(|s| (s, self.snapshots.get(s).born));
            let session = self.session(key);
            (session.tail, session.snapshot) = (tail, state);
        }
        if !self.worth.set_learnt(&image.learnt) {
            return Err(wrong("with what another policy of eviction has learned"));
        }
        image.ghosts.iter().for_each(|&(key, uses)| self.ghosts.note(key, uses));
        nodes.iter().for_each(|&id| self.list_blocks(id));
        roots.iter().for_each(|&root| self.drop_idle_root(root));
        Ok(())
    }

    /// Marks of turns and pairs of states, when all nodes are there.
    fn fill_turns(&mut self, image: &CacheImage, nodes: &[u32]) {
        for (n, &id) in image.nodes.iter().zip(nodes) {
            self.tree.node_mut(id).turn = n.turn.map(|t| {
                let output = t.output.and_then(|i| nodes.get(i)).copied();
                let output = output.map(|at| (at, self.tree.node(at).facts.born));
                // An id that no node was born with.
                Turn { end: t.end, habit: t.habit, seen: t.seen, output: output.unwrap_or((id, u64::MAX)) }
            });
            let node = n.snapshot.and_then(|s| s.pair).and_then(|i| nodes.get(i));
            let other = node.and_then(|&node| self.tree.node(node).snapshot);
            let pair = other.map(|s| (s, self.snapshots.get(s).born));
            if let Some(own) = self.tree.node(id).snapshot {
                self.snapshots.get_mut(own).pair = pair;
            }
        }
    }

    fn fill_node(&mut self, above: u32, n: &NodeImage) -> Option<u32> {
        let mut pages = Vec::new();
        let blocks = n.tokens.len() as u32 / self.block;
        let taken = blocks > 0 && self.pool.alloc(blocks, &mut pages);
        let id = taken.then(|| self.tree.append(above, &n.tokens, &pages, n.facts, false))?;
        self.tree.unpin(id);
        if let Some(changes) = &mut self.changes {
            let (before, seed) = (self.tree.node(above).pages.last(), self.salts[&self.tree.node(id).root].1);
            changes.name_blocks(seed, before.copied(), &pages, &n.tokens);
        }
        self.quotas.add(n.facts.tenant, blocks);
        if let Some(s) = n.snapshot {
            let mut pages = Vec::new();
            self.pool.alloc(self.snapshot_pages, &mut pages).then_some(())?;
            let snapshot = self.snapshots.insert(Entry {
                node: id,
                pages: SnapshotPages(pages),
                born: s.born,
                used: s.used,
                expiry: s.expiry,
                tenant: s.tenant,
                uses: s.uses,
                level: s.level,
                octave: s.octave,
                end: s.end,
                drops_output: s.drops_output,
                pair: None,
                superseded: s.superseded,
                holds: 0,
                listed: None,
            });
            self.tree.node_mut(id).snapshot = Some(snapshot);
            self.quotas.add(s.tenant, self.snapshot_pages);
            self.list_snapshot(snapshot);
        }
        Some(id)
    }

    /// The tokens of every cached prefix by salt, each up to the end of a node, and whether a state is saved there.
    pub fn prefixes(&self) -> Vec<(Vec<u8>, Vec<u32>, bool)> {
        let of = |id: u32| {
            let mut path: Vec<u32> = self.tree.path(id).collect();
            let root = path.pop().expect("a path ends at a root");
            let pages = path.iter().rev().flat_map(|&id| &self.tree.node(id).pages);
            let tokens = pages.flat_map(|&p| self.tree.tokens_of(p)).copied().collect();
            (self.salts[&root].0.to_vec(), tokens, self.tree.node(id).snapshot.is_some())
        };
        self.tree.ids().map(of).collect()
    }
}

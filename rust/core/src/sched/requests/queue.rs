//! Who is admitted next.
//!
//! ```text
//!   aged, first come first            waited longer than `max_wait_us`: ahead of all
//!   classes by priority
//!     tenants, furthest behind first  (see `shares`)
//!       lane: deadlines that can be met, earliest first; then longest known prefix first, then first come
//! ```
//!
//! Every change costs a logarithm of the queue's length; nothing walks over it.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Unbounded};

use super::Slot;
use crate::error::Malformed;

/// Where a waiting request stands; enough to find it again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// Order of arrival.
    pub arrival: u64,
    /// Its class.
    pub priority: i32,
    /// Its lane in the class.
    pub tenant: u32,
    /// How it is ordered there.
    pub order: Order,
}

/// Order within a lane.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Order {
    /// Ahead of all lanes.
    Aged,
    /// A deadline that can be met, on the core's clock.
    Due(u64),
    /// By tokens of known prefix, most first.
    Known(Reverse<u32>),
}

#[derive(Debug, Default)]
struct Class {
    lanes: BTreeMap<u32, Lane>,
    /// Lanes by turn.
    turns: BTreeSet<(u64, u32)>,
}

#[derive(Debug, Default)]
struct Lane {
    turn: u64,
    line: BTreeMap<(Order, u64), Slot>,
}

/// All waiting requests.
#[derive(Debug, Default)]
pub struct Queue {
    arrivals: BTreeMap<u64, Slot>,
    aged: BTreeMap<u64, Slot>,
    classes: BTreeMap<Reverse<i32>, Class>,
}

impl Queue {
    /// Waiting requests.
    pub fn len(&self) -> usize {
        self.arrivals.len()
    }

    /// Whether nobody waits.
    pub fn is_empty(&self) -> bool {
        self.arrivals.is_empty()
    }

    /// Puts a request in its place; `turn` is its tenant's.
    pub fn insert(&mut self, place: Place, slot: Slot, turn: u64) {
        self.arrivals.insert(place.arrival, slot);
        if place.order == Order::Aged {
            self.aged.insert(place.arrival, slot);
            return;
        }
        let class = self.classes.entry(Reverse(place.priority)).or_default();
        let lane = class.lanes.entry(place.tenant).or_insert_with(|| {
            class.turns.insert((turn, place.tenant));
            Lane { turn, line: BTreeMap::new() }
        });
        lane.line.insert((place.order, place.arrival), slot);
    }

    /// Takes a request out. Whether it was there.
    pub fn remove(&mut self, place: Place) -> bool {
        let known = self.arrivals.remove(&place.arrival).is_some();
        if place.order == Order::Aged {
            return self.aged.remove(&place.arrival).is_some();
        }
        let Some(class) = self.classes.get_mut(&Reverse(place.priority)) else { return false };
        let Some(lane) = class.lanes.get_mut(&place.tenant) else { return false };
        lane.line.remove(&(place.order, place.arrival));
        if lane.line.is_empty() {
            class.turns.remove(&(lane.turn, place.tenant));
            class.lanes.remove(&place.tenant);
            if class.lanes.is_empty() {
                self.classes.remove(&Reverse(place.priority));
            }
        }
        known
    }

    /// A tenant's turn has moved on.
    pub fn retime(&mut self, tenant: u32, turn: u64) {
        for class in self.classes.values_mut() {
            if let Some(lane) = class.lanes.get_mut(&tenant) {
                class.turns.remove(&(lane.turn, tenant));
                class.turns.insert((turn, tenant));
                lane.turn = turn;
            }
        }
    }

    /// The next in line that is not in `skip`, which is short.
    pub fn next(&self, skip: &[Slot]) -> Option<Slot> {
        let free = |slot: &&Slot| !skip.contains(slot);
        if let Some(&slot) = self.aged.values().find(free) {
            return Some(slot);
        }
        let lanes = self.classes.values().flat_map(|c| c.turns.iter().map(|(_, t)| &c.lanes[t]));
        lanes.flat_map(|lane| lane.line.values()).find(free).copied()
    }

    /// The one that came first of all that have not aged, and are not aged.
    pub fn oldest(&self) -> Option<Slot> {
        // Aged ones are the first by arrival, but for those that lost their slab meanwhile: they aged as well.
        match self.aged.last_key_value() {
            None => self.arrivals.values().next().copied(),
            Some((last, _)) => {
                let first = self.arrivals.first_key_value().filter(|(a, _)| !self.aged.contains_key(a));
                let after = || self.arrivals.range((Excluded(*last), Unbounded)).next();
                first.or_else(after).map(|(_, &slot)| slot)
            }
        }
    }

    /// The first to arrive after `arrival`, else the first of all: for looking at one after the other.
    pub fn after(&self, arrival: u64) -> Option<(u64, Slot)> {
        let next = self.arrivals.range((Excluded(arrival), Unbounded)).next();
        next.or_else(|| self.arrivals.first_key_value()).map(|(&a, &s)| (a, s))
    }

    /// Whether a request is where its place says.
    pub fn holds(&self, place: Place, slot: Slot) -> bool {
        let there = match place.order {
            Order::Aged => self.aged.get(&place.arrival),
            order => (self.classes.get(&Reverse(place.priority)))
                .and_then(|c| c.lanes.get(&place.tenant))
                .and_then(|l| l.line.get(&(order, place.arrival))),
        };
        there == Some(&slot) && self.arrivals.get(&place.arrival) == Some(&slot)
    }

    /// Everyone is in one line, and every lane has its turn.
    pub fn check(&self, turn: impl Fn(u32) -> u64) -> Result<(), Malformed> {
        let mut waiting = self.aged.len();
        for class in self.classes.values() {
            for (&tenant, lane) in &class.lanes {
                waiting += lane.line.len();
                let timed = class.turns.contains(&(lane.turn, tenant)) && lane.turn == turn(tenant);
                Malformed::unless(timed && !lane.line.is_empty(), "lanes have their turn", || {
                    format!(
                        "tenant {tenant}: {} in its lane, {} is {}",
                        lane.line.len(),
                        lane.turn,
                        turn(tenant)
                    )
                })?;
            }
            Malformed::unless(class.turns.len() == class.lanes.len(), "turns", || format!("{class:?}"))?;
        }
        Malformed::unless(waiting == self.arrivals.len(), "waiting requests are in one line", || {
            format!("{waiting} in lines, {} arrived", self.arrivals.len())
        })
    }
}

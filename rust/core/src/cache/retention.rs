//! What the owner of a prefix says about its later use, and what a tenant may keep.

use std::collections::{BTreeMap, BTreeSet};

use hashbrown::HashMap;
use serde::{Deserialize, Serialize};

use crate::cache::worth::LEVELS;
use crate::ids::SnapshotId;

/// A hint of a request's owner: how its prefix will be used again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Retention {
    /// Requests with the same key continue each other (`prompt_cache_key`).
    pub session: Option<u64>,
    /// Keep it for at least so long after its last use (`cache_control.ttl`), unless a running request needs the memory and
    /// nothing else is left. Afterwards its priority no longer counts.
    pub ttl_us: Option<u64>,
    /// Each step up is worth four times as much when memory is short; beyond ±8 it counts as ±8.
    pub priority: i32,
}

/// Who uses a prefix, and what is known of its later use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hint {
    /// Whose share of the pool it takes; see [`crate::core::Tenant`].
    pub tenant: u32,
    /// The owner's hint.
    pub retention: Retention,
}

impl Hint {
    pub(crate) fn level(&self) -> i8 {
        self.retention.priority.clamp(-i32::from(LEVELS), i32::from(LEVELS)) as i8
    }

    pub(crate) fn expiry(&self, now_us: u64) -> u64 {
        self.retention.ttl_us.map_or(0, |ttl| now_us.saturating_add(ttl))
    }
}

/// The newest that is cached of a session. Nodes and snapshots are named with the time they were stored, so that a name
/// that was given again is not taken for the old one.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Session {
    pub tail: Option<(u32, u64)>,
    pub snapshot: Option<(SnapshotId, u64)>,
}

/// Sessions by key. Those of which nothing is cached are dropped when their number has doubled.
#[derive(Debug)]
pub(crate) struct Sessions {
    by_key: HashMap<u64, Session>,
    limit: usize,
}

impl Sessions {
    const FEW: usize = 1024;

    pub fn new() -> Self {
        Sessions { by_key: HashMap::new(), limit: Self::FEW }
    }

    /// The session of a key; `alive` tells what can be dropped to make room.
    pub fn entry(&mut self, key: u64, alive: impl Fn(&Session) -> bool) -> &mut Session {
        if self.by_key.len() >= self.limit {
            self.by_key.retain(|_, s| alive(s));
            self.limit = Self::FEW.max(2 * self.by_key.len());
        }
        self.by_key.entry(key).or_default()
    }

    /// Forgets a session.
    pub fn remove(&mut self, key: u64) -> Option<Session> {
        self.by_key.remove(&key)
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, &Session)> {
        self.by_key.iter().map(|(k, s)| (*k, s))
    }
}

/// Cached pages of tenants that have a quota.
#[derive(Debug, Default)]
pub(crate) struct Quotas {
    /// Pages held, and the most that are kept while others need memory.
    of: BTreeMap<u32, (u32, u32)>,
    over: BTreeSet<u32>,
}

impl Quotas {
    pub fn new(limits: &[(u32, u32)]) -> Self {
        Quotas { of: limits.iter().map(|&(t, limit)| (t, (0, limit))).collect(), over: BTreeSet::new() }
    }

    fn change(&mut self, tenant: u32, by: impl Fn(u32) -> u32) {
        if let Some((held, limit)) = self.of.get_mut(&tenant) {
            *held = by(*held);
            if held > limit {
                self.over.insert(tenant);
            } else {
                self.over.remove(&tenant);
            }
        }
    }

    pub fn add(&mut self, tenant: u32, pages: u32) {
        self.change(tenant, |held| held + pages);
    }

    pub fn take(&mut self, tenant: u32, pages: u32) {
        self.change(tenant, |held| held - pages);
    }

    /// Tenants that hold more than their quota, and by how much.
    pub fn over(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.over.iter().map(|t| (*t, self.of[t].0 - self.of[t].1))
    }

    /// Cached pages of a tenant with a quota.
    pub fn held(&self) -> impl Iterator<Item = (u32, u32)> + '_ {
        self.of.iter().map(|(t, (held, _))| (*t, *held))
    }
}

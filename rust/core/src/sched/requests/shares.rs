//! Each tenant's share of prefill: deficit round robin, counted in predicted cost.
//!
//! A tenant's *turn* is what it was served divided by its weight. Whoever is furthest behind goes next and is charged for
//! what it got, so the quantum is one piece of a prompt. A tenant that comes back from idleness starts at the turn of the
//! one served last: it has no claim to what it did not ask for.

use std::collections::HashMap;

use crate::options::Tenant;

/// Idle tenants are forgotten when there are more than this: then all have had their turn.
const KEPT: usize = 4096;

/// The number under which everything that forgotten tenants were served is told, so that no sum ever falls. Between the
/// numbers of configured tenants and those made from names.
const FORGOTTEN: u32 = 1 << 30;

/// What a tenant was served.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Predicted prefill time by weight, in nanoseconds: the smallest goes next.
    pub turn: u64,
    /// Live requests.
    pub live: u32,
    /// Tokens computed for it: prompts and outputs.
    pub tokens: u64,
    /// Predicted prefill time, in microseconds.
    pub prefill_us: f64,
}

/// All tenants that have or had requests.
#[derive(Debug, Default)]
pub struct Shares {
    by_id: HashMap<u32, Share>,
    weights: HashMap<u32, f64>,
    /// What tenants were served that are not in `by_id` any more.
    forgotten: Share,
    /// The turn of the tenant served last.
    now: u64,
}

impl Shares {
    /// Shares by the weights of `tenants`; others have weight 1.
    pub fn new(tenants: &[Tenant]) -> Self {
        let weights = tenants.iter().map(|t| (t.id, t.weight)).collect();
        Shares { weights, ..Shares::default() }
    }

    /// A request of a tenant is there. Returns the tenant's turn.
    pub fn enter(&mut self, tenant: u32) -> u64 {
        if self.by_id.len() >= KEPT && !self.by_id.contains_key(&tenant) {
            let (weights, forgotten) = (&self.weights, &mut self.forgotten);
            self.by_id.retain(|id, s| {
                let kept = s.live > 0 || weights.contains_key(id);
                if !kept {
                    forgotten.tokens += s.tokens;
                    forgotten.prefill_us += s.prefill_us;
                }
                kept
            });
        }
        let now = self.now;
        let share = self.by_id.entry(tenant).or_default();
        if share.live == 0 {
            share.turn = share.turn.max(now);
        }
        share.live += 1;
        share.turn
    }

    /// A request of a tenant has ended, after so many tokens were computed for it since it was last counted.
    pub fn leave(&mut self, tenant: u32) {
        if let Some(share) = self.by_id.get_mut(&tenant) {
            share.live = share.live.saturating_sub(1);
        }
    }

    /// The tenant's turn.
    pub fn turn(&self, tenant: u32) -> u64 {
        self.by_id.get(&tenant).map_or(self.now, |s| s.turn)
    }

    /// A tenant is served a piece of a prompt that takes `us`. Returns its next turn.
    pub fn charge(&mut self, tenant: u32, us: f64) -> u64 {
        let weight = self.weights.get(&tenant).copied().unwrap_or(1.0);
        let share = self.by_id.entry(tenant).or_default();
        self.now = self.now.max(share.turn);
        share.turn = share.turn.saturating_add((us * 1000.0 / weight) as u64 + 1);
        share.prefill_us += us;
        share.turn
    }

    /// Tokens were computed for a tenant.
    pub fn served(&mut self, tenant: u32, tokens: u64) {
        if let Some(share) = self.by_id.get_mut(&tenant) {
            share.tokens += tokens;
        }
    }

    /// Every tenant with what it was served, in order of ids; those forgotten together under one.
    pub fn all(&self) -> Vec<(u32, Share)> {
        let mut all: Vec<(u32, Share)> = self.by_id.iter().map(|(&id, &s)| (id, s)).collect();
        if self.forgotten != Share::default() {
            all.push((FORGOTTEN, self.forgotten));
        }
        all.sort_unstable_by_key(|x| x.0);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_follows_weights_within_one_piece() {
        let mut shares = Shares::new(&[Tenant { id: 1, weight: 3.0, quota_pages: None }]);
        for t in 0..3 {
            shares.enter(t);
        }
        let mut served = [0.0; 3];
        for i in 0..5000 {
            let next = (0..3u32).min_by_key(|&t| (shares.turn(t), t)).unwrap();
            let us = f64::from(100 + i * 37 % 900);
            shares.charge(next, us);
            served[next as usize] += us;
        }
        assert!((served[1] / 3.0 - served[0]).abs() <= 2000.0, "{served:?}");
        assert!((served[2] - served[0]).abs() <= 2000.0, "{served:?}");
    }

    #[test]
    fn what_was_served_never_falls() {
        let mut shares = Shares::new(&[Tenant { id: 1, weight: 3.0, quota_pages: None }]);
        let mut before = 0;
        for t in 1..3 * KEPT as u32 {
            shares.enter(t);
            shares.charge(t, 2.0);
            shares.served(t, 5);
            shares.leave(t);
            let tokens = shares.all().iter().map(|(_, s)| s.tokens).sum::<u64>();
            assert_eq!(tokens, before + 5);
            before = tokens;
        }
        let all = shares.all();
        assert!(
            all.len() <= KEPT + 1 && all[0].0 == 1 && all[0].1.tokens == 5,
            "a configured tenant is kept"
        );
        let us: f64 = all.iter().map(|(_, s)| s.prefill_us).sum();
        assert!((us - 2.0 * f64::from(3 * KEPT as u32 - 1)).abs() < 1e-6);
    }

    #[test]
    fn idleness_gives_no_claim() {
        let mut shares = Shares::new(&[]);
        shares.enter(0);
        for _ in 0..100 {
            shares.charge(0, 1000.0);
        }
        assert!(shares.enter(7) + 1_000_001 >= shares.turn(0));
    }
}

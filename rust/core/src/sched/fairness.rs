//! Whose prompt is next: ages and deadlines kept up to date, waiting requests and started prompts compared, requests that do
//! not fit passed over for a while.

use crate::core::Core;
use crate::sched::request::{Order, Request};
use crate::sched::table::Slot;
use std::cmp::Reverse;

/// Requests that a plan tries to admit in vain before it stops trying.
const TRIES: usize = 4;
/// Children that a plan leaves waiting for their parents; further ones start without them.
const MOST_CHILDREN: usize = 128;
/// Admissions past a request that does not fit before nobody passes it any more.
pub(super) const MOST_PASSED: u32 = 16;
/// Requests that one plan moves to the front for their age.
const MOST_AGED: u32 = 8;
/// Tokens by which the credit for looking prefixes up again grows with each plan.
const LOOKUP_CREDIT: u64 = 16 * 1024;

impl Core {
    /// Bounded upkeep of the queue, once a plan.
    pub(super) fn keep_order(&mut self) {
        if self.table.queue.is_empty() {
            return;
        }
        for _ in 0..MOST_AGED {
            let Some(slot) = self.table.queue.oldest() else { break };
            let request = self.table.get(slot);
            if self.now_us < request.arrived_us.saturating_add(self.options.max_wait_us) {
                break;
            }
            self.table.reorder(slot, Order::Aged);
            self.counters.aged += 1;
        }
        self.look_again();
    }

    /// Looks one waiting request's prefix up again: what is cached changes while it waits. Work is bounded by a credit of
    /// tokens that grows with each plan.
    fn look_again(&mut self) {
        let credit = self.lookup_credit.saturating_add(LOOKUP_CREDIT).min(self.options.max_len.into());
        self.lookup_credit = credit;
        if self.table.queue.len() < 2 || !self.options.prefix_cache {
            return;
        }
        let Some((arrival, slot)) = self.table.queue.after(self.looked_at) else { return };
        let cost = u64::from(self.table.get(slot).known());
        if cost <= credit {
            (self.looked_at, self.lookup_credit) = (arrival, credit - cost);
            let known = self.known_prefix(slot);
            self.knows(slot, known);
        }
    }

    /// Tokens of a waiting request's prefix that are known.
    pub(crate) fn known_prefix(&mut self, slot: Slot) -> u32 {
        let request = self.table.get_mut(slot);
        if let Some(parked) = &request.parked {
            return parked.pos;
        }
        if !self.options.prefix_cache || request.all_logits {
            return 0;
        }
        let limit = request.known() - 1;
        self.cache.lookup(&request.salt, request.tokens.all(), limit).history
    }

    /// So many tokens of a waiting request's prefix are known: its place follows.
    pub(super) fn knows(&mut self, slot: Slot, known: u32) {
        let request = self.table.get_mut(slot);
        request.known_prefix = known;
        if matches!(request.place.order, Order::Known(_)) {
            self.table.reorder(slot, Order::Known(Reverse(known)));
        }
    }

    /// Where a request belongs in its lane.
    pub(crate) fn order_of(&self, request: &Request) -> Order {
        if self.now_us >= request.arrived_us.saturating_add(self.options.max_wait_us) {
            return Order::Aged;
        }
        match request.deadline_us {
            Some(deadline) if request.outputs() == 0 && self.can_meet(request, deadline) => {
                Order::Due(deadline)
            }
            _ => Order::Known(Reverse(request.known_prefix)),
        }
    }

    fn can_meet(&self, request: &Request, deadline: u64) -> bool {
        let us = self.model.prefill_us(request.known_prefix.min(request.known()), request.known());
        self.now_us as f64 + us <= deadline as f64
    }

    /// From the running ones to the queue.
    pub(super) fn requeue(&mut self, slot: Slot) {
        let request = self.table.get(slot);
        let aged = request.place.order == Order::Aged;
        let order = if aged { Order::Aged } else { self.order_of(request) };
        let request = self.table.get_mut(slot);
        request.place.order = order;
        request.known_prefix = request.parked.as_ref().map_or(request.known_prefix, |p| p.pos);
        self.table.stop(slot);
    }

    /// The next waiting request. Deadlines that cannot be met any more lose their place on the way.
    pub(super) fn next_waiting(&mut self, tried: &[Slot]) -> Option<Slot> {
        loop {
            let slot = self.table.queue.next(tried)?;
            let request = self.table.get(slot);
            match request.place.order {
                Order::Due(deadline) if !self.can_meet(request, deadline) => {
                    self.counters.deadlines_hopeless += 1;
                    let known = request.known_prefix;
                    self.table.reorder(slot, Order::Known(Reverse(known)));
                }
                _ => return Some(slot),
            }
        }
    }

    /// Which of the started prompts is next: by class, by its tenant's turn, by seniority.
    pub(super) fn next_piece(&self, prefilling: &[Slot]) -> Option<usize> {
        if prefilling.len() < 2 {
            return prefilling.len().checked_sub(1);
        }
        let key = |slot: Slot| {
            let request = self.table.get(slot);
            let place = request.place;
            (Reverse(place.priority), self.table.shares.turn(place.tenant), place.arrival)
        };
        (0..prefilling.len()).min_by_key(|&i| key(prefilling[i]))
    }

    /// Whether a waiting request goes before the next piece of a started prompt: by age, class, its tenant's turn, a
    /// deadline, and arrival.
    pub(super) fn goes_before(&self, waiting: Slot, started: Slot) -> bool {
        let (a, b) = (self.table.get(waiting), self.table.get(started));
        let due = |r: &Request| r.deadline_us.unwrap_or(u64::MAX);
        let sooner = matches!(a.place.order, Order::Due(deadline) if deadline < due(b));
        let turn = |r: &Request| self.table.shares.turn(r.place.tenant);
        let key = |r: &Request, first: bool, sooner: bool| {
            (!first, Reverse(r.place.priority), turn(r), !sooner, r.place.arrival)
        };
        key(a, a.place.order == Order::Aged, sooner) < key(b, false, false)
    }

    /// A request did not fit. Whether others may be tried: not past one that has aged or was passed often.
    ///
    /// A child that waits for its parent does not count, as the parent may wait behind it; but only so many are kept waiting.
    pub(super) fn pass_over(&mut self, slot: Slot, tried: &mut Vec<Slot>) -> bool {
        let request = self.table.get_mut(slot);
        if request.forked.is_some() && tried.len() < MOST_CHILDREN {
            tried.push(slot);
            return true;
        }
        request.forked = None;
        let barred = request.place.order == Order::Aged || request.passed >= MOST_PASSED;
        tried.push(slot);
        let failed = tried.iter().filter(|&&s| self.table.get(s).forked.is_none()).count();
        !barred && failed < TRIES
    }

    /// Another request was admitted past these.
    pub(super) fn count_passed(&mut self, tried: &[Slot]) {
        for &slot in tried {
            self.table.get_mut(slot).passed += 1;
            self.counters.passed += 1;
        }
    }
}

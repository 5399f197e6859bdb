//! Whose prompt is next: ages and deadlines kept up to date, waiting requests and started prompts compared, requests that do
//! not fit passed over for a while.

use std::cmp::Reverse;

use super::queue::Order;
use super::{Requests, Slot};
use crate::options::Options;
use crate::sched::memory::Memory;
use crate::sched::pace::Pace;
use crate::sched::request::Request;

/// Requests that a plan tries to admit in vain before it stops trying.
const TRIES: usize = 4;
/// Children that a plan leaves waiting for their parents; further ones start without them.
const MOST_CHILDREN: usize = 128;
/// Admissions past a request that does not fit before nobody passes it any more.
const MOST_PASSED: u32 = 16;
/// Requests that one plan moves to the front for their age.
const MOST_AGED: u32 = 8;
/// Tokens by which the credit for looking prefixes up again grows with each plan.
const LOOKUP_CREDIT: u64 = 16 * 1024;

impl Requests {
    /// Bounded upkeep of the queue, once a plan.
    pub fn keep_order(&mut self, options: &Options, memory: &Memory, pace: &Pace) {
        if self.queue.is_empty() {
            return;
        }
        for _ in 0..MOST_AGED {
            let Some(slot) = self.queue.oldest() else { break };
            if !pace.has_aged(self.get(slot)) {
                break;
            }
            self.reorder(slot, Order::Aged);
            self.counts.aged += 1;
        }
        self.look_again(options, memory);
    }

    /// Looks one waiting request's prefix up again: what is cached changes while it waits. Work is bounded by a credit of
    /// tokens that grows with each plan.
    fn look_again(&mut self, options: &Options, memory: &Memory) {
        let credit = self.lookup_credit.saturating_add(LOOKUP_CREDIT).min(options.max_len.into());
        self.lookup_credit = credit;
        if self.queue.len() < 2 || !options.prefix_cache {
            return;
        }
        let Some((arrival, slot)) = self.queue.after(self.looked_at) else { return };
        let cost = u64::from(self.get(slot).known());
        if cost <= credit {
            (self.looked_at, self.lookup_credit) = (arrival, credit - cost);
            let known = memory.known_prefix(self.get_mut(slot));
            self.knows(slot, known);
        }
    }

    /// A request has come: its place in line, which does not matter while it is alone.
    pub fn take_place(&mut self, slot: Slot, memory: &Memory, pace: &Pace) {
        let request = self.get_mut(slot);
        request.known_prefix = memory.known_prefix(request);
        let order = Self::order_of(self.get(slot), pace);
        self.reorder(slot, order);
    }

    /// So many tokens of a waiting request's prefix are known: its place follows.
    pub fn knows(&mut self, slot: Slot, known: u32) {
        let request = self.get_mut(slot);
        request.known_prefix = known;
        if matches!(request.place.order, Order::Known(_)) {
            self.reorder(slot, Order::Known(Reverse(known)));
        }
    }

    /// Gives a waiting request another place in its line.
    fn reorder(&mut self, slot: Slot, order: Order) {
        let place = self.get(slot).place;
        if place.order != order {
            self.queue.remove(place);
            self.get_mut(slot).place.order = order;
            self.queue.insert(self.get(slot).place, slot, self.shares.turn(place.tenant));
        }
    }

    /// Where a request belongs in its lane.
    fn order_of(request: &Request, pace: &Pace) -> Order {
        if pace.has_aged(request) {
            return Order::Aged;
        }
        match request.deadline_us {
            Some(deadline) if request.outputs() == 0 && pace.can_meet(request, deadline) => {
                Order::Due(deadline)
            }
            _ => Order::Known(Reverse(request.known_prefix)),
        }
    }

    /// Where a request belongs that comes back.
    pub(super) fn order_again(request: &Request, pace: &Pace) -> Order {
        if request.place.order == Order::Aged { Order::Aged } else { Self::order_of(request, pace) }
    }

    /// The next waiting request. Deadlines that cannot be met any more lose their place on the way.
    pub fn next_waiting(&mut self, tried: &[Slot], pace: &Pace) -> Option<Slot> {
        loop {
            let slot = self.queue.next(tried)?;
            let request = self.get(slot);
            match request.place.order {
                Order::Due(deadline) if !pace.can_meet(request, deadline) => {
                    let known = request.known_prefix;
                    self.counts.deadlines_hopeless += 1;
                    self.reorder(slot, Order::Known(Reverse(known)));
                }
                _ => return Some(slot),
            }
        }
    }

    /// The waiting request that would have the slab of the last running one: of higher priority, and one that does not wait
    /// for a parent. The last one must not have aged, and have got somewhere.
    pub fn challenger(&self) -> Option<(Slot, Slot)> {
        let (head, last) = (self.queue.next(&[])?, *self.running.last()?);
        let (a, b) = (self.get(head), self.get(last));
        let run = b.run()?;
        let senior = a.place.priority > b.place.priority && b.place.order != Order::Aged;
        (senior && a.forked.is_none() && run.computed > run.begun).then_some((head, last))
    }

    /// Which of the started prompts is next: by class, by its tenant's turn, by what is left of it where the step is one for
    /// the short, by seniority.
    pub fn next_piece(&self, prefilling: &[Slot], short_first: bool) -> Option<usize> {
        if prefilling.len() < 2 {
            return prefilling.len().checked_sub(1);
        }
        let key = |slot: Slot| {
            let request = self.get(slot);
            let place = request.place;
            let left = if short_first { request.left() } else { 0 };
            (Reverse(place.priority), self.shares.turn(place.tenant), left, place.arrival)
        };
        (0..prefilling.len()).min_by_key(|&i| key(prefilling[i]))
    }

    /// Whether a waiting request goes before the next piece of a started prompt: by age, class, its tenant's turn, a
    /// deadline, what is left of it where the step is one for the short, and arrival.
    pub fn goes_before(&self, waiting: Slot, started: Slot, short_first: bool) -> bool {
        let (a, b) = (self.get(waiting), self.get(started));
        let due = |r: &Request| r.deadline_us.unwrap_or(u64::MAX);
        let sooner = matches!(a.place.order, Order::Due(deadline) if deadline < due(b));
        let turn = |r: &Request| self.shares.turn(r.place.tenant);
        let key = |r: &Request, first: bool, sooner: bool| {
            let left = if short_first { r.left() } else { 0 };
            (!first, Reverse(r.place.priority), turn(r), !sooner, left, r.place.arrival)
        };
        key(a, a.place.order == Order::Aged, sooner) < key(b, false, false)
    }

    /// A request did not fit. Whether others may be tried: not past one that has aged or was passed often.
    ///
    /// A child that waits for its parent does not count, as the parent may wait behind it; but only so many are kept waiting.
    pub fn pass_over(&mut self, slot: Slot, tried: &mut Vec<Slot>) -> bool {
        let request = self.get_mut(slot);
        if request.forked.is_some() && tried.len() < MOST_CHILDREN {
            tried.push(slot);
            return true;
        }
        request.forked = None;
        let barred = request.place.order == Order::Aged || request.passed >= MOST_PASSED;
        tried.push(slot);
        let failed = tried.iter().filter(|&&s| self.get(s).forked.is_none()).count();
        !barred && failed < TRIES
    }

    /// Another request was admitted past these.
    pub fn count_passed(&mut self, tried: &[Slot]) {
        for &slot in tried {
            self.get_mut(slot).passed += 1;
            self.counts.passed += 1;
        }
    }
}

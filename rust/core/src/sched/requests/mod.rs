//! Live requests: by slot and by name, who waits in what order, who runs, who is parked, who wants to start from whom.
//!
//! A request lies in one place: in its slot of the table. The lists beside it follow its stage, and only the methods here
//! change both.

mod fairness;
pub mod queue;
pub mod shares;

use std::cmp::Reverse;
use std::collections::BTreeSet;

use hashbrown::HashMap;

use self::queue::{Order, Place, Queue};
use self::shares::{Share, Shares};
use crate::error::{CoreError, Malformed};
use crate::ids::RequestId;
use crate::options::Tenant;
use crate::sched::pace::Pace;
use crate::sched::request::{Forked, Parked, Rank, Request, Run, Submit};
use crate::sched::tokens::Spare;

/// A slot of the table; reused after the request has ended.
pub type Slot = u32;

/// All live requests.
#[derive(Debug, Default)]
pub struct Requests {
    slots: Vec<Option<Request>>,
    vacant: Vec<Slot>,
    by_id: HashMap<RequestId, Slot>,
    /// Those that wait.
    queue: Queue,
    /// What tenants were served.
    shares: Shares,
    /// The most senior first: highest priority, then first come. The last one is preempted first.
    running: Vec<Slot>,
    /// Waiting requests with their state saved, the most senior first.
    parked: BTreeSet<(Rank, Slot)>,
    /// Children that may start from a parent's state: (child, parent).
    forks: Vec<(RequestId, RequestId)>,
    arrivals: u64,
    /// Stays in a slab so far.
    epochs: u64,
    /// The arrival whose prefix was looked up again last, and the credit for more.
    looked_at: u64,
    lookup_credit: u64,
    counts: Counts,
    /// Memory of prompts that have ended.
    pub spare: Spare,
}

/// What happened to waiting requests so far.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Requests that waited so long that they went ahead of all.
    pub aged: u64,
    /// Deadlines given up because they could not be met any more.
    pub deadlines_hopeless: u64,
    /// Admissions past a request that did not fit.
    pub passed: u64,
}

impl Requests {
    /// None yet.
    pub fn new(tenants: &[Tenant]) -> Self {
        Requests { shares: Shares::new(tenants), ..Requests::default() }
    }

    /// Adds a request to the queue.
    pub fn insert(&mut self, submit: Submit, max_new: u32, now_us: u64) -> Slot {
        self.arrivals += 1;
        let place = Place {
            arrival: self.arrivals,
            priority: submit.priority,
            tenant: submit.tenant,
            order: Order::Known(Reverse(0)),
        };
        let request = Request::new(submit, place, max_new, now_us);
        let turn = self.shares.enter(place.tenant);
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as Slot - 1
        });
        self.by_id.insert(request.id, slot);
        self.slots[slot as usize] = Some(request);
        self.queue.insert(place, slot, turn);
        slot
    }

    /// Takes a request out for good, with what its stage holds.
    pub fn remove(&mut self, slot: Slot) -> Request {
        let request = self.slots[slot as usize].take().expect("the slot is live");
        match request.run() {
            Some(run) => self.served(request.place.tenant, run),
            None => drop(self.queue.remove(request.place)),
        }
        self.leave_running(slot, request.rank());
        self.parked.remove(&(request.rank(), slot));
        self.shares.leave(request.place.tenant);
        self.by_id.remove(&request.id);
        self.vacant.push(slot);
        request
    }

    /// The slot of a live request.
    pub fn find(&self, id: RequestId) -> Option<Slot> {
        self.by_id.get(&id).copied()
    }

    /// A live request.
    pub fn get(&self, slot: Slot) -> &Request {
        self.slots[slot as usize].as_ref().expect("the slot is live")
    }

    /// A live request.
    pub fn get_mut(&mut self, slot: Slot) -> &mut Request {
        self.slots[slot as usize].as_mut().expect("the slot is live")
    }

    /// What a request holds while it runs.
    pub fn run_mut(&mut self, slot: Slot) -> Option<&mut Run> {
        self.get_mut(slot).run_mut()
    }

    /// The request in a slot, if it is still in this stay there.
    pub fn in_stay(&mut self, slot: Slot, epoch: u64) -> Option<&mut Request> {
        let request = self.slots[slot as usize].as_mut()?;
        let stays = request.run().is_some_and(|run| run.epoch == epoch);
        stays.then_some(request)
    }

    /// The state that a request in this slot is parked with.
    pub fn parked(&self, slot: Slot) -> Option<&Parked> {
        self.slots[slot as usize].as_ref().and_then(Request::parked)
    }

    /// From the queue to the running ones. Returns the number of the stay.
    pub fn start(&mut self, slot: Slot, mut run: Run) -> Result<u64, CoreError> {
        self.epochs += 1;
        run.epoch = self.epochs;
        let request = self.get_mut(slot);
        request.start(run)?;
        let (place, rank) = (request.place, request.rank());
        self.queue.remove(place);
        let at = self.running.partition_point(|&s| self.get(s).rank() < rank);
        self.running.insert(at, slot);
        Ok(self.epochs)
    }

    /// From the running ones to the queue, in its place there. Returns what it held.
    pub fn stop(&mut self, slot: Slot, pace: &Pace) -> Result<Run, CoreError> {
        let request = self.get_mut(slot);
        let run = request.stop()?;
        let (rank, tenant) = (request.rank(), request.place.tenant);
        self.served(tenant, &run);
        let order = Self::order_again(self.get(slot), pace);
        let request = self.get_mut(slot);
        request.place.order = order;
        let place = request.place;
        self.leave_running(slot, rank);
        self.queue.insert(place, slot, self.shares.turn(place.tenant));
        Ok(run)
    }

    /// From the running ones to the queue with its state saved, as `save` says from what it held.
    pub fn park(
        &mut self,
        slot: Slot,
        pace: &Pace,
        save: impl FnOnce(Run) -> Parked,
    ) -> Result<(), CoreError> {
        let parked = save(self.stop(slot, pace)?);
        let request = self.get_mut(slot);
        request.known_prefix = parked.pos;
        let rank = request.rank();
        request.hold(parked);
        self.parked.insert((rank, slot));
        Ok(())
    }

    /// A request no longer has its saved state, which is returned.
    pub fn unpark(&mut self, slot: Slot) -> Option<Parked> {
        let request = self.get_mut(slot);
        let (rank, parked) = (request.rank(), request.take_parked()?);
        self.parked.remove(&(rank, slot));
        Some(parked)
    }

    /// Parked requests, the most junior first.
    pub fn juniors_parked(&self) -> impl Iterator<Item = (Slot, &Parked)> {
        self.parked.iter().rev().filter_map(|&(_, slot)| self.parked(slot).map(|parked| (slot, parked)))
    }

    /// How many are parked.
    pub fn parked_count(&self) -> usize {
        self.parked.len()
    }

    /// Whether a parked request is junior to this one.
    pub fn has_junior_parked(&self, slot: Slot) -> bool {
        let rank = self.get(slot).rank();
        self.parked.last().is_some_and(|&(r, _)| r > rank)
    }

    fn leave_running(&mut self, slot: Slot, rank: Rank) {
        // The request itself may be gone from its slot already, so ranks are compared with those of the others only.
        let at = self.running.partition_point(|&s| s != slot && self.get(s).rank() < rank);
        if self.running.get(at) == Some(&slot) {
            self.running.remove(at);
        }
    }

    /// The running ones, the most senior first.
    pub fn running(&self) -> &[Slot] {
        &self.running
    }

    /// How many run.
    pub fn running_count(&self) -> u32 {
        self.running.len() as u32
    }

    /// How many wait.
    pub fn waiting_count(&self) -> usize {
        self.queue.len()
    }

    /// Whether there is no live request.
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// Live requests.
    pub fn iter(&self) -> impl Iterator<Item = &Request> {
        self.slots.iter().flatten()
    }

    /// Live requests in the order in which they came.
    pub fn by_arrival(&self) -> Vec<&Request> {
        let mut live: Vec<&Request> = self.iter().collect();
        live.sort_by_key(|r| r.place.arrival);
        live
    }

    /// A tenant is served a piece of a prompt that takes `us`.
    pub fn charge(&mut self, tenant: u32, us: f64) {
        let turn = self.shares.charge(tenant, us);
        self.queue.retime(tenant, turn);
    }

    fn served(&mut self, tenant: u32, run: &Run) {
        self.shares.served(tenant, u64::from(run.computed.saturating_sub(run.begun)));
    }

    /// What each tenant was served.
    pub fn tenants(&self) -> Vec<(u32, Share)> {
        self.shares.all()
    }

    /// What happened to waiting requests so far.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A waiting request may start from the state of another live one.
    pub fn fork(&mut self, child: Slot, forked: Forked) {
        let request = self.get_mut(child);
        request.forked = Some(forked);
        let id = request.id;
        self.forks.push((id, forked.parent));
    }

    /// The children that wait for a parent, with the parent's name; the list is taken.
    pub fn take_forks(&mut self) -> Vec<(RequestId, RequestId)> {
        std::mem::take(&mut self.forks)
    }

    /// The children that go on waiting.
    pub fn keep_forks(&mut self, forks: Vec<(RequestId, RequestId)>) {
        self.forks = forks;
    }

    /// How far a request that is being admitted at `first` may go before its children have their state.
    pub fn hold_of(&self, parent: RequestId, first: u32) -> u32 {
        let mine = self.forks.iter().filter(|f| f.1 == parent);
        let forked = mine.filter_map(|f| self.find(f.0).and_then(|slot| self.get(slot).forked));
        forked.map(|f| f.shared).filter(|&at| at > first).min().unwrap_or(u32::MAX)
    }

    /// Every list follows the stages.
    pub fn check(&self) -> Result<(), Malformed> {
        let ranks: Vec<_> = self.running.iter().map(|&s| self.get(s).rank()).collect();
        Malformed::unless(ranks.is_sorted(), "running order", || format!("{ranks:?}"))?;
        for (slot, request) in (0..).zip(&self.slots) {
            let Some(request) = request else { continue };
            let runs = self.running.contains(&slot);
            let waits = self.queue.holds(request.place, slot);
            let parked = self.parked.contains(&(request.rank(), slot));
            let should = (request.run().is_some(), request.run().is_none(), request.parked().is_some());
            Malformed::unless((runs, waits, parked) == should, "lists of requests", || {
                format!(
                    "request {} is {}; it runs: {runs}, waits: {waits}, is parked: {parked}",
                    request.id.0,
                    request.stage.name()
                )
            })?;
        }
        self.queue.check(|tenant| self.shares.turn(tenant))?;
        let holders = self.iter().filter(|r| r.parked().is_some()).count();
        Malformed::unless(holders == self.parked.len(), "parked requests", || {
            format!("{holders} hold a state, {} are listed", self.parked.len())
        })
    }
}

//! Live requests by slot, by id, and in scheduling order.

use hashbrown::HashMap;

use crate::core::Tenant;
use crate::ids::RequestId;
use crate::sched::queue::{Order, Queue};
use crate::sched::request::{Rank, Request};
use crate::sched::shares::Shares;

/// A slot of the table; reused after the request has ended.
pub type Slot = u32;

/// All live requests. A request is either in `queue` or in `running`.
#[derive(Debug, Default)]
pub struct Table {
    slots: Vec<Option<Request>>,
    vacant: Vec<Slot>,
    by_id: HashMap<RequestId, Slot>,
    /// Those that wait.
    pub queue: Queue,
    /// What tenants were served.
    pub shares: Shares,
    /// The most senior first: highest priority, then first come. The last one is preempted first.
    pub running: Vec<Slot>,
}

impl Table {
    /// An empty table.
    pub fn new(tenants: &[Tenant]) -> Self {
        Table { shares: Shares::new(tenants), ..Table::default() }
    }

    /// Adds a request to the queue.
    pub fn insert(&mut self, request: Request) -> Slot {
        let (id, place) = (request.id, request.place);
        let turn = self.shares.enter(place.tenant);
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() as Slot - 1
        });
        self.slots[slot as usize] = Some(request);
        self.by_id.insert(id, slot);
        self.queue.insert(place, slot, turn);
        slot
    }

    /// Takes a request out for good.
    pub fn remove(&mut self, slot: Slot) -> Request {
        let request = self.slots[slot as usize].take().expect("the slot is live");
        if request.run.is_none() {
            self.queue.remove(request.place);
        }
        self.leave_running(slot, request.rank());
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

    /// Whatever is in a slot now, if anything.
    pub fn try_get_mut(&mut self, slot: Slot) -> Option<&mut Request> {
        self.slots[slot as usize].as_mut()
    }

    /// From the queue to the running ones.
    pub fn start(&mut self, slot: Slot) {
        let request = self.get(slot);
        let (place, rank) = (request.place, request.rank());
        self.queue.remove(place);
        let at = self.running.partition_point(|&s| self.get(s).rank() < rank);
        self.running.insert(at, slot);
    }

    /// From the running ones to the queue.
    pub fn stop(&mut self, slot: Slot) {
        let request = self.get(slot);
        let (place, rank) = (request.place, request.rank());
        self.leave_running(slot, rank);
        self.queue.insert(place, slot, self.shares.turn(place.tenant));
    }

    /// Gives a waiting request another place in its line.
    pub fn reorder(&mut self, slot: Slot, order: Order) {
        let place = self.get(slot).place;
        if place.order != order {
            self.queue.remove(place);
            self.get_mut(slot).place.order = order;
            self.queue.insert(self.get(slot).place, slot, self.shares.turn(place.tenant));
        }
    }

    /// A tenant is served a piece of a prompt that takes `us`.
    pub fn charge(&mut self, tenant: u32, us: f64) {
        let turn = self.shares.charge(tenant, us);
        self.queue.retime(tenant, turn);
    }

    fn leave_running(&mut self, slot: Slot, rank: Rank) {
        // The request itself may be gone from its slot already, so ranks are compared with those of the others only.
        let at = self.running.partition_point(|&s| s != slot && self.get(s).rank() < rank);
        if self.running.get(at) == Some(&slot) {
            self.running.remove(at);
        }
    }

    /// Live requests.
    pub fn iter(&self) -> impl Iterator<Item = &Request> {
        self.slots.iter().flatten()
    }

    /// The running ones, the most senior first.
    pub fn iter_running(&self) -> impl Iterator<Item = &Request> {
        self.running.iter().map(|&s| self.get(s))
    }
}

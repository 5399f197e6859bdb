//! The core: everything that the engine calls.
//!
//! ```text
//!   submit · abort · stop          plan ─▶ buffer ─▶ device ─▶ commit | rollback          events · explain · stats
//! ```
//!
//! One thread owns it. With two steps in flight, `plan` of the second comes before `commit` of the first; an input token
//! that the first one samples is then written as a placeholder, and results of requests that ended meanwhile are ignored.

use std::cmp::Reverse;
use std::collections::{BTreeSet, VecDeque};

use crate::cache::{CacheOptions, KvCache};
use crate::error::CoreError;
use crate::event::{Event, Events};
use crate::fence::Tickets;
use crate::ids::{PinId, RequestId, Step};
use crate::layout::LayoutSpec;
use crate::mutant::{self, Mutant};
pub use crate::options::{Options, Tenant};
use crate::plan::{Limits, Schema};
use crate::sched::budget::StepModel;
use crate::sched::explain::{Archive, Explain, ZeroHits};
use crate::sched::flight::Flight;
use crate::sched::policy::SnapshotPolicy;
use crate::sched::request::{Finish, Hint, Order, Phase, Place, Rank, Request, Submit};
use crate::sched::slabs::Slabs;
use crate::sched::table::{Slot, Table};
use crate::stats::Counters;

/// The scheduler with its cache.
#[derive(Debug)]
pub struct Core {
    pub(crate) options: Options,
    pub(crate) schema: Schema,
    pub(crate) replay_tokens: u32,
    pub(crate) block: u32,
    pub(crate) snapshot_pages: u32,
    pub(crate) slab_pages: u32,
    pub(crate) cache: KvCache,
    pub(crate) slabs: Slabs,
    pub(crate) table: Table,
    pub(crate) flights: VecDeque<Flight>,
    pub(crate) spare_flights: Vec<Flight>,
    pub(crate) prefilling: Vec<Slot>,
    pub(crate) events: Events,
    pub(crate) archive: Archive,
    pub(crate) counters: Counters,
    pub(crate) zero_hits: ZeroHits,
    /// The last step planned.
    pub(crate) last: Step,
    /// Copies that have not ended.
    pub(crate) tickets: Tickets,
    /// A request had to give way in the plan being made.
    pub(crate) gave_way: bool,
    /// A running request that gets no row in the plan being made, so that it can be parked in the next one.
    pub(crate) held: Option<Slot>,
    /// Waiting requests with their state saved, the most senior first.
    pub(crate) parked: BTreeSet<(Rank, Slot)>,
    /// Children that may start from a parent's state: (child, parent).
    pub(crate) forks: Vec<(RequestId, RequestId)>,
    /// Requests that did not fit in the plan being made.
    pub(crate) tried: Vec<Slot>,
    /// The arrival whose prefix was looked up again last, and the credit for more.
    pub(crate) looked_at: u64,
    pub(crate) lookup_credit: u64,
    /// Pins that stand, oldest first.
    pub(crate) pins: VecDeque<PinId>,
    pub(crate) model: StepModel,
    pub(crate) now_us: u64,
    pub(crate) epochs: u64,
    arrivals: u64,
}

impl Core {
    /// An idle core. Refuses options that cannot work.
    pub fn new(layout: &LayoutSpec, options: Options) -> Result<Self, CoreError> {
        options.validate()?;
        let replay_tokens = options.replay_tokens.unwrap_or(layout.replay_tokens());
        let cache_options = CacheOptions {
            pages: options.pages,
            eviction: options.eviction,
            prefix_cache: options.prefix_cache,
            snapshot_budget: options.snapshot_budget,
            quotas: options.tenants.iter().filter_map(|t| t.quota_pages.map(|q| (t.id, q))).collect(),
            cost: options.cost,
            admit_by_value: options.snapshots == SnapshotPolicy::Auto,
            replay_tokens,
        };
        Ok(Core {
            schema: Schema::new(Limits::new(layout, &options)),
            replay_tokens: replay_tokens - u32::from(mutant::on(Mutant::WindowOffByOne)),
            block: layout.block_tokens,
            snapshot_pages: layout.snapshot_pages(),
            slab_pages: layout.slab_pages(),
            cache: KvCache::new(layout, &cache_options)?,
            slabs: Slabs::new(options.slabs),
            table: Table::new(&options.tenants),
            flights: VecDeque::new(),
            spare_flights: Vec::new(),
            prefilling: Vec::new(),
            events: Events::default(),
            archive: Archive::default(),
            counters: Counters::default(),
            zero_hits: ZeroHits::default(),
            last: Step(0),
            tickets: Tickets::default(),
            gave_way: false,
            held: None,
            parked: BTreeSet::new(),
            forks: Vec::new(),
            tried: Vec::new(),
            looked_at: 0,
            lookup_credit: 0,
            pins: VecDeque::new(),
            model: StepModel::new(options.cost, options.step_cost),
            now_us: 0,
            epochs: 0,
            arrivals: 0,
            options,
        })
    }

    /// Tokens of a page.
    pub(crate) fn shape_block(&self) -> u32 {
        self.block
    }

    /// Pages that must be available before a state is saved: its own, and one for each running request.
    pub(crate) fn pages_for_a_save(&self) -> u32 {
        self.snapshot_pages + self.table.running.len() as u32
    }

    /// Queues a request. Refuses what could never run, and everything while the queue is full.
    pub fn submit(&mut self, submit: Submit) -> Result<(), CoreError> {
        let id = submit.id;
        if submit.prompt.is_empty() {
            return Err(CoreError::EmptyPrompt(id.0));
        }
        if self.table.find(id).is_some() {
            return Err(CoreError::Duplicate(id.0));
        }
        let max_new = self.room_for_output(&submit)?;
        if self.table.queue.len() >= self.options.max_waiting {
            let (waiting, limit) = (self.table.queue.len(), self.options.max_waiting);
            return Err(CoreError::Overloaded { waiting, limit });
        }
        self.arrivals += 1;
        let prompt = submit.prompt.len() as u32;
        self.archive.forget(id);
        let contended = !self.table.queue.is_empty() || submit.deadline_us.is_some();
        let place = Place {
            arrival: self.arrivals,
            priority: submit.priority,
            tenant: submit.tenant,
            order: Order::Known(Reverse(0)),
        };
        let slot = self.table.insert(Request {
            id,
            prompt,
            tokens: submit.prompt.into(),
            max_new,
            stop_ids: submit.stop_ids.into(),
            salt: submit.salt.into(),
            place,
            arrived_us: self.now_us,
            deadline_us: submit.deadline_us,
            passed: 0,
            blocked: None,
            forked: None,
            all_logits: submit.all_logits,
            hint: Hint { tenant: submit.tenant, retention: submit.retention },
            phase: Phase::Waiting,
            run: None,
            parked: None,
            known_prefix: 0,
            computed_before: 0,
            explain: Explain { prompt_tokens: prompt, ..Explain::default() },
        });
        // Alone in the queue its place does not matter.
        if contended {
            let known = self.known_prefix(slot);
            self.table.get_mut(slot).known_prefix = known;
            let order = self.order_of(self.table.get(slot));
            self.table.reorder(slot, order);
        }
        Ok(())
    }

    /// Tokens that the request may sample. The last one of them is never computed, so it takes no page.
    fn room_for_output(&self, submit: &Submit) -> Result<u32, CoreError> {
        let (prompt, limit) = (submit.prompt.len() as u64, self.options.max_len);
        let pages = self.cache.pages();
        let held = u64::from(pages) * u64::from(self.block);
        let wanted = match submit.max_new {
            Some(n) => u64::from(n),
            None => u64::from(limit).saturating_sub(prompt).min((held + 1).saturating_sub(prompt)).max(1),
        };
        if prompt + wanted > u64::from(limit) {
            return Err(CoreError::TooLong { tokens: prompt + wanted, limit });
        }
        let computed = prompt + wanted.saturating_sub(1);
        if computed > held {
            let needed = computed.div_ceil(u64::from(self.block)) as u32;
            return Err(CoreError::NeverFits { needed, pages, tokens: held });
        }
        Ok(wanted as u32)
    }

    /// Ends a request in any state, at once. False when there is no such live request.
    pub fn abort(&mut self, id: RequestId) -> Result<bool, CoreError> {
        self.end(id, Finish::Abort)
    }

    /// Ends a request as if its last token had been a stop token: the caller saw a stop string.
    pub fn stop(&mut self, id: RequestId) -> Result<bool, CoreError> {
        self.end(id, Finish::Stop)
    }

    fn end(&mut self, id: RequestId, reason: Finish) -> Result<bool, CoreError> {
        match self.table.find(id) {
            Some(slot) => self.finish(slot, reason, None).map(|()| true),
            None => Ok(false),
        }
    }

    /// The oldest event that nobody has fetched.
    pub fn next_event(&mut self) -> Option<Event> {
        self.events.pop()
    }

    /// Fills `out` with events, six integers each, and returns how many.
    pub fn events_into(&mut self, out: &mut [i64]) -> usize {
        self.events.drain_into(out)
    }

    /// What of a request's prompt was reused, while it lives and for a while after.
    pub fn explain(&self, id: RequestId) -> Result<Explain, CoreError> {
        let live = self.table.find(id).map(|slot| self.table.get(slot).explain);
        live.or_else(|| self.archive.get(id)).ok_or(CoreError::UnknownRequest(id.0))
    }

    /// Drops the explanation of a finished request.
    pub fn forget(&mut self, id: RequestId) -> bool {
        self.archive.forget(id)
    }

    /// Whether any request is live.
    pub fn has_work(&self) -> bool {
        !self.table.queue.is_empty() || !self.table.running.is_empty()
    }

    /// Steps in flight, oldest first.
    pub fn in_flight(&self) -> impl Iterator<Item = Step> {
        self.flights.iter().map(|f| f.step)
    }

    /// What [`Core::plan`] writes, and where.
    pub fn plan_schema(&self) -> &Schema {
        &self.schema
    }

    /// Evicts up to `n` saved states. Returns how many went.
    pub fn evict_snapshots(&mut self, n: u32) -> u32 {
        self.cache.evict_snapshots(n)
    }

    /// Evicts up to `n` blocks of history that nobody uses. Returns how many went.
    pub fn evict_history(&mut self, n: u32) -> u32 {
        self.cache.evict_history(n)
    }

    /// Evicts all prefixes that nobody uses. Returns the pages that became free.
    pub fn clear_prefix(&mut self) -> u32 {
        self.cache.clear()
    }

    /// Keeps the known whole blocks of `tokens` and the saved states on them until [`Core::unpin`]. Pins yield, the oldest
    /// first, when a request that was taken does not fit beside them even alone.
    pub fn pin(&mut self, salt: &[u8], tokens: &[u32]) -> PinId {
        let pin = self.cache.pin(salt, tokens).0;
        self.pins.push_back(pin);
        pin
    }

    /// Ends a pin. False when there is none of that name.
    pub fn unpin(&mut self, pin: PinId) -> bool {
        self.pins.retain(|&p| p != pin);
        self.cache.unpin(pin)
    }

    /// Ends the oldest pin, because a request that `submit` has taken fits no other way. False when there is none.
    pub(crate) fn break_pin(&mut self) -> bool {
        let Some(pin) = self.pins.pop_front() else { return false };
        self.counters.pins_broken += 1;
        self.cache.unpin(pin)
    }

    /// A session is over: what only it used goes first when memory is short. False when nothing of it is cached.
    pub fn end_session(&mut self, session: u64) -> bool {
        self.cache.end_session(session)
    }

    pub(crate) fn wrong_step(&self, step: u64, action: &'static str) -> CoreError {
        CoreError::WrongStep { step, action, in_flight: self.in_flight().map(|s| s.0).collect() }
    }

    /// The time that it was told last, in microseconds.
    pub fn time(&self) -> u64 {
        self.now_us
    }

    /// Limits and policies.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The time now, in microseconds from any origin. Going backwards is ignored.
    pub fn set_time(&mut self, now_us: u64) {
        self.now_us = self.now_us.max(now_us);
        self.cache.set_time(now_us);
    }

    /// A step took `us` microseconds on the device: the cost model learns from it. What cannot be is ignored.
    pub fn observe(&mut self, step: Step, us: f64) {
        self.model.observe(step, us);
    }
}

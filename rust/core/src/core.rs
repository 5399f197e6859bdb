//! The core: everything that the engine calls.
//!
//! ```text
//!   submit · abort · stop          plan ─▶ arrays ─▶ device ─▶ commit | rollback          events · explain · stats
//! ```
//!
//! One thread owns it. With two steps in flight, `plan` of the second comes before `commit` of the first; an input token
//! that the first one samples is then written as a placeholder, and results of requests that ended meanwhile are ignored.

use std::cmp::Reverse;
use std::collections::{HashSet, VecDeque};

use crate::cache::{CacheOptions, Eviction, KvCache};
use crate::cost::CostModel;
use crate::error::{CoreError, Malformed};
use crate::event::{Event, Events};
use crate::explain::{Archive, Explain, Reason};
use crate::ids::{PageId, PinId, RequestId, Step};
use crate::layout::LayoutSpec;
use crate::plan::PlanShape;
use crate::policy::SnapshotPolicy;
use crate::request::{Finish, Hint, Phase, Request, Submit};
use crate::sched::admit::Blocked;
use crate::sched::flight::Flight;
use crate::sched::slabs::Slabs;
use crate::sched::table::{Slot, Table};
use crate::stats::{Counters, Stats};

/// Limits and policies.
#[derive(Clone, Debug)]
pub struct Options {
    /// Pages of the pool.
    pub pages: u32,
    /// Live-state slabs: requests that can run at once.
    pub slabs: u32,
    /// Tokens of a step.
    pub max_step_tokens: u32,
    /// Longest prompt plus output.
    pub max_len: u32,
    /// Requests that may wait.
    pub max_waiting: usize,
    /// Where state is saved for reuse.
    pub snapshots: SnapshotPolicy,
    /// Largest share of the pool that snapshots may fill while memory is short, 0 to 1.
    pub snapshot_budget: f64,
    /// Which cached page goes first.
    pub eviction: Eviction,
    /// Off: no prefix is reused.
    pub prefix_cache: bool,
    /// Steps that may be planned and not yet committed: 1 or 2.
    pub max_in_flight: u32,
    /// What starting points cost.
    pub cost: CostModel,
    /// Tokens of a replay; `None`: as many as the layout needs to be exact.
    pub replay_tokens: Option<u32>,
    /// Time that a step may take by the cost model; `None`: only `max_step_tokens` bounds it.
    pub step_us: Option<f64>,
    /// Tenants with a share or a quota of their own; others have weight 1 and no quota.
    pub tenants: Vec<Tenant>,
}

/// A tenant's share of the device.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Tenant {
    /// As in [`Submit::tenant`].
    pub id: u32,
    /// Its share of prefill tokens relative to others, above 0.
    pub weight: f64,
    /// Cached pages that it keeps at most while others need memory; `None`: no limit.
    pub quota_pages: Option<u32>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            pages: 1,
            slabs: 1,
            max_step_tokens: 2048,
            max_len: 1 << 20,
            max_waiting: 1024,
            snapshots: SnapshotPolicy::Auto,
            snapshot_budget: 0.1,
            eviction: Eviction::Value,
            prefix_cache: true,
            max_in_flight: 1,
            cost: CostModel::default(),
            replay_tokens: None,
            step_us: None,
            tenants: Vec::new(),
        }
    }
}

/// The scheduler with its cache.
#[derive(Debug)]
pub struct Core {
    pub(crate) options: Options,
    pub(crate) shape: PlanShape,
    pub(crate) replay_tokens: u32,
    block: u32,
    pub(crate) cache: KvCache,
    pub(crate) slabs: Slabs,
    pub(crate) table: Table,
    pub(crate) flights: VecDeque<Flight>,
    pub(crate) spare_flights: Vec<Flight>,
    pub(crate) prefilling: Vec<Slot>,
    pub(crate) events: Events,
    pub(crate) archive: Archive,
    pub(crate) counters: Counters,
    /// The last step planned.
    pub(crate) last: Step,
    /// All steps up to this one are over.
    pub(crate) done: Step,
    /// Pages are on their way back, at the latest when this step is over.
    pub(crate) coming: Step,
    /// A request had to give way in the plan being made.
    pub(crate) gave_way: bool,
    /// Why the first in line was not admitted.
    pub(crate) blocked: Option<Blocked>,
    pub(crate) epochs: u64,
    arrivals: u64,
}

impl Core {
    /// An idle core. Refuses options that cannot work.
    pub fn new(layout: &LayoutSpec, options: Options) -> Result<Self, CoreError> {
        let limits = [
            ("pages", options.pages, i32::MAX as u32),
            ("slabs", options.slabs, 1 << 20),
            ("max_step_tokens", options.max_step_tokens, i32::MAX as u32),
            ("max_len", options.max_len, i32::MAX as u32),
        ];
        if let Some((name, value, most)) = limits.into_iter().find(|&(_, v, most)| v == 0 || v > most) {
            return Err(CoreError::config(name, value, format!("it must be 1 to {most}")));
        }
        if !(1..=2).contains(&options.max_in_flight) {
            return Err(CoreError::config("max_in_flight", options.max_in_flight, "it must be 1 or 2"));
        }
        options.cost.validate()?;
        if !(0.0..=1.0).contains(&options.snapshot_budget) {
            let budget = options.snapshot_budget;
            return Err(CoreError::config("snapshot_budget", budget, "it must be a share from 0 to 1"));
        }
        let cache_options = CacheOptions {
            pages: options.pages,
            eviction: options.eviction,
            prefix_cache: options.prefix_cache,
            snapshot_budget: options.snapshot_budget,
            quotas: options.tenants.iter().filter_map(|t| t.quota_pages.map(|q| (t.id, q))).collect(),
            cost: options.cost,
            admit_by_value: options.snapshots == SnapshotPolicy::Auto,
            replay_tokens: options.replay_tokens.unwrap_or(layout.replay_tokens()),
        };
        let shape = PlanShape {
            rows: options.slabs as usize,
            tokens: options.max_step_tokens as usize,
            deltas: (options.max_len.div_ceil(layout.block_tokens) + 4 * options.slabs) as usize,
            snapshot_pages: layout.snapshot_pages() as usize,
        };
        Ok(Core {
            shape,
            replay_tokens: options.replay_tokens.unwrap_or(layout.replay_tokens()),
            block: layout.block_tokens,
            cache: KvCache::new(layout, &cache_options)?,
            slabs: Slabs::new(options.slabs),
            table: Table::default(),
            flights: VecDeque::new(),
            spare_flights: Vec::new(),
            prefilling: Vec::new(),
            events: Events::default(),
            archive: Archive::default(),
            counters: Counters::default(),
            last: Step(0),
            done: Step(0),
            coming: Step(0),
            gave_way: false,
            blocked: None,
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
        (self.shape.snapshot_pages + self.table.running.len()) as u32
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
        if self.table.waiting.len() >= self.options.max_waiting {
            let (waiting, limit) = (self.table.waiting.len(), self.options.max_waiting);
            return Err(CoreError::Overloaded { waiting, limit });
        }
        self.arrivals += 1;
        let prompt = submit.prompt.len() as u32;
        self.archive.forget(id);
        self.table.insert(Request {
            id,
            prompt,
            tokens: submit.prompt,
            max_new,
            stop_ids: submit.stop_ids.into(),
            salt: submit.salt.into(),
            rank: (Reverse(submit.priority), self.arrivals),
            all_logits: submit.all_logits,
            hint: Hint { tenant: submit.tenant, retention: submit.retention },
            phase: Phase::Waiting,
            run: None,
            computed_before: 0,
            explain: Explain { prompt_tokens: prompt, ..Explain::default() },
        });
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
        !self.table.waiting.is_empty() || !self.table.running.is_empty()
    }

    /// Steps in flight, oldest first.
    pub fn in_flight(&self) -> impl Iterator<Item = Step> {
        self.flights.iter().map(|f| f.step)
    }

    /// Least lengths of the plan's arrays.
    pub fn shape(&self) -> PlanShape {
        self.shape
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

    /// Keeps the known whole blocks of `tokens` and the saved states on them until [`Core::unpin`].
    pub fn pin(&mut self, salt: &[u8], tokens: &[u32]) -> Result<PinId, CoreError> {
        Ok(self.cache.pin(salt, tokens).0)
    }

    /// Ends a pin. False when there is none of that name.
    pub fn unpin(&mut self, pin: PinId) -> bool {
        self.cache.unpin(pin)
    }

    /// A session is over: what only it used goes first when memory is short. False when nothing of it is cached.
    pub fn end_session(&mut self, session: u64) -> bool {
        self.cache.end_session(session)
    }

    pub(crate) fn wrong_step(&self, step: u64, action: &'static str) -> CoreError {
        CoreError::WrongStep { step, action, in_flight: self.in_flight().map(|s| s.0).collect() }
    }

    /// Gauges and counters by name.
    pub fn stats(&self) -> Stats {
        let (c, k) = (&self.counters, self.cache.counters());
        let snapshot_pages = u64::from(self.cache.snapshots()) * self.shape.snapshot_pages as u64;
        let named = [
            ("pages", self.cache.pages().into()),
            ("free_pages", self.cache.free_pages().into()),
            ("available_pages", self.cache.available().into()),
            ("cached_pages", self.cache.cached_blocks().into()),
            ("snapshot_pages", snapshot_pages),
            ("deferred_pages", self.cache.leaving_pages().into()),
            ("slabs", self.slabs.total().into()),
            ("free_slabs", self.slabs.free().into()),
            ("waiting", self.table.waiting.len() as u64),
            ("running", self.table.running.len() as u64),
            ("in_flight", self.flights.len() as u64),
            ("snapshots", self.cache.snapshots().into()),
            ("snapshots_taken", k.snapshots_taken),
            ("snapshots_used", k.snapshots_used),
            ("snapshots_evicted", k.snapshots_evicted),
            ("evicted_blocks", k.evicted_blocks),
            ("adopted_blocks", k.adopted_blocks),
            ("prefix_queries", c.prefix_queries),
            ("prompt_tokens", c.prompt_tokens),
            ("matched_tokens", c.matched_tokens),
            ("resumed_tokens", c.resumed_tokens),
            ("replayed_tokens", c.replayed_tokens),
            ("recomputed_tokens", c.recomputed_tokens),
            ("preemptions", c.preemptions),
            ("rollbacks", c.rollbacks),
            ("steps", c.steps),
            ("aborts", c.aborts),
            ("finished", c.finished),
        ];
        let lost = Reason::ALL.into_iter().zip(c.lost).skip(1);
        let lost = lost.map(|(reason, tokens)| (format!("lost_{}", reason.name()), tokens));
        named.into_iter().map(|(name, value)| (name.to_owned(), value)).chain(lost).collect()
    }

    /// Recomputes every invariant from scratch.
    pub fn check(&self) -> Result<(), Malformed> {
        let runs = || self.table.iter_running().filter_map(|r| r.run.as_ref());
        let saving = self.flights.iter().flat_map(|f| &f.saves).map(|s| &s.pages);
        let held = saving.chain(runs().filter_map(|r| r.spare.as_ref()).map(|(_, pages)| pages));
        self.cache.check(runs().map(|r| &r.seq), held)?;
        self.slabs.check(runs().map(|r| r.slab))?;
        let ranks: Vec<_> = self.table.iter_running().map(|r| r.rank).collect();
        Malformed::unless(ranks.is_sorted(), "running order", || format!("{ranks:?}"))?;
        for request in self.table.iter() {
            self.check_request(request)?;
        }
        let mut writers: HashSet<PageId> = HashSet::new();
        for run in runs() {
            for &page in &run.seq.pages()[run.seq.published_blocks() as usize..] {
                Malformed::unless(writers.insert(page), "one writer per page", || {
                    format!("{page:?} has two")
                })?;
            }
        }
        for run in runs() {
            let shared = &run.seq.pages()[..run.seq.published_blocks() as usize];
            let written = shared.iter().find(|p| writers.contains(p));
            Malformed::unless(written.is_none(), "shared pages are not written", || format!("{written:?}"))?;
        }
        Ok(())
    }

    fn check_request(&self, r: &Request) -> Result<(), Malformed> {
        let run = r.run.as_ref();
        let says = |what, holds| {
            Malformed::unless(holds, what, || {
                let (planned, computed, unknown) =
                    run.map_or((0, 0, 0), |x| (x.planned, x.computed, x.unknown));
                let (id, state, known, prompt) = (r.id.0, r.phase.name(), r.known(), r.prompt);
                format!(
                    "request {id} {state}: {prompt} of {known} tokens are its prompt, {planned} planned, {computed} computed, {unknown} unknown"
                )
            })
        };
        let waiting = self.table.waiting.contains_key(&r.rank);
        says(
            "waiting requests hold nothing",
            waiting == (r.phase == Phase::Waiting) && waiting == r.run.is_none(),
        )?;
        let Some(run) = run else { return Ok(()) };
        let covered = run.seq.pages().len() as u32 * self.block;
        says("pages cover what is planned", run.planned <= covered && run.computed <= run.planned)?;
        says("output within its limit", r.outputs() + run.unknown <= r.max_new)?;
        match r.phase {
            Phase::Prefill => says("prefill has tokens to plan", run.planned < r.known() && run.unknown == 0),
            _ => says(
                "decode is at the newest token",
                run.planned + 1 == r.known() + run.unknown.max(u32::from(r.max_new == 0)),
            ),
        }
    }
}

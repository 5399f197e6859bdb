//! The core: everything that the engine calls.
//!
//! ```text
//!   submit · abort · stop          plan ─▶ buffer ─▶ device ─▶ commit | rollback          events · explain · stats
//! ```
//!
//! It holds four owners, each of which alone changes what it has, and hands what is asked for to them:
//!
//! | owner | has |
//! | --- | --- |
//! | [`Requests`] | live requests, the queue, tenants' shares |
//! | [`Memory`] | the cache, slabs, pins, what waits behind a fence |
//! | [`Pace`] | the clock, the cost model of steps |
//! | [`Flights`] | steps in flight |
//!
//! What touches several is in `sched`: the planner (`planner/`) and what follows from a step (`commit.rs`, `ends.rs`). They tell
//! of it in the [`Journal`], which decides nothing.
//!
//! One thread owns a core. With two steps in flight, `plan` of the second comes before `commit` of the first; an input token
//! that the first one samples is then written as a placeholder, and results of requests that ended meanwhile are ignored.

use crate::cache::Change;
use crate::error::{CoreError, Malformed};
use crate::event::Event;
use crate::ids::{PinId, RequestId, Step};
use crate::layout::LayoutSpec;
pub use crate::options::{Options, Tenant};
use crate::plan::{Limits, Schema, StepHeader};
use crate::sched::explain::Explain;
use crate::sched::flights::Flights;
use crate::sched::journal::Journal;
use crate::sched::memory::Memory;
use crate::sched::pace::Pace;
use crate::sched::planner::Planner;
use crate::sched::request::{Finish, Forked, Submit};
use crate::sched::requests::Requests;
use crate::sched::requests::shares::Share;
use crate::sched::{check, commit, ends};
use crate::stats::{Stats, stats_of};
use crate::{dump, dump::Live};

/// The scheduler with its cache.
#[derive(Debug)]
pub struct Core {
    pub(crate) options: Options,
    pub(crate) schema: Schema,
    /// Tokens that a replay runs again.
    pub(crate) replay_tokens: u32,
    pub(crate) requests: Requests,
    pub(crate) memory: Memory,
    pub(crate) pace: Pace,
    pub(crate) flights: Flights,
    pub(crate) journal: Journal,
}

impl Core {
    /// An idle core. Refuses options that cannot work.
    pub fn new(layout: &LayoutSpec, options: Options) -> Result<Self, CoreError> {
        options.validate()?;
        let replay_tokens = options.replay_tokens.unwrap_or(layout.replay_tokens());
        Ok(Core {
            schema: Schema::new(Limits::new(layout, &options)),
            replay_tokens,
            requests: Requests::new(&options.tenants),
            memory: Memory::new(layout, &options, replay_tokens)?,
            pace: Pace::new(&options),
            flights: Flights::new(options.max_in_flight),
            journal: Journal::default(),
            options,
        })
    }

    /// An empty list with room for a prompt, in memory of one that has ended where that fits.
    pub fn room_for_prompt(&mut self, tokens: usize) -> Vec<u32> {
        self.requests.spare.take(tokens)
    }

    /// Queues a request. Refuses what could never run, and everything while the queue is full.
    pub fn submit(&mut self, submit: Submit) -> Result<(), CoreError> {
        let id = submit.id;
        if submit.prompt.is_empty() {
            return Err(CoreError::EmptyPrompt(id.0));
        }
        if self.requests.find(id).is_some() {
            return Err(CoreError::Duplicate(id.0));
        }
        let max_new = self.room_for_output(&submit)?;
        let (waiting, limit) = (self.requests.waiting_count(), self.options.max_waiting);
        if waiting >= limit {
            return Err(CoreError::Overloaded { waiting, limit });
        }
        self.journal.forget(id);
        // Alone in the queue its place does not matter.
        let contended = waiting > 0 || submit.deadline_us.is_some();
        let slot = self.requests.insert(submit, max_new, self.pace.now());
        if contended {
            self.requests.take_place(slot, &self.memory, &self.pace);
        }
        Ok(())
    }

    /// Tokens that the request may sample. The last one of them is never computed, so it takes no page.
    fn room_for_output(&self, submit: &Submit) -> Result<u32, CoreError> {
        let (prompt, limit) = (submit.prompt.len() as u64, self.options.max_len);
        let (pages, block) = (self.memory.cache().pages(), u64::from(self.memory.block()));
        let held = u64::from(pages) * block;
        let wanted = match submit.max_new {
            Some(n) => u64::from(n),
            None => u64::from(limit).saturating_sub(prompt).min((held + 1).saturating_sub(prompt)).max(1),
        };
        if prompt + wanted > u64::from(limit) {
            return Err(CoreError::TooLong { tokens: prompt + wanted, limit });
        }
        let computed = prompt + wanted.saturating_sub(1);
        if computed > held {
            let needed = computed.div_ceil(block) as u32;
            return Err(CoreError::NeverFits { needed, pages, tokens: held });
        }
        Ok(wanted as u32)
    }

    /// Submits `child` so that it starts from the state of `parent`, which goes on. An empty prompt means all that is known
    /// of the parent. The outcome is that of a request of its own; only work is saved.
    ///
    /// Fails as [`Core::submit`] does, and when the parent is not live.
    pub fn fork(&mut self, parent: RequestId, mut child: Submit) -> Result<(), CoreError> {
        let slot = self.requests.find(parent).ok_or(CoreError::UnknownRequest(parent.0))?;
        let of = self.requests.get_mut(slot);
        let tokens = of.tokens.all();
        if child.prompt.is_empty() {
            child.prompt = tokens.to_vec();
        }
        let shared = tokens.iter().zip(&child.prompt).take_while(|(a, b)| a == b).count();
        let shared = (shared as u32).min(child.prompt.len() as u32 - 1);
        let fits = shared > 0
            && self.options.prefix_cache
            && child.salt[..] == of.salt[..]
            && !child.all_logits
            && child.priority <= of.place.priority;
        let (id, arrival) = (child.id, of.place.arrival);
        self.submit(child)?;
        if fits && let Some(slot) = self.requests.find(id) {
            self.requests.fork(slot, Forked { parent, arrival, shared });
        }
        Ok(())
    }

    /// Ends a request in any stage, at once. False when there is no such live request.
    pub fn abort(&mut self, id: RequestId) -> Result<bool, CoreError> {
        self.end(id, Finish::Abort)
    }

    /// Ends a request as if its last token had been a stop token: the caller saw a stop string.
    pub fn stop(&mut self, id: RequestId) -> Result<bool, CoreError> {
        self.end(id, Finish::Stop)
    }

    fn end(&mut self, id: RequestId, reason: Finish) -> Result<bool, CoreError> {
        match self.requests.find(id) {
            Some(slot) => ends::finish(self, slot, reason, None).map(|()| true),
            None => Ok(false),
        }
    }

    /// What [`Core::plan`] writes, and where.
    pub fn plan_schema(&self) -> &Schema {
        &self.schema
    }

    /// Writes the next step into `out`. `None`: nothing can run now (finish the steps in flight, or submit something). A step
    /// may have no rows and only copy states.
    ///
    /// Fails when `out` is shorter than [`Core::plan_schema`] says, or when as many steps are in flight as allowed.
    pub fn plan(&mut self, out: &mut [i32]) -> Result<Option<StepHeader>, CoreError> {
        Planner::new(self, out)?.make()
    }

    /// The result of the oldest step in flight: what its rows sampled, one after the other, and for each row that samples
    /// how many of its tokens are accepted, from the first on. Of a row with none accepted nothing counts: its request waits
    /// again and resumes with the tokens that it had. Rows whose request is gone are ignored.
    ///
    /// Fails, and changes nothing, for another step, another number of tokens or counts, and a count that is negative or
    /// above what the row sampled.
    pub fn commit(&mut self, step: Step, tokens: &[u32], accepted: &[i32]) -> Result<(), CoreError> {
        commit::commit(self, step, tokens, accepted)
    }

    /// A step could not be run: it and later ones never happened. Their requests lose their state and wait in their place
    /// in line; what was committed before stays.
    pub fn rollback(&mut self, step: Step) -> Result<(), CoreError> {
        commit::rollback(self, step)
    }

    /// Steps in flight, oldest first.
    pub fn in_flight(&self) -> impl Iterator<Item = Step> {
        self.flights.iter().map(|f| f.step)
    }

    /// Whether any request is live.
    pub fn has_work(&self) -> bool {
        !self.requests.is_empty()
    }

    /// Live requests in the order in which they came.
    pub fn live(&self) -> Vec<Live> {
        self.requests.by_arrival().into_iter().map(Live::of).collect()
    }

    /// The oldest event that nobody has fetched.
    pub fn next_event(&mut self) -> Option<Event> {
        self.journal.next_event()
    }

    /// Fills `out` with events, six integers each, and returns how many.
    pub fn events_into(&mut self, out: &mut [i64]) -> usize {
        self.journal.events_into(out)
    }

    /// What of a request's prompt was reused, while it lives and for a while after.
    pub fn explain(&self, id: RequestId) -> Result<Explain, CoreError> {
        let live = self.requests.find(id).map(|slot| self.requests.get(slot).explain);
        live.or_else(|| self.journal.explain(id)).ok_or(CoreError::UnknownRequest(id.0))
    }

    /// Drops the explanation of a finished request.
    pub fn forget(&mut self, id: RequestId) -> bool {
        self.journal.forget(id)
    }

    /// Evicts up to `n` saved states. Returns how many went.
    pub fn evict_snapshots(&mut self, n: u32) -> u32 {
        self.memory.evict_snapshots(n)
    }

    /// Evicts up to `n` blocks of history that nobody uses. Returns how many went.
    pub fn evict_history(&mut self, n: u32) -> u32 {
        self.memory.evict_history(n)
    }

    /// Evicts all prefixes that nobody uses. Returns the pages that became free.
    pub fn clear_prefix(&mut self) -> u32 {
        self.memory.clear()
    }

    /// What entered and left the prefix tree since the last call, in order; nothing unless `cache_changes` is on.
    pub fn cache_changes(&mut self) -> Vec<Change> {
        self.memory.cache_changes()
    }

    /// [`Core::cache_changes`], and then all that is in the prefix tree, predecessors first, for whoever starts anew: later
    /// changes go on from there.
    pub fn cache_picture(&mut self) -> (Vec<Change>, Vec<Change>) {
        (self.memory.cache_changes(), self.memory.cache_picture())
    }

    /// Keeps the known whole blocks of `tokens` and the saved states on them until [`Core::unpin`]. Pins yield, the oldest
    /// first, when a request that was taken does not fit beside them even alone.
    pub fn pin(&mut self, salt: &[u8], tokens: &[u32]) -> PinId {
        self.memory.pin(salt, tokens)
    }

    /// Ends a pin. False when there is none of that name.
    pub fn unpin(&mut self, pin: PinId) -> bool {
        self.memory.unpin(pin)
    }

    /// A session is over: what only it used goes first when memory is short. False when nothing of it is cached.
    pub fn end_session(&mut self, session: u64) -> bool {
        self.memory.end_session(session)
    }

    /// The time that it was told last, in microseconds.
    pub fn time(&self) -> u64 {
        self.pace.now()
    }

    /// The time now, in microseconds from any origin. Going backwards is ignored.
    pub fn set_time(&mut self, now_us: u64) {
        self.pace.set_time(now_us);
        self.memory.set_time(now_us);
    }

    /// A step took `us` microseconds on the device: the cost model learns from it. What cannot be is ignored.
    pub fn observe(&mut self, step: Step, us: f64) {
        self.pace.observe(step, us);
    }

    /// Limits and policies.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Gauges and counters by name.
    pub fn stats(&self) -> Stats {
        stats_of(self)
    }

    /// What each tenant was served, in order of ids. Tenants without live requests are forgotten after a while.
    pub fn tenants(&self) -> Vec<(u32, Share)> {
        self.requests.tenants()
    }

    /// Recomputes every invariant from scratch.
    pub fn check(&self) -> Result<(), Malformed> {
        check::check(self)
    }

    /// All that is needed to go on elsewhere, as JSON.
    pub fn dump(&self) -> String {
        dump::dump(self)
    }

    /// A core that goes on from a dump. Refuses what is not one, and one of another layout.
    pub fn load(layout: &LayoutSpec, text: &str) -> Result<Core, CoreError> {
        dump::load(layout, text)
    }
}

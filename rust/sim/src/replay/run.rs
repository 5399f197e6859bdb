//! The run: requests arrive, the core plans, time passes, the core commits.
//!
//! - A request arrives at its time, but not before the request before it in its session has ended; with a `delay` it
//!   arrives that long after that end, whatever its time says. Its times count from its arrival.
//! - While as many wait as `max_waiting` says, further ones wait outside.
//! - **Sequential** runs take one request at a time, in order, and no time passes; outputs of which the trace says nothing
//!   are left out.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::sync::Arc;

use dsv4_core::error::{CoreError, Malformed};
use dsv4_core::event::{Event, What};
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::LayoutSpec;
use dsv4_core::plan::{Field, Plan, StepHeader};
use dsv4_core::sched::request::{Retention, Submit};
use dsv4_core::{Core, Options};

use crate::fake::mix;
use crate::replay::best::Blocks;
use crate::replay::clock::StepModel;
use crate::replay::report::{self, Hits, Pool, Quantiles, Report, Snapshots, Stateless, Timeline, Tokens};
use crate::replay::trace::Trace;

/// What a replay is made of besides its trace.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Of the core. `max_waiting` bounds what is submitted at a time; `cost` is used as it is.
    pub options: Options,
    /// Time of steps; `None`: a sequential run.
    pub model: Option<StepModel>,
}

/// How far a replay is.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub struct Progress {
    /// Requests over, refused ones included.
    pub done: u64,
    /// Requests in all.
    pub total: u64,
    /// Virtual time in s.
    pub virtual_s: f64,
    /// Steps so far.
    pub steps: u64,
}

/// A live request's times.
#[derive(Clone, Copy, Debug)]
struct Live {
    came_us: f64,
    last_token_us: Option<f64>,
    admitted: bool,
}

/// What is counted for a tenant.
#[derive(Clone, Debug, Default)]
struct Account {
    live: u32,
    requests: u64,
    served: u64,
    prompt: u64,
    cached: u64,
    contended: u64,
    contended_us: f64,
    ttft_ms: Vec<f32>,
}

/// A replay in progress.
#[derive(Debug)]
pub struct Replay {
    trace: Arc<Trace>,
    settings: Settings,
    pool: Pool,
    core: Core,
    plan: Plan,
    samples: Vec<u32>,
    accepted: Vec<i32>,
    now_us: f64,
    /// Requests whose arrival is known: time (the bits of a number that is not negative keep its order) and index.
    due: BinaryHeap<Reverse<(u64, u32)>>,
    /// The next request of the same session.
    followers: HashMap<u32, u32>,
    /// Arrived and not submitted, with the time at which they came.
    outside: VecDeque<(u32, f64)>,
    /// Places in the trace of requests that are not named by them.
    names: HashMap<u64, u32>,
    live: HashMap<u64, Live>,
    waiting: usize,
    /// Admissions in order, with whether each is its request's first.
    order: Vec<(u32, bool)>,
    accounts: Vec<Account>,
    itl_ms: Vec<f32>,
    report: Report,
    hash: u64,
    next_moment: f64,
    moment_every: f64,
}

type Arrivals = (BinaryHeap<Reverse<(u64, u32)>>, HashMap<u32, u32>);

/// Who comes at a known time, and who follows whom.
fn arrivals(trace: &Trace, sequential: bool) -> Arrivals {
    let (mut due, mut followers, mut last) = (BinaryHeap::new(), HashMap::new(), HashMap::new());
    for (index, r) in (0u32..).zip(trace.requests()) {
        let before = r.session.filter(|_| !sequential).and_then(|session| last.insert(session, index));
        match before {
            Some(before) => drop(followers.insert(before, index)),
            None => due.push(Reverse((r.at_us.to_bits(), index))),
        }
    }
    (due, followers)
}

impl Replay {
    /// A replay at its start. Refuses options that cannot work.
    pub fn new(trace: Arc<Trace>, layout: &LayoutSpec, settings: Settings) -> Result<Self, CoreError> {
        let mut options = settings.options.clone();
        options.max_waiting = usize::MAX;
        let core = Core::new(layout, options)?;
        Ok(Self::of(core, trace, layout, settings))
    }

    /// Goes on from a core's dump: its live requests run on as the dump's own options say, with answers as long as they
    /// may be. Refuses a dump of another layout.
    pub fn resume(text: &str, layout: &LayoutSpec, model: StepModel) -> Result<Self, CoreError> {
        let core = Core::load(layout, text)?;
        let live = core.live();
        let requests = live.iter().map(|r| (r.prompt, r.max_new, r.tenant, r.priority));
        let trace = Arc::new(Trace::of_live(core.time() as f64, requests));
        let settings = Settings { options: core.options().clone(), model: Some(model) };
        let mut replay = Self::of(core, trace, layout, settings);
        replay.due.clear();
        for (index, r) in (0u32..).zip(&live) {
            let last_token_us = (r.outputs > 0).then_some(replay.now_us);
            let came_us = replay.now_us;
            replay.live.insert(r.id.0, Live { came_us, last_token_us, admitted: false });
            replay.names.insert(r.id.0, index);
            replay.accounts[r.tenant as usize].live += 1;
        }
        replay.waiting = live.len();
        Ok(replay)
    }

    /// The trace of the replay; of a resumed one, its live requests.
    pub fn trace(&self) -> &Arc<Trace> {
        &self.trace
    }

    /// The place in the trace of a request of the core.
    fn index(&self, id: u64) -> u32 {
        self.names.get(&id).copied().unwrap_or(id as u32)
    }

    fn of(core: Core, trace: Arc<Trace>, layout: &LayoutSpec, settings: Settings) -> Self {
        let pool = Pool {
            pages: settings.options.pages.into(),
            page_bytes: layout.page_bytes().into(),
            block_tokens: layout.block_tokens.into(),
            snapshot_pages: layout.snapshot_pages().into(),
        };
        let (due, followers) = arrivals(&trace, settings.model.is_none());
        let span = trace.seconds() * 1e6;
        let moments = Timeline::MOST as f64 / 2.0;
        let moment_every = if settings.model.is_some() {
            (span / moments).max(1.0)
        } else {
            (trace.requests().len() as f64 / moments).ceil()
        };
        let mut replay = Replay {
            plan: Plan::new(core.plan_schema()),
            samples: Vec::new(),
            accepted: Vec::new(),
            now_us: trace.requests().first().map_or(0.0, |r| r.at_us),
            due,
            followers,
            outside: VecDeque::new(),
            names: HashMap::new(),
            live: HashMap::new(),
            waiting: 0,
            order: Vec::with_capacity(trace.requests().len()),
            accounts: vec![Account::default(); trace.tenants().len()],
            itl_ms: Vec::new(),
            report: Report { requests: trace.requests().len() as u64, ..Report::default() },
            hash: 0,
            next_moment: 0.0,
            moment_every,
            trace,
            settings,
            pool,
            core,
        };
        replay.sample_moment();
        replay
    }

    /// Up to `steps` further steps. Returns how far it is; it is over when `done` is `total`.
    pub fn run(&mut self, steps: u64) -> Result<Progress, CoreError> {
        for _ in 0..steps {
            if !self.step()? {
                break;
            }
        }
        Ok(self.progress())
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        let done = self.report.finished + self.report.refused;
        let virtual_s = if self.settings.model.is_some() { self.elapsed_s() } else { 0.0 };
        Progress { done, total: self.report.requests, virtual_s, steps: self.report.steps }
    }

    /// The core's own check of all its invariants.
    pub fn check(&self) -> Result<(), Malformed> {
        self.core.check()
    }

    fn elapsed_s(&self) -> f64 {
        (self.now_us - self.trace.requests().first().map_or(0.0, |r| r.at_us)) / 1e6
    }

    /// One step of the core, or a jump to the next arrival. False: all is over.
    fn step(&mut self) -> Result<bool, CoreError> {
        self.arrive();
        // Before requests come in, so that their waiting counts from now.
        self.core.set_time(self.now_us as u64);
        self.submit_outside()?;
        if let Some(header) = self.core.plan(self.plan.words())? {
            let us = self.pass(&header);
            self.draw(&header);
            self.core.commit(Step(header.step), &self.samples, &self.accepted)?;
            if self.settings.model.is_some() {
                self.core.observe(Step(header.step), us);
            }
            self.report.steps += 1;
            self.hear();
        } else {
            assert!(!self.core.has_work(), "the core has work and plans nothing");
            self.hear();
            match self.due.peek() {
                Some(&Reverse((at, _))) => self.now_us = self.now_us.max(f64::from_bits(at)),
                None => return Ok(!self.outside.is_empty()),
            }
        }
        self.sample_moment();
        Ok(true)
    }

    /// Lets requests arrive whose time has come: in a sequential run the next one when nothing runs.
    fn arrive(&mut self) {
        let sequential = self.settings.model.is_none();
        while let Some(&Reverse((at, index))) = self.due.peek() {
            let at_us = f64::from_bits(at);
            let comes = if sequential {
                self.live.is_empty() && self.outside.is_empty()
            } else {
                at_us <= self.now_us
            };
            if !comes {
                break;
            }
            if sequential {
                self.now_us = at_us;
            }
            self.due.pop();
            self.accounts[self.trace.requests()[index as usize].tenant as usize].live += 1;
            self.outside.push_back((index, at_us));
        }
    }

    fn submit_outside(&mut self) -> Result<(), CoreError> {
        while self.waiting < self.settings.options.max_waiting
            && let Some((index, came_us)) = self.outside.pop_front()
        {
            let r = &self.trace.requests()[index as usize];
            let leave_out = self.settings.model.is_none() && !self.trace.output_known(r);
            let submit = Submit {
                id: RequestId(index.into()),
                prompt: self.trace.prompt(r),
                max_new: Some(if leave_out { 0 } else { r.output }),
                priority: r.priority,
                tenant: r.tenant,
                retention: Retention { session: r.session, ..Retention::default() },
                ..Submit::default()
            };
            match self.core.submit(submit) {
                Ok(()) => {
                    self.waiting += 1;
                    self.live.insert(index.into(), Live { came_us, last_token_us: None, admitted: false });
                }
                Err(e @ (CoreError::TooLong { .. } | CoreError::NeverFits { .. })) => {
                    self.report.refused += 1;
                    self.report.first_refusal.get_or_insert_with(|| format!("request {index}: {e}"));
                    self.end(index);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The request is over: the next one of its session may come.
    fn end(&mut self, index: u32) {
        let requests = self.trace.requests();
        self.accounts[requests[index as usize].tenant as usize].live -= 1;
        if let Some(next) = self.followers.remove(&index) {
            let r = &requests[next as usize];
            let at_us = r.delay_us.map_or(self.now_us.max(r.at_us), |delay| self.now_us + delay);
            self.due.push(Reverse((at_us.to_bits(), next)));
        }
    }

    /// Time passes, and tenants are served. Returns the time of the step.
    fn pass(&mut self, header: &StepHeader) -> f64 {
        let model = self.settings.model.as_ref();
        let us = model.map_or(0.0, |m| m.step_us(&self.plan));
        self.now_us += us;
        self.report.busy_s += us / 1e6;
        let contended = self.accounts.iter().filter(|a| a.live > 0).count() > 1;
        if contended {
            self.accounts.iter_mut().filter(|a| a.live > 0).for_each(|a| a.contended_us += us);
        }
        for row in 0..header.rows as usize {
            let index = self.index(self.plan.long(Field::row_req, row)) as usize;
            let len = self.plan[Field::row_len][row] as u64;
            let account = &mut self.accounts[self.trace.requests()[index].tenant as usize];
            account.served += len;
            account.contended += if contended { len } else { 0 };
        }
        self.report.tokens.run += u64::from(header.tokens);
        us
    }

    /// The tokens that the step samples: those that the trace says.
    fn draw(&mut self, header: &StepHeader) {
        let mut samples = std::mem::take(&mut self.samples);
        samples.clear();
        let sampled = (0..header.rows as usize).filter(|&row| self.plan[Field::row_samples][row] > 0);
        samples.extend(sampled.map(|row| {
            let pos = (self.plan[Field::row_start][row] + self.plan[Field::row_len][row]) as u32;
            let index = self.index(self.plan.long(Field::row_req, row));
            self.trace.output_token(&self.trace.requests()[index as usize], pos)
        }));
        self.accepted.resize(samples.len(), 1);
        self.samples = samples;
    }

    fn hear(&mut self) {
        while let Some(event) = self.core.next_event() {
            self.hash = event
                .to_row()
                .into_iter()
                .fold(mix(self.hash, self.now_us.to_bits()), |h, x| mix(h, x as u64));
            self.note(event);
        }
    }

    fn note(&mut self, event: Event) {
        let index = self.index(event.request.0);
        let account = &mut self.accounts[self.trace.requests()[index as usize].tenant as usize];
        let live = self.live.get_mut(&event.request.0).expect("events are of live requests");
        match event.what {
            What::Token { .. } => {
                let since = live.last_token_us.replace(self.now_us);
                let ms = ((self.now_us - since.unwrap_or(live.came_us)) / 1000.0) as f32;
                if since.is_some() { &mut self.itl_ms } else { &mut account.ttft_ms }.push(ms);
                self.report.tokens.output += 1;
            }
            What::Resumed { at, history, replayed } => {
                self.order.push((index, !live.admitted));
                self.waiting -= 1;
                if !std::mem::replace(&mut live.admitted, true) {
                    let (t, cached) = (&mut self.report.tokens, u64::from(at - replayed));
                    let prompt = u64::from(self.trace.requests()[index as usize].input);
                    (t.prompt, t.cached) = (t.prompt + prompt, t.cached + cached);
                    t.whole_blocks += prompt - prompt % self.pool.block_tokens;
                    (t.matched, t.resumed) = (t.matched + u64::from(history), t.resumed + u64::from(at));
                    (account.prompt, account.cached) = (account.prompt + prompt, account.cached + cached);
                }
            }
            What::Preempted { .. } => self.waiting += 1,
            What::Finished { .. } => {
                account.requests += 1;
                self.report.finished += 1;
                self.live.remove(&event.request.0);
                self.core.forget(event.request);
                self.end(index);
            }
            What::Prefill { .. } => {}
        }
    }

    /// Notes how memory is used, if it is time.
    fn sample_moment(&mut self) {
        let at =
            if self.settings.model.is_some() { self.elapsed_s() * 1e6 } else { self.progress().done as f64 };
        if at < self.next_moment {
            return;
        }
        self.next_moment = at + self.moment_every;
        let stats: HashMap<String, u64> = self.core.stats().into_iter().collect();
        let (history, snapshot, free) = (stats["cached_pages"], stats["snapshot_pages"], stats["free_pages"]);
        let live = self.pool.pages.saturating_sub(history + snapshot + free);
        let t = &mut self.report.timeline;
        t.at.push(if self.settings.model.is_some() { at / 1e6 } else { at });
        for (series, pages) in
            [(&mut t.history, history), (&mut t.snapshot, snapshot), (&mut t.live, live), (&mut t.free, free)]
        {
            series.push(pages * self.pool.page_bytes);
        }
        t.prompt.push(self.report.tokens.prompt);
        t.cached.push(self.report.tokens.cached);
        t.running.push(stats["running"]);
        t.waiting.push(stats["waiting"] + self.outside.len() as u64);
        if t.at.len() >= Timeline::MOST {
            t.thin();
            self.moment_every *= 2.0;
        }
    }

    /// What came of it. `blocks` are the trace's in the pool's block size.
    pub fn report(&self, blocks: &Blocks) -> Report {
        let stats: HashMap<String, u64> = self.core.stats().into_iter().collect();
        let sequential = self.settings.model.is_none();
        let mut r = self.report.clone();
        r.virtual_s = self.progress().virtual_s;
        r.event_hash = format!("{:016x}", self.hash);
        r.tokens =
            Tokens { replayed: stats["replayed_tokens"], recomputed: stats["recomputed_tokens"], ..r.tokens };
        let known = self.trace.prompts_known();
        let best = blocks.best(&self.order, self.settings.options.pages);
        let share = |tokens: u64| tokens as f64 / (r.tokens.prompt as f64).max(1.0);
        r.hits = Hits {
            cached: share(r.tokens.cached),
            matched: share(r.tokens.matched),
            resumed: share(r.tokens.resumed),
            without_state: share(r.tokens.matched - r.tokens.cached),
            unlimited: known.then(|| share(best.unlimited * self.pool.block_tokens)),
            best_for_pool: known.then(|| share(best.pool * self.pool.block_tokens)),
        };
        let lost = stats.iter().filter_map(|(name, &n)| Some((name.strip_prefix("lost_")?.to_owned(), n)));
        r.lost = lost.filter(|&(_, n)| n > 0).collect();
        r.lost.sort();
        r.stateless = Stateless {
            prompt_end: stats["stateless_prompt_end"],
            output_end: stats["stateless_output_end"],
            elsewhere: stats["stateless_elsewhere"],
        };
        r.snapshots = self.snapshots(&stats);
        r.pool = self.pool;
        r.itl_ms = Quantiles::of(&mut self.itl_ms.clone());
        let mut ttft: Vec<f32> = self.accounts.iter().flat_map(|a| a.ttft_ms.iter().copied()).collect();
        r.ttft_ms = Quantiles::of(&mut ttft);
        if sequential {
            (r.itl_ms, r.ttft_ms) = (Quantiles::default(), Quantiles::default());
        } else if r.virtual_s > 0.0 {
            r.output_tokens_per_s = r.tokens.output as f64 / r.virtual_s;
        }
        r.preemptions = stats["preemptions"];
        r.evicted_blocks = stats["evicted_blocks"];
        r.tenants = self.tenants();
        let competing = r.tenants.iter().filter(|t| t.contended_s > 0.0);
        r.jain = report::jain(&competing.map(|t| t.rate).collect::<Vec<_>>());
        r
    }

    fn snapshots(&self, stats: &HashMap<String, u64>) -> Snapshots {
        let t = &self.report.timeline;
        let peak = t.snapshot.iter().max().copied().unwrap_or(0);
        let (snapshot, history) = (t.snapshot.iter().sum::<u64>(), t.history.iter().sum::<u64>());
        Snapshots {
            taken: stats["snapshots_taken"],
            used: stats["snapshots_used"],
            evicted: stats["snapshots_evicted"],
            held: stats["snapshots"],
            peak_share: peak as f64 / (self.pool.pages * self.pool.page_bytes) as f64,
            mean_of_history: snapshot as f64 / (history as f64).max(1.0),
        }
    }

    fn tenants(&self) -> Vec<report::Tenant> {
        let weight = |id: usize| {
            let known = self.settings.options.tenants.iter().find(|t| t.id as usize == id);
            known.map_or(1.0, |t| t.weight)
        };
        let named = self.trace.tenants().iter().zip(&self.accounts).enumerate();
        let told =
            named.filter(|(_, (_, a))| a.requests > 0 || a.live > 0).map(|(id, (name, a))| report::Tenant {
                name: name.clone(),
                requests: a.requests,
                served: a.served,
                prompt: a.prompt,
                cached: a.cached,
                contended_s: a.contended_us / 1e6,
                rate: if a.contended_us > 0.0 {
                    a.contended as f64 / a.contended_us * 1e6 / weight(id)
                } else {
                    0.0
                },
                ttft_ms: Quantiles::of(&mut a.ttft_ms.clone()),
            });
        told.collect()
    }
}

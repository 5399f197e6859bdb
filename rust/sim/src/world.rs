//! One seed = one run: random requests, steps and faults in a tiny world, everything checked after every operation.

use std::collections::{BTreeSet, HashMap, VecDeque};

use dsv4_core::budget::StepCost;
use dsv4_core::cache::Eviction;
use dsv4_core::core::Tenant;
use dsv4_core::cost::CostModel;
use dsv4_core::error::CoreError;
use dsv4_core::event::What;
use dsv4_core::ids::{PinId, RequestId, Step};
use dsv4_core::layout::{LayoutSpec, V4Geometry};
use dsv4_core::plan::StepHeader;
use dsv4_core::request::{Finish, Retention, Submit};
use dsv4_core::{Core, Options};

use crate::arrays::Arrays;
use crate::device::{Device, Known};
use crate::fake::Geometry;
use crate::oracle::cold_run;
use crate::rng::{Rng, scramble};

/// How a run differs from what its seed says.
#[derive(Clone, Copy, Debug, Default)]
pub struct Overrides {
    /// Steps in flight.
    pub max_in_flight: Option<u32>,
    /// A replay this much shorter than exactness needs.
    pub replay_short_by: u32,
    /// One priority, and room for everyone to wait: for runs of [`World::run_batch`].
    pub calm: bool,
}

/// What a run did.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// Operations.
    pub ops: u64,
    /// Requests that were taken.
    pub requests: u64,
    /// Hash of all events in order.
    pub events: u64,
    /// Hash of the outputs by request, whatever the order of events.
    pub outputs: u64,
    /// Virtual time at the end, by the cost model.
    pub micros: u64,
    /// The core's statistics at the end.
    pub stats: HashMap<String, u64>,
}

/// A request that is not over.
#[derive(Debug)]
struct Live {
    outputs: Vec<u32>,
    aborted: bool,
    stopped: bool,
}

/// A run in progress.
pub struct World {
    rng: Rng,
    options: Options,
    block: u32,
    vocabulary: u32,
    calm: bool,
    core: Core,
    device: Device,
    geometry: Geometry,
    layout: LayoutSpec,
    arrays: Arrays,
    flying: VecDeque<(StepHeader, Vec<u32>)>,
    /// The newest steps that were committed or rolled back, with their samples.
    gone: VecDeque<(u64, usize)>,
    known: HashMap<u64, Known>,
    live: HashMap<u64, Live>,
    /// Conversations that ended: later prompts continue them.
    past: Vec<(Vec<u8>, Vec<u32>)>,
    next_id: u64,
    now_us: u64,
    pins: Vec<PinId>,
    report: Report,
}

fn layout(rng: &mut Rng) -> LayoutSpec {
    let ratios: [&[u32]; 4] = [&[0, 2, 4], &[2, 4, 2], &[4, 0, 2], &[4, 4, 2]];
    let geometry = V4Geometry {
        compress_ratios: rng.pick(&ratios).to_vec(),
        csa_ratio: 2,
        hca_ratio: 4,
        head_dim: 2,
        index_head_dim: 2,
        window: rng.pick(&[6, 6, 3]),
        row: (64, "toy".to_owned()),
        // Index rows are not modelled; their size says how many pages a snapshot takes.
        index_row: (rng.pick(&[256, 640]), "toy".to_owned()),
        block_tokens: rng.pick(&[4, 4, 8]),
        draft_slack: 0,
    };
    LayoutSpec::v4(&geometry).expect("the toy layouts are valid")
}

impl World {
    /// The world of a seed.
    pub fn new(seed: u64, overrides: Overrides) -> Self {
        let mut rng = Rng::new(seed);
        let layout = layout(&mut rng);
        let most = rng.pick(&[12, 16, 40]);
        let pages = rng.range(8, most);
        let slabs = rng.range(1, 4);
        let in_flight = rng.range(1, 2);
        let policies = ["none", "every:4", "every:12", "turns", "forks", "auto"];
        let budgets = [None, None, Some(15.0), Some(120.0)];
        let options = Options {
            pages,
            slabs,
            max_step_tokens: rng.pick(&[1, 3, 5, 8, 16, 64]),
            max_len: rng.range(20, 90),
            max_waiting: if overrides.calm { usize::MAX } else { rng.range(2, 8) as usize },
            snapshots: rng.pick(&policies).parse().expect("the policies are valid"),
            snapshot_budget: rng.pick(&[0.0, 0.1, 0.5, 1.0]),
            eviction: rng.pick(&Eviction::ALL),
            step_us: rng.pick(&budgets),
            step_cost: StepCost { base_us: 10.0, decode_us: 5.0, copy_us: rng.pick(&[0.0, 20.0]) },
            max_wait_us: rng.pick(&[0, 500, 5000, 1 << 40]),
            tenants: vec![
                Tenant { id: 0, weight: 0.5, quota_pages: None },
                Tenant { id: 1, weight: 3.0, quota_pages: Some(rng.range(0, pages)) },
            ],
            prefix_cache: rng.chance(95),
            max_in_flight: overrides.max_in_flight.unwrap_or(in_flight),
            cost: CostModel {
                token_us: 10.0,
                context_us_per_1k: 1.0,
                replay_factor: rng.pick(&[0.1, 0.6, 3.0]),
                restore_us: rng.pick(&[0.0, 40.0, 100.0]),
            },
            replay_tokens: (overrides.replay_short_by > 0)
                .then(|| layout.replay_tokens() - overrides.replay_short_by),
        };
        let vocabulary = rng.pick(&[2, 2, 3]);
        World { rng, calm: overrides.calm, ..World::scripted(&layout, options, vocabulary) }
    }

    /// A world in which nothing happens by chance: for tests that say each step with [`World::enter`], [`World::plan`],
    /// [`World::commit`] and [`World::end`].
    pub fn scripted(layout: &LayoutSpec, options: Options, vocabulary: u32) -> Self {
        let core = Core::new(layout, options.clone()).expect("the options are valid");
        let replay_tokens = options.replay_tokens.unwrap_or(layout.replay_tokens());
        let geometry = Geometry::of(layout, replay_tokens);
        World {
            block: layout.block_tokens,
            vocabulary,
            calm: true,
            device: Device::new(geometry.clone(), options.pages, options.slabs, vocabulary),
            geometry,
            layout: layout.clone(),
            arrays: Arrays::new(&core.shape()),
            core,
            options,
            rng: Rng::new(0),
            flying: VecDeque::new(),
            gone: VecDeque::new(),
            known: HashMap::new(),
            live: HashMap::new(),
            past: Vec::new(),
            next_id: 1,
            now_us: 0,
            pins: Vec::new(),
            report: Report::default(),
        }
    }

    /// The core, for questions.
    pub fn core(&mut self) -> &mut Core {
        &mut self.core
    }

    /// `ops` random operations, then everything runs to its end. The error names what broke and after how many operations.
    pub fn run(mut self, ops: u64) -> Result<Report, String> {
        for _ in 0..ops {
            self.operation()
                .and_then(|()| self.check())
                .map_err(|e| format!("operation {}: {e}", self.report.ops))?;
        }
        self.drain().map_err(|e| format!("at the end, after {} operations: {e}", self.report.ops))?;
        self.report.stats = self.core.stats().into_iter().collect();
        Ok(self.report)
    }

    /// All requests first, then steps without faults until the end: what is sampled does not depend on timing.
    pub fn run_batch(mut self, requests: u32) -> Result<Report, String> {
        for _ in 0..requests {
            self.submit()?;
        }
        self.drain()?;
        self.report.stats = self.core.stats().into_iter().collect();
        Ok(self.report)
    }

    fn operation(&mut self) -> Result<(), String> {
        self.report.ops += 1;
        match self.rng.below(100) {
            0..14 => self.submit(),
            14..18 => self.fork_one(),
            18..57 => self.plan().map(|_| ()),
            57..85 => self.commit(),
            85..87 => self.end_one(true),
            87..89 => self.end_one(false),
            89..91 => self.roll_back(),
            91 => self.misuse(),
            92 => self.clock(),
            93 => self.pin_or_unpin(),
            94 => self.end_session_or_dump(),
            95..97 => self.measure(),
            97 => {
                let n = self.rng.range(1, 3);
                self.core.evict_snapshots(n);
                Ok(())
            }
            98 => {
                let n = self.rng.range(1, 6);
                self.core.evict_history(n);
                Ok(())
            }
            _ => {
                self.core.clear_prefix();
                Ok(())
            }
        }
    }

    fn prompt(&mut self) -> (Vec<u8>, Vec<u32>) {
        let (mut salt, mut tokens) = (self.rng.below(2) as usize, Vec::new());
        if !self.past.is_empty() && self.rng.chance(70) {
            let which = self.rng.below(self.past.len() as u32) as usize;
            let (old_salt, old) = self.past[which].clone();
            let keep =
                if self.rng.chance(60) { old.len() as u32 } else { self.rng.range(1, old.len() as u32) };
            (salt, tokens) = (old_salt.len(), old);
            tokens.truncate(keep as usize);
        }
        let more = if tokens.is_empty() { self.rng.range(1, 40) } else { self.rng.below(8) };
        tokens.extend((0..more).map(|_| self.rng.below(self.vocabulary)));
        (vec![1; salt], tokens)
    }

    fn submit(&mut self) -> Result<(), String> {
        let (salt, prompt) = self.prompt();
        let most = self.rng.pick(&[1, 14, 40]);
        let max_new = if self.rng.chance(10) { None } else { Some(self.rng.below(most)) };
        let stop_ids = if self.rng.chance(30) { vec![self.rng.below(self.vocabulary)] } else { Vec::new() };
        let priority = if self.calm { 0 } else { self.rng.below(2) as i32 };
        let all_logits = self.rng.chance(5);
        let submit = Submit { prompt, max_new, stop_ids, salt, priority, all_logits, ..Submit::default() };
        let submit = self.with_hints(submit);
        self.enter(submit)
    }

    /// Tenant, deadline and retention: they change who goes first and what is kept, and no output.
    fn with_hints(&mut self, submit: Submit) -> Submit {
        let deadline = u64::from(self.rng.below(4000)) + self.now_us.saturating_sub(500);
        let retention = Retention {
            session: self.rng.chance(40).then(|| u64::from(self.rng.below(4))),
            ttl_us: self.rng.chance(20).then(|| u64::from(self.rng.below(3000))),
            priority: if self.rng.chance(20) { self.rng.below(3) as i32 - 1 } else { 0 },
        };
        let deadline_us = self.rng.chance(25).then_some(deadline);
        Submit { tenant: self.rng.below(3), deadline_us, retention, ..submit }
    }

    /// A child of a live request: all that is known of it, or a part, and perhaps something else after that.
    fn fork_one(&mut self) -> Result<(), String> {
        let ids: BTreeSet<u64> = self.live.keys().copied().collect();
        let Some(&parent) = ids.iter().nth(self.rng.below(ids.len() as u32) as usize) else { return Ok(()) };
        let known = &self.known[&parent];
        let said = known.expected.prompt as usize + self.live[&parent].outputs.len();
        let (salt, mut prompt) = (known.salt.clone(), known.expected.tokens[..said].to_vec());
        let whole = self.rng.chance(50);
        if !whole {
            prompt.truncate(self.rng.range(1, said as u32) as usize);
            let more = self.rng.below(4);
            prompt.extend((0..more).map(|_| self.rng.below(self.vocabulary)));
        }
        let max_new = Some(self.rng.below(14));
        let submit = self.with_hints(Submit { prompt, max_new, salt, ..Submit::default() });
        self.enter_as(submit, Some(parent))
    }

    /// Time passes, jumps, or goes backwards.
    fn clock(&mut self) -> Result<(), String> {
        let to = match self.rng.below(10) {
            0 => u64::from(self.rng.below(1000)),
            1 => self.now_us + 1_000_000,
            _ => self.now_us + u64::from(self.rng.below(1000)),
        };
        self.now_us = self.now_us.max(to);
        self.core.set_time(to);
        Ok(())
    }

    /// A step is measured: roughly right, far off, or garbage.
    fn measure(&mut self) -> Result<(), String> {
        let garbage = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -5.0, 0.0, 1e-300, 1e300];
        let usual = f64::from(self.rng.range(1, 400));
        let us = if self.rng.chance(20) { self.rng.pick(&garbage) } else { usual };
        let step = self.flying.front().map_or(self.rng.bits() % 50, |f| f.0.step);
        self.core.observe(Step(step), us);
        Ok(())
    }

    fn pin_or_unpin(&mut self) -> Result<(), String> {
        if self.pins.len() > 1 || (self.pins.len() == 1 && self.rng.chance(50)) {
            let pin = self.pins.swap_remove(self.rng.below(self.pins.len() as u32) as usize);
            // The first may fail as well: a request that fits no other way breaks pins.
            return match (self.core.unpin(pin), self.core.unpin(pin)) {
                (_, false) => Ok(()),
                other => Err(format!("unpinning {pin:?} twice: {other:?}")),
            };
        }
        if self.past.is_empty() {
            return Ok(());
        }
        let which = self.rng.below(self.past.len() as u32) as usize;
        let (salt, tokens) = &self.past[which];
        self.pins.push(self.core.pin(salt, tokens));
        Ok(())
    }

    /// A session ends; or the core is written down, and what is read back is sound and has the same requests. It lays its
    /// pages out anew, so this world goes on with the core that it has.
    fn end_session_or_dump(&mut self) -> Result<(), String> {
        if self.rng.chance(70) {
            let session = u64::from(self.rng.below(4));
            self.core.end_session(session);
            return Ok(());
        }
        let loaded = Core::load(&self.layout, &self.core.dump()).map_err(|e| e.to_string())?;
        loaded.check().map_err(|e| format!("after a dump: {e}"))?;
        let live = |core: &Core| {
            let stats = core.stats().into_iter();
            stats
                .filter(|(name, _)| ["waiting", "running"].contains(&name.as_str()))
                .map(|x| x.1)
                .sum::<u64>()
        };
        let (before, after) = (live(&self.core), live(&loaded));
        if before == after {
            Ok(())
        } else {
            Err(format!("{before} requests were dumped, {after} came back"))
        }
    }

    /// Submits a request under the next id, which is returned by [`World::last_id`]. A refusal must be one that is due.
    pub fn enter(&mut self, submit: Submit) -> Result<(), String> {
        self.enter_as(submit, None)
    }

    fn enter_as(&mut self, submit: Submit, parent: Option<u64>) -> Result<(), String> {
        let (id, n) = (self.next_id, submit.prompt.len() as u32);
        let submit = Submit { id: RequestId(id), ..submit };
        let Submit { prompt, stop_ids, salt, all_logits, .. } = submit.clone();
        let held = self.options.pages * self.block;
        let wanted = submit.max_new.unwrap_or_else(|| {
            self.options.max_len.saturating_sub(n).min((held + 1).saturating_sub(n)).max(1)
        });
        let too_long = n + wanted > self.options.max_len;
        let too_big = n + wanted.saturating_sub(1) > held;
        let taken = match parent {
            Some(parent) => self.core.fork(RequestId(parent), submit),
            None => self.core.submit(submit),
        };
        match taken {
            Ok(()) if !too_long && !too_big => {}
            Err(CoreError::TooLong { .. }) if too_long => return Ok(()),
            Err(CoreError::NeverFits { .. }) if too_big => return Ok(()),
            Err(CoreError::Overloaded { .. }) if !too_long && !too_big => return Ok(()),
            other => return Err(format!("submit of {n} + {wanted} tokens: {other:?}")),
        }
        self.next_id += 1;
        self.report.requests += 1;
        if self.calm {
            self.past.push((salt.clone(), prompt.clone()));
        }
        let expected = cold_run(&self.geometry, &prompt, &salt, wanted, &stop_ids, self.vocabulary);
        self.known.insert(id, Known { expected, salt, all_logits, over: false });
        self.live.insert(id, Live { outputs: Vec::new(), aborted: false, stopped: false });
        Ok(())
    }

    /// The id of the newest request.
    pub fn last_id(&self) -> u64 {
        self.next_id - 1
    }

    /// Whether a request has not ended.
    pub fn is_live(&self, id: u64) -> bool {
        self.live.contains_key(&id)
    }

    /// What the cold run gives a request: prompt and outputs.
    pub fn expected(&self, id: u64) -> &[u32] {
        &self.known[&id].expected.tokens
    }

    /// Plans and runs a step, which may crash. Returns whether there was one.
    pub fn plan(&mut self) -> Result<bool, String> {
        if self.flying.len() == self.options.max_in_flight as usize {
            let refused =
                matches!(self.core.plan(&mut self.arrays.buffers()), Err(CoreError::WrongStep { .. }));
            return if refused { Ok(false) } else { Err("planned one step too many".to_owned()) };
        }
        let header = self.core.plan(&mut self.arrays.buffers()).map_err(|e| e.to_string())?;
        let Some(header) = header else {
            let stuck = self.flying.is_empty() && self.core.has_work();
            return if stuck {
                Err(format!("nothing can run, and nothing will change that: {:?}", self.core.stats()))
            } else {
                Ok(false)
            };
        };
        if !self.calm && header.rows > 0 && self.rng.chance(2) {
            let with_deltas = self.rng.chance(50);
            self.device.crash(&header, &self.arrays, with_deltas)?;
            // The engine may commit the step before first, or not.
            if self.rng.chance(50) && !self.flying.is_empty() {
                self.commit()?;
            }
            self.core.rollback(Step(header.step)).map_err(|e| e.to_string())?;
            self.device.drop_from(header.step);
            return Ok(true);
        }
        let samples = self.device.run(&header, &self.arrays, &self.known)?;
        self.report.micros += 10 * u64::from(header.tokens);
        self.flying.push_back((header, samples));
        Ok(true)
    }

    /// Commits the oldest step in flight, if there is one, and compares what it gave.
    pub fn commit(&mut self) -> Result<(), String> {
        let Some((header, samples)) = self.flying.pop_front() else { return Ok(()) };
        self.core.commit(Step(header.step), &samples).map_err(|e| e.to_string())?;
        self.device.retire(header.step);
        self.is_gone(header.step, samples.len());
        self.events()
    }

    fn is_gone(&mut self, step: u64, samples: usize) {
        if self.gone.len() == 7 {
            self.gone.pop_front();
        }
        self.gone.push_back((step, samples));
    }

    /// Takes back a step in flight, chosen at random, and all after it.
    pub fn roll_back(&mut self) -> Result<(), String> {
        let n = self.flying.len() as u32;
        if n == 0 {
            return Ok(());
        }
        let keep = self.rng.below(n) as usize;
        let step = self.flying[keep].0.step;
        for (header, samples) in self.flying.split_off(keep) {
            self.is_gone(header.step, samples.len());
        }
        self.device.drop_from(step);
        self.core.rollback(Step(step)).map_err(|e| e.to_string())
    }

    fn end_one(&mut self, abort: bool) -> Result<(), String> {
        let ids: BTreeSet<u64> = self.live.keys().copied().collect();
        let Some(&id) = ids.iter().nth(self.rng.below(ids.len() as u32) as usize) else { return Ok(()) };
        self.end(id, abort)
    }

    /// Aborts or stops a live request, twice: the second time there is nothing to end.
    pub fn end(&mut self, id: u64, abort: bool) -> Result<(), String> {
        let request = RequestId(id);
        if let Some(live) = self.live.get_mut(&id) {
            (live.aborted, live.stopped) = (abort, !abort);
        }
        let end = |core: &mut Core| if abort { core.abort(request) } else { core.stop(request) };
        match (end(&mut self.core), end(&mut self.core)) {
            (Ok(true), Ok(false)) => Ok(()),
            other => Err(format!("ending request {id} twice: {other:?}")),
        }
    }

    /// Calls that must be refused and change nothing, late and duplicate completions among them.
    fn misuse(&mut self) -> Result<(), String> {
        for &(step, samples) in &self.gone {
            if self.core.commit(Step(step), &vec![0; samples]).is_ok() {
                return Err(format!("step {step} was committed after it was over"));
            }
        }
        let beyond = Step(self.flying.back().map_or(0, |f| f.0.step) + 100);
        let refused = [
            self.core.commit(beyond, &[]).is_err(),
            self.core.rollback(beyond).is_err(),
            self.core.explain(RequestId(u64::MAX)).is_err(),
            self.core.abort(RequestId(u64::MAX)) == Ok(false),
        ];
        if let Some((header, samples)) = self.flying.front() {
            let wrong = vec![0; samples.len() + 1];
            if self.core.commit(Step(header.step), &wrong).is_ok() {
                return Err("a commit with one token too many was taken".to_owned());
            }
        }
        if refused == [true; 4] { Ok(()) } else { Err(format!("misuse was taken: {refused:?}")) }
    }

    /// Compares all events with the cold run and recomputes every invariant.
    pub fn check(&mut self) -> Result<(), String> {
        self.events()?;
        self.core.check().map_err(|e| e.to_string())
    }

    /// Every event is compared with the cold run.
    fn events(&mut self) -> Result<(), String> {
        while let Some(event) = self.core.next_event() {
            for word in event.to_row() {
                self.report.events = scramble(self.report.events ^ word as u64).wrapping_add(1);
            }
            let id = event.request.0;
            let (Some(known), Some(live)) = (self.known.get_mut(&id), self.live.get_mut(&id)) else {
                return Err(format!("{event:?} is of nobody"));
            };
            let all = &known.expected.tokens[known.expected.prompt as usize..];
            match event.what {
                What::Token { token, index, .. } => {
                    if index as usize != live.outputs.len() || all.get(index as usize) != Some(&token) {
                        return Err(format!("{event:?}, but the output is {all:?}"));
                    }
                    live.outputs.push(token);
                }
                What::Finished { reason, outputs, stop } => {
                    let whole = live.outputs.len() == all.len();
                    let right = outputs as usize == live.outputs.len()
                        && match reason {
                            Finish::Stop if stop.is_none() => live.stopped,
                            Finish::Stop => whole && known.expected.stops && stop == all.last().copied(),
                            Finish::Length => whole && !known.expected.stops,
                            Finish::Abort => live.aborted,
                            Finish::Error => false,
                        };
                    if !right {
                        return Err(format!("{event:?}, but the output is {:?} of {all:?}", live.outputs));
                    }
                    known.over = true;
                    self.finish(id);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn finish(&mut self, id: u64) {
        let Some(live) = self.live.remove(&id) else { return };
        let known = &self.known[&id];
        let output =
            live.outputs.iter().fold(scramble(id), |h, &t| scramble(h ^ u64::from(t)).wrapping_add(1));
        self.report.outputs ^= output;
        let end = known.expected.prompt as usize + live.outputs.len();
        let conversation = (known.salt.clone(), known.expected.tokens[..end].to_vec());
        if self.past.len() < 24 {
            self.past.push(conversation);
        } else {
            let at = self.rng.below(24) as usize;
            self.past[at] = conversation;
        }
    }

    /// Runs everything to its end.
    pub fn settle(&mut self) -> Result<(), String> {
        let mut turns = 0;
        while self.core.has_work() || !self.flying.is_empty() {
            let ran = self.flying.len() < self.options.max_in_flight as usize && self.plan()?;
            if !ran {
                self.commit()?;
            }
            self.check()?;
            turns += 1;
            if turns > 200_000 {
                return Err(format!("no end in sight: {:?}", self.core.stats()));
            }
        }
        if let Some(id) = self.live.keys().next() {
            return Err(format!("request {id} never ended"));
        }
        Ok(())
    }

    /// Runs everything to its end and forgets all prefixes; then nothing may be left behind.
    pub fn drain(&mut self) -> Result<(), String> {
        self.settle()?;
        for pin in std::mem::take(&mut self.pins) {
            self.core.unpin(pin);
        }
        self.core.clear_prefix();
        self.check()?;
        let stats: HashMap<String, u64> = self.core.stats().into_iter().collect();
        if stats["free_pages"] != stats["pages"] || stats["free_slabs"] != stats["slabs"] {
            return Err(format!("something was kept: {stats:?}"));
        }
        Ok(())
    }
}

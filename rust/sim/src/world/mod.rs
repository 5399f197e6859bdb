//! One seed = one run: random requests, steps and faults in a tiny world, everything checked after every operation.

mod chance;

pub use chance::snapshot_policies;

use std::collections::{HashMap, VecDeque};

use dsv4_core::error::CoreError;
use dsv4_core::event::What;
use dsv4_core::ids::{PinId, RequestId, Step};
use dsv4_core::layout::LayoutSpec;
use dsv4_core::plan::{Plan, StepHeader};
use dsv4_core::sched::request::{Finish, Submit};
use dsv4_core::{Core, Options};

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
    /// All results count.
    pub accept_all: bool,
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
    refuses: bool,
    core: Core,
    device: Device,
    geometry: Geometry,
    layout: LayoutSpec,
    plan: Plan,
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

impl World {
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
            refuses: false,
            device: Device::new(geometry.clone(), options.pages, options.slabs, vocabulary),
            geometry,
            layout: layout.clone(),
            plan: Plan::new(core.plan_schema()),
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
            let refused = matches!(self.core.plan(self.plan.words()), Err(CoreError::WrongStep { .. }));
            return if refused { Ok(false) } else { Err("planned one step too many".to_owned()) };
        }
        let header = self.core.plan(self.plan.words()).map_err(|e| e.to_string())?;
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
            self.device.crash(&self.plan, with_deltas)?;
            // The engine may commit the step before first, or not.
            if self.rng.chance(50) && !self.flying.is_empty() {
                self.commit()?;
            }
            self.core.rollback(Step(header.step)).map_err(|e| e.to_string())?;
            self.device.drop_from(header.step);
            return Ok(true);
        }
        let samples = self.device.run(&self.plan, &self.known)?;
        self.report.micros += 10 * u64::from(header.tokens);
        self.flying.push_back((header, samples));
        Ok(true)
    }

    /// Commits the oldest step in flight, if there is one, and compares what it gave. Now and then a row's result does not
    /// count, which is not drawn like the rest, so that seeds keep their meaning.
    pub fn commit(&mut self) -> Result<(), String> {
        let (refuses, seed) = (self.refuses, self.report.events);
        self.commit_without(|row| refuses && scramble(seed ^ row as u64).is_multiple_of(40))
    }

    /// As [`World::commit`], but for these of the rows that sample nothing is accepted.
    pub fn commit_without(&mut self, refused: impl Fn(usize) -> bool) -> Result<(), String> {
        let Some((header, samples)) = self.flying.pop_front() else { return Ok(()) };
        let accepted: Vec<i32> = (0..samples.len()).map(|row| i32::from(!refused(row))).collect();
        self.core.commit(Step(header.step), &samples, &accepted).map_err(|e| e.to_string())?;
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

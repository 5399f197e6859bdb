//! What happens by chance in a world: its options, its requests, and one operation after the other. A seed means the same
//! run only as long as the draws keep their order.

use std::collections::BTreeSet;

use dsv4_core::cache::Eviction;
use dsv4_core::core::Tenant;
use dsv4_core::cost::CostModel;
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::LayoutSpec;
use dsv4_core::layout::presets::{Past, toy_model};
use dsv4_core::sched::budget::{StepBudget, StepCost};
use dsv4_core::sched::policy::SnapshotPolicy;
use dsv4_core::sched::request::{Retention, Submit};
use dsv4_core::{Core, Options};

use super::{Overrides, World};
use crate::rng::Rng;

/// A tiny layout. The fields are drawn in the order in which they stand here.
fn layout(rng: &mut Rng) -> LayoutSpec {
    use Past::{None, Of, Overlap, Plain};
    let models: [&[Past]; 7] = [
        &[None, Overlap(2), Plain(4)],
        &[Overlap(2), Plain(4), Overlap(2)],
        &[Plain(4), None, Overlap(2)],
        &[Plain(4), Plain(4), Overlap(2)],
        // A third ratio, layers that read another's history, none that is plain.
        &[Overlap(2), Plain(4), Plain(2)],
        &[Overlap(4), Of(0), Overlap(2)],
        &[Plain(2), Overlap(2), Of(0)],
    ];
    let (model, window) = (rng.pick(&models), rng.pick(&[6, 6, 3]));
    // Index rows are not modelled; their size says how many pages a snapshot takes.
    let index_bytes = rng.pick(&[256, 640]);
    toy_model(model, window, rng.pick(&[4, 4, 8]), index_bytes)
}

/// Every policy by which states are saved; one with a number has each of `numbers`.
pub fn snapshot_policies(numbers: &[u32]) -> Vec<SnapshotPolicy> {
    let named = |name: &str| match name.strip_suffix('N') {
        Some(front) => numbers.iter().map(|n| format!("{front}{n}")).collect(),
        None => vec![name.to_owned()],
    };
    let names = SnapshotPolicy::names().into_iter().rev().flat_map(named);
    names.map(|name| name.parse().expect("the core's own names are valid")).collect()
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
        let policies = snapshot_policies(&[4, 12]);
        let floor = 3;
        let budgets = [
            StepBudget::Open,
            StepBudget::Decodes { times: 4.0, floor },
            StepBudget::Fixed(15.0),
            StepBudget::Fixed(120.0),
        ];
        let options = Options {
            pages,
            slabs,
            max_step_tokens: rng.pick(&[1, 3, 5, 8, 16, 64]),
            max_len: rng.range(20, 90),
            max_waiting: if overrides.calm { usize::MAX } else { rng.range(2, 8) as usize },
            snapshots: rng.pick(&policies),
            snapshot_budget: rng.pick(&[0.0, 0.1, 0.5, 1.0]),
            eviction: rng.pick(&Eviction::ALL),
            step_budget: rng.pick(&budgets),
            step_sizes: rng.pick(&[&[][..], &[2, 4, 7, 16]]).to_vec(),
            step_cost: StepCost { base_us: 10.0, decode_us: 5.0, copy_us: rng.pick(&[0.0, 20.0]) },
            max_wait_us: rng.pick(&[0, 500, 5000, 1 << 40]),
            tenants: vec![
                Tenant { id: 0, weight: 0.5, quota_pages: None },
                Tenant { id: 1, weight: 3.0, quota_pages: Some(rng.range(0, pages)) },
            ],
            prefix_cache: rng.chance(95),
            cache_changes: false,
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
        let refuses = !overrides.calm && !overrides.accept_all;
        World { rng, calm: overrides.calm, refuses, ..World::scripted(&layout, options, vocabulary) }
    }

    pub(super) fn operation(&mut self) -> Result<(), String> {
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

    pub(super) fn submit(&mut self) -> Result<(), String> {
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

    fn end_one(&mut self, abort: bool) -> Result<(), String> {
        let ids: BTreeSet<u64> = self.live.keys().copied().collect();
        let Some(&id) = ids.iter().nth(self.rng.below(ids.len() as u32) as usize) else { return Ok(()) };
        self.end(id, abort)
    }

    /// Calls that must be refused and change nothing, late and duplicate completions among them.
    fn misuse(&mut self) -> Result<(), String> {
        for &(step, samples) in &self.gone {
            if self.core.commit(Step(step), &vec![0; samples], &vec![1; samples]).is_ok() {
                return Err(format!("step {step} was committed after it was over"));
            }
        }
        let beyond = Step(self.flying.back().map_or(0, |f| f.0.step) + 100);
        let refused = [
            self.core.commit(beyond, &[], &[]).is_err(),
            self.core.rollback(beyond).is_err(),
            self.core.explain(RequestId(u64::MAX)).is_err(),
            self.core.abort(RequestId(u64::MAX)) == Ok(false),
        ];
        if let Some((header, samples)) = self.flying.front() {
            let (n, step) = (samples.len(), Step(header.step));
            let mut bad = vec![(vec![0; n + 1], vec![1; n]), (vec![0; n], vec![1; n + 1])];
            if n > 0 {
                let counts = |first: i32| [vec![first], vec![1; n - 1]].concat();
                bad.extend([(vec![0; n], counts(2)), (vec![0; n], counts(-1)), (vec![0; n], vec![1; n - 1])]);
            }
            for (tokens, accepted) in bad {
                if self.core.commit(step, &tokens, &accepted).is_ok() {
                    return Err(format!("{n} samples were committed as {tokens:?}, accepted {accepted:?}"));
                }
            }
        }
        if refused == [true; 4] { Ok(()) } else { Err(format!("misuse was taken: {refused:?}")) }
    }
}

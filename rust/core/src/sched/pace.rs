//! Time: the clock that the core is told, what a step will take, and what follows from both.

use crate::ids::Step;
use crate::options::Options;
use crate::plan::StepHeader;
use crate::sched::budget::{Learnt, StepBudget, StepModel, Work};
use crate::sched::request::Request;

/// The clock and the cost model of steps.
#[derive(Debug)]
pub struct Pace {
    model: StepModel,
    now_us: u64,
    budget: StepBudget,
    max_wait_us: u64,
    /// Of the step planned last; 0: any time.
    planned_budget_us: f64,
}

impl Pace {
    /// At time 0, with nothing measured.
    pub fn new(options: &Options) -> Self {
        let model = StepModel::new(options.cost, options.step_cost);
        Pace {
            model,
            now_us: 0,
            budget: options.step_budget,
            max_wait_us: options.max_wait_us,
            planned_budget_us: 0.0,
        }
    }

    /// The time that it was told last, in microseconds.
    pub fn now(&self) -> u64 {
        self.now_us
    }

    /// The time now, in microseconds from any origin. Going backwards is ignored.
    pub fn set_time(&mut self, now_us: u64) {
        self.now_us = self.now_us.max(now_us);
    }

    /// Whether a request has waited so long that it goes ahead of all.
    pub fn has_aged(&self, request: &Request) -> bool {
        self.now_us >= request.arrived_us.saturating_add(self.max_wait_us)
    }

    /// Whether a waiting request's first token can come by then.
    pub fn can_meet(&self, request: &Request, deadline: u64) -> bool {
        let us = self.model.prefill_us(request.known_prefix.min(request.known()), request.known());
        self.now_us as f64 + us <= deadline as f64
    }

    /// Whether a request's deadline has passed.
    pub fn is_late(&self, request: &Request) -> bool {
        request.deadline_us.is_some_and(|deadline| deadline < self.now_us)
    }

    /// What `rows` decodes behind `context` tokens, and copies, leave of a step's time for prompts, and the tokens of prompts
    /// that it may take in any case. `None`: prompts may take any time.
    pub fn left_by(&self, rows: u32, context: u64, copies: u32) -> Option<(f64, u32)> {
        let alone = self.model.decodes_us(self.model.fixed_work(rows, context, 0));
        let budget = self.budget.of(alone)?;
        let fixed_us = self.model.fixed_work(rows, context, copies);
        Some((budget - self.model.predict(Work { fixed_us, load_us: 0.0 }), self.budget.floor()))
    }

    /// Tokens from `from` on that fit into `us` together with a restore and a save.
    pub fn tokens_within(&self, us: f64, from: u32, replay: bool) -> u32 {
        if us == f64::INFINITY {
            return u32::MAX;
        }
        let copies =
            Work { fixed_us: self.model.fixed_work(0, 0, 2) - self.model.fixed_work(0, 0, 0), load_us: 0.0 };
        self.model.tokens_within(us - self.model.predict(copies), from, replay)
    }

    /// Time of a piece of a prompt, before correction and after.
    pub fn piece_us(&self, start: u32, end: u32, replay: bool) -> (f64, f64) {
        let load_us = self.model.load_work(start, end, replay);
        (load_us, self.model.predict(Work { fixed_us: 0.0, load_us }))
    }

    /// A step is planned: what it will take is remembered until it is measured.
    pub fn expect(&mut self, header: &StepHeader, context: u64, load_us: f64) {
        let fixed_us = self.model.fixed_work(header.decode_rows, context, header.copies);
        let alone = self.model.decodes_us(self.model.fixed_work(header.decode_rows, context, 0));
        self.planned_budget_us =
            if header.decode_rows > 0 { self.budget.of(alone).unwrap_or(0.0) } else { 0.0 };
        self.model.expect(Step(header.step), Work { fixed_us, load_us }, header.decode_rows);
    }

    /// Steps from `step` on were not run.
    pub fn forget_from(&mut self, step: Step) {
        self.model.forget_from(step);
    }

    /// A step took `us` microseconds on the device. What cannot be is ignored.
    pub fn observe(&mut self, step: Step, us: f64) {
        self.model.observe(step, us);
    }

    /// Predicted and measured time of the step measured last.
    pub fn last(&self) -> (f64, f64) {
        self.model.last()
    }

    /// Time that the step planned last may take, in microseconds; 0: any, as nothing decodes or there is no budget.
    pub fn planned_budget_us(&self) -> f64 {
        self.planned_budget_us
    }

    /// What was learnt, to go on with elsewhere.
    pub fn learnt(&self) -> Learnt {
        self.model.learnt()
    }

    /// Goes on at a time, with what another has learnt.
    pub fn resume(&mut self, now_us: u64, learnt: Learnt) {
        self.now_us = now_us;
        self.model.set_learnt(learnt);
    }
}

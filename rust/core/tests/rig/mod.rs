//! A core over a tiny layout, driven step by step and checked after each of them.

#![allow(dead_code, missing_docs, reason = "each test file uses a part")]
#![allow(clippy::unwrap_used, reason = "a refusal where none is expected fails the test")]

use dsv4_core::cost::CostModel;
use dsv4_core::event::What;
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::presets;
use dsv4_core::plan::{CopyKind, Field, Plan, StepHeader};
use dsv4_core::sched::request::Submit;
use dsv4_core::{Core, Options};

pub fn options() -> Options {
    Options {
        pages: 32,
        slabs: 2,
        max_step_tokens: 8,
        max_len: 64,
        max_waiting: 4,
        snapshots: "turns".parse().unwrap(),
        cost: CostModel { token_us: 10.0, context_us_per_1k: 0.0, replay_factor: 0.5, restore_us: 1.0 },
        ..Options::default()
    }
}

pub fn request(id: u64, prompt: &[u32], max_new: u32) -> Submit {
    let (id, prompt, max_new) = (RequestId(id), prompt.to_vec(), Some(max_new));
    Submit { id, prompt, max_new, stop_ids: vec![99], ..Submit::default() }
}

/// A row of a plan: request, first position, tokens, flags, samples.
pub type Row = (u64, i32, i32, i32, i32);

pub struct Rig {
    pub core: Core,
    pub out: Plan,
}

impl Rig {
    pub fn new(options: Options) -> Self {
        let core = Core::new(&presets::toy_v4(), options).unwrap();
        Rig { out: Plan::new(core.plan_schema()), core }
    }

    pub fn plan(&mut self) -> Option<StepHeader> {
        let header = self.core.plan(self.out.words()).unwrap();
        self.core.check().unwrap();
        header
    }

    pub fn rows(&self, h: &StepHeader) -> Vec<Row> {
        let columns = [Field::row_start, Field::row_len, Field::row_flags, Field::row_samples];
        let row = |r| {
            let [start, len, flags, samples] = columns.map(|c| self.out[c][r]);
            (self.out.long(Field::row_req, r), start, len, flags, samples)
        };
        (0..h.rows as usize).map(row).collect()
    }

    /// Positions of the copies of one kind in the plan made last.
    pub fn copied(&self, kind: CopyKind) -> Vec<u32> {
        self.out.copies(kind).map(|copy| copy.position).collect()
    }

    /// Plans, samples `token` for every row, commits. Returns the rows.
    pub fn step(&mut self, token: u32) -> Vec<Row> {
        let h = self.plan().expect("there is something to run");
        let rows = self.rows(&h);
        self.commit(&h, token);
        rows
    }

    /// The same token for every row, all accepted.
    pub fn commit(&mut self, h: &StepHeader, token: u32) {
        let samples = h.samples as usize;
        self.core.commit(Step(h.step), &vec![token; samples], &vec![1; samples]).unwrap();
        self.core.check().unwrap();
    }

    pub fn run(&mut self, submit: Submit) {
        self.core.submit(submit).unwrap();
        while self.core.has_work() {
            self.step(1);
        }
    }

    pub fn events(&mut self) -> Vec<(u64, What)> {
        std::iter::from_fn(|| self.core.next_event()).map(|e| (e.request.0, e.what)).collect()
    }

    pub fn stat(&self, name: &str) -> u64 {
        self.core.stats().into_iter().find(|(n, _)| n == name).unwrap().1
    }
}

pub fn tokens(n: u32) -> Vec<u32> {
    (0..n).map(|t| t % 7).collect()
}

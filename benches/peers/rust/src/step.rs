//! Steps of dsv4's scheduler with requests in decode.

use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::LayoutSpec;
use dsv4_core::plan::Plan;
use dsv4_core::sched::request::Submit;
use dsv4_core::{Core, Options};

/// Tokens that a request may decode; pages for them are kept ready.
pub const MOST_NEW: u32 = 1 << 14;
/// A request apart from those in decode.
const LONG_ID: RequestId = RequestId(u64::MAX >> 1);

/// A core with requests in decode, and its buffer.
pub struct Steps {
    core: Core,
    out: Plan,
    events: Vec<i64>,
    samples: Vec<u32>,
    accepted: Vec<i32>,
}

impl Steps {
    /// `n` requests with `context` tokens each, and room for `chunk` prompt tokens in a step.
    pub fn new(layout: &LayoutSpec, pages: u32, n: u32, context: usize, chunk: u32) -> Self {
        let mut steps = Self::idle(layout, pages, n, chunk);
        steps.start(n, context);
        steps
    }

    /// Nothing runs yet; at most `n` requests will.
    pub fn idle(layout: &LayoutSpec, pages: u32, n: u32, chunk: u32) -> Self {
        let options = Options {
            pages,
            slabs: n + 1,
            max_step_tokens: n + chunk,
            max_len: 1 << 24,
            max_waiting: usize::MAX,
            ..Options::default()
        };
        let core = Core::new(layout, options).expect("the options are valid");
        let out = Plan::new(core.plan_schema());
        let most = n as usize + 1;
        Steps { core, out, events: vec![0; 6 * 4096], samples: vec![0; most], accepted: vec![1; most] }
    }

    /// Brings `n` requests into decode.
    pub fn start(&mut self, n: u32, context: usize) {
        for i in 0..n {
            self.submit(RequestId(u64::from(i)), context, i);
        }
        while self.step() < n {}
    }

    fn submit(&mut self, id: RequestId, tokens: usize, first: u32) {
        let prompt = (0..tokens as u32).map(|t| if t == 0 { first } else { t % 1000 }).collect();
        let submit =
            Submit { id, prompt, max_new: Some(MOST_NEW), stop_ids: vec![u32::MAX], ..Submit::default() };
        self.core.submit(submit).expect("there is room");
    }

    /// Replaces the long prompt by a new one of which nothing is cached.
    pub fn restart_long(&mut self, tokens: usize) {
        self.core.abort(LONG_ID).expect("aborting is always allowed");
        self.submit(LONG_ID, tokens, u32::MAX >> 1);
        self.core.clear_prefix();
    }

    /// Runs prompts of which nothing is sampled to their end, so that their blocks are cached.
    pub fn fill(&mut self, prompts: impl Iterator<Item = Vec<u32>>) {
        for (i, prompt) in prompts.enumerate() {
            let id = RequestId((1 << 40) + i as u64);
            self.core
                .submit(Submit { id, prompt, max_new: Some(0), ..Submit::default() })
                .expect("there is room");
            while self.core.has_work() {
                self.step();
            }
        }
    }

    /// Plan, commit and events of one step; the requests that decoded.
    pub fn step(&mut self) -> u32 {
        let header = self.core.plan(self.out.words()).expect("the buffer is long enough");
        let header = header.expect("there is work");
        let samples = &self.samples[..header.samples as usize];
        self.core
            .commit(Step(header.step), samples, &self.accepted[..samples.len()])
            .expect("it is in flight");
        while self.core.events_into(&mut self.events) > 0 {}
        header.decode_rows
    }

    /// Blocks in the tree.
    pub fn cached_blocks(&self) -> u64 {
        let stats = self.core.stats();
        stats.into_iter().find_map(|(name, value)| (name == "cached_pages").then_some(value)).unwrap_or(0)
    }
}

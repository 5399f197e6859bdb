//! Steps of a core with Flash's layout, requests at 8K context: plan, commit with events, both; with a 1M-token prompt among
//! them; and over trees of 10^4 to 10^6 cached blocks.
//!
//! The time is for the whole step; divide by the number of requests for the cost of one.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::presets;
use dsv4_core::plan::{Plan, StepHeader};
use dsv4_core::sched::budget::StepBudget;
use dsv4_core::sched::request::Submit;
use dsv4_core::{Core, Options};

const CONTEXT: usize = 8192;
const LONG: usize = 1 << 20;
const LONG_ID: RequestId = RequestId(u64::MAX >> 1);
const CHUNK: u32 = 2048;
/// Steps after which the requests begin again at `CONTEXT`.
const STEPS: u32 = 1 << 14;

/// A core with `n` requests in decode, and room for steps of `chunk` prompt tokens besides.
struct Bench {
    core: Core,
    out: Plan,
    events: Vec<i64>,
    samples: Vec<u32>,
    accepted: Vec<i32>,
    left: u32,
}

/// What of a step is measured: `(plan, commit with events) -> their part`.
type Part = fn(Duration, Duration) -> Duration;

impl Bench {
    fn new(n: u32, chunk: u32) -> Self {
        let options = Options {
            pages: 1 << 21,
            slabs: n + 1,
            max_step_tokens: n + chunk,
            max_len: 1 << 24,
            max_waiting: usize::MAX,
            step_budget: StepBudget::Fixed(1e9),
            ..Options::default()
        };
        let core = Core::new(&presets::flash(), options).expect("the options are valid");
        let out = Plan::new(core.plan_schema());
        let (events, samples, accepted) =
            (vec![0; 6 * 4096], vec![0; n as usize + 1], vec![1; n as usize + 1]);
        let mut bench = Bench { core, out, events, samples, accepted, left: STEPS };
        for i in 0..n {
            bench.submit(RequestId(u64::from(i)), CONTEXT, i, 1 << 22);
        }
        while bench.step() < n {}
        bench
    }

    fn submit(&mut self, id: RequestId, tokens: usize, first: u32, max_new: u32) {
        let prompt = (0..tokens as u32).map(|t| if t == 0 { first } else { t % 1000 }).collect();
        let (stop_ids, max_new) = (vec![u32::MAX], Some(max_new));
        let submit = Submit { id, prompt, max_new, stop_ids, ..Submit::default() };
        self.core.submit(submit).expect("there is room");
    }

    fn plan(&mut self) -> StepHeader {
        let header = self.core.plan(self.out.words()).expect("the buffer is long enough");
        header.expect("there is work")
    }

    fn commit(&mut self, header: StepHeader) {
        let samples = &self.samples[..header.samples as usize];
        self.core
            .commit(Step(header.step), samples, &self.accepted[..samples.len()])
            .expect("it is in flight");
        self.core.observe(Step(header.step), 20_000.0);
        while self.core.events_into(&mut self.events) > 0 {}
    }

    fn gauge(&self, name: &str) -> u64 {
        self.core.stats().into_iter().find(|(n, _)| n == name).expect("it is a statistic").1
    }

    /// One step; returns the rows in decode.
    fn step(&mut self) -> u32 {
        let header = self.plan();
        self.commit(header);
        header.decode_rows
    }

    /// Time of a part of `steps` steps of `n` requests in decode.
    fn timed(&mut self, n: u32, steps: u64, part: Part) -> Duration {
        let mut total = Duration::ZERO;
        for _ in 0..steps {
            if self.left == 0 {
                *self = Bench::new(n, CONTEXT as u32);
            }
            self.left -= 1;
            let start = Instant::now();
            let header = black_box(self.plan());
            let planned = start.elapsed();
            self.commit(header);
            total += part(planned, start.elapsed() - planned);
        }
        total
    }
}

fn decode(c: &mut Criterion) {
    let parts: [(&str, Part); 3] = [("plan", |p, _| p), ("commit", |_, c| c), ("plan_commit", |p, c| p + c)];
    for n in [64, 256, 1024, 4096] {
        let mut bench = Bench::new(n, CONTEXT as u32);
        for (name, part) in parts {
            let name = format!("{name}/{n}_decodes_at_8K");
            c.bench_function(&name, |b| b.iter_custom(|steps| bench.timed(n, steps, part)));
        }
    }
}

/// A prompt of a million tokens is always being read, 2,048 tokens a step.
fn mixed(c: &mut Criterion) {
    for n in [64, 256, 1024] {
        let mut bench = Bench::new(n, CHUNK);
        let mut left = 0;
        // Submitting the next long prompt is not part of a step.
        let mut timed = |steps: u64| {
            let mut total = Duration::ZERO;
            for _ in 0..steps {
                if left == 0 {
                    bench.core.abort(LONG_ID).expect("aborting is always allowed");
                    bench.submit(LONG_ID, LONG, u32::MAX >> 1, 1 << 22);
                    bench.core.clear_prefix();
                    left = LONG / CHUNK as usize - 1;
                }
                left -= 1;
                let start = Instant::now();
                black_box(bench.step());
                total += start.elapsed();
            }
            total
        };
        let name = format!("plan_commit/{n}_decodes_and_a_1M_prefill");
        c.bench_function(&name, |b| b.iter_custom(&mut timed));
    }
}

/// The tree grows beside 256 decodes: a step must not notice.
fn growth(c: &mut Criterion) {
    let mut bench = Bench::new(256, 1 << 16);
    let mut id = 1 << 40;
    for blocks in [10_000, 100_000, 1_000_000] {
        while bench.gauge("cached_pages") < blocks {
            id += 1;
            bench.submit(RequestId(id), LONG, id as u32, 0);
            while bench.gauge("running") + bench.gauge("waiting") > 256 {
                bench.step();
            }
        }
        let name = format!("plan_commit/256_decodes_and_{blocks}_cached_blocks");
        c.bench_function(&name, |b| b.iter(|| black_box(bench.step())));
    }
}

criterion_group!(benches, decode, mixed, growth);
criterion_main!(benches);

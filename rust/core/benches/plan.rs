//! plan + commit + events of a step, Flash's layout, requests at 8K context; and with a 1M-token prompt among them.
//!
//! The time is for the whole step; divide by the number of requests for the cost of one.

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{Criterion, criterion_group, criterion_main};
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::presets;
use dsv4_core::request::Submit;
use dsv4_core::{Core, Options};
use dsv4_sim::arrays::Arrays;

const CONTEXT: usize = 8192;
const LONG: usize = 1 << 20;
const LONG_ID: RequestId = RequestId(u64::MAX >> 1);

/// A core with `n` requests in decode, and room for steps of `chunk` prompt tokens besides.
struct Bench {
    core: Core,
    arrays: Arrays,
    events: Vec<i64>,
    samples: Vec<u32>,
}

impl Bench {
    fn new(n: u32, chunk: u32) -> Self {
        let options = Options {
            pages: 1 << 20,
            slabs: n + 1,
            max_step_tokens: n + chunk,
            max_len: 1 << 24,
            max_waiting: usize::MAX,
            ..Options::default()
        };
        let core = Core::new(&presets::flash(), options).expect("the options are valid");
        let arrays = Arrays::new(&core.shape());
        let mut bench = Bench { core, arrays, events: vec![0; 6 * 4096], samples: vec![0; n as usize + 1] };
        for i in 0..n {
            bench.submit(RequestId(u64::from(i)), CONTEXT, i);
        }
        while bench.step() < n {}
        bench
    }

    fn submit(&mut self, id: RequestId, tokens: usize, first: u32) {
        let prompt = (0..tokens as u32).map(|t| if t == 0 { first } else { t % 1000 }).collect();
        let (stop_ids, salt) = (vec![u32::MAX], Vec::new());
        let submit = Submit { id, prompt, max_new: Some(1 << 22), stop_ids, salt, ..Submit::default() };
        self.core.submit(submit).expect("there is room");
    }

    /// One step; returns the rows in decode.
    fn step(&mut self) -> u32 {
        let header = self.core.plan(&mut self.arrays.buffers()).expect("the arrays are large enough");
        let header = header.expect("there is work");
        self.core
            .commit(Step(header.step), &self.samples[..header.samples as usize])
            .expect("it is in flight");
        while self.core.events_into(&mut self.events) > 0 {}
        header.decode_rows
    }
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("plan_commit");
    for n in [64, 256, 1024] {
        let mut bench = Bench::new(n, CONTEXT as u32);
        group.bench_function(format!("{n}_decodes_at_8K"), |b| b.iter(|| black_box(bench.step())));
    }
    for n in [64, 256] {
        let mut bench = Bench::new(n, 2048);
        let mut left = 0;
        // Submitting the next long prompt is not part of a step.
        let timed = |steps: u64| {
            let mut total = Duration::ZERO;
            for _ in 0..steps {
                if left == 0 {
                    bench.core.abort(LONG_ID).expect("aborting is always allowed");
                    bench.submit(LONG_ID, LONG, u32::MAX >> 1);
                    bench.core.clear_prefix();
                    left = LONG / 2048;
                }
                left -= 1;
                let start = Instant::now();
                black_box(bench.step());
                total += start.elapsed();
            }
            total
        };
        let mut timed = timed;
        group.bench_function(format!("{n}_decodes_and_a_1M_prefill"), |b| b.iter_custom(&mut timed));
    }
    group.finish();
}

criterion_group!(benches, decode);
criterion_main!(benches);

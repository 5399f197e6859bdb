//! Hit rates of the eviction policies on a request trace: `trace_hit TRACE.jsonl|agents[:SEED] [BLOCKS,...]`.
//!
//! Sequential, blocks of 256: look up, take pages, publish, release. A hit is a whole block that was cached, over all whole
//! blocks. `agents` generates sessions that grow by tool results, fork sub-agents, pause, and are compacted at the end.
#![allow(clippy::print_stdout)]

use std::collections::BinaryHeap;

use dsv4_core::cache::retention::Hint;
use dsv4_core::cache::{CacheOptions, Eviction, KvCache};
use dsv4_core::ids::Step;
use dsv4_core::layout::presets;

const BLOCK: usize = 256;

/// A request: names of its blocks, in order.
type Request = Vec<u32>;

fn from_file(path: &str) -> Vec<Request> {
    let text = std::fs::read_to_string(path).expect("the trace can be read");
    let request = |line: &str| {
        let row: serde_json::Value = serde_json::from_str(line).expect("one JSON object a line");
        let ids = row["hash_ids"].as_array().expect("hash_ids is a list");
        let names = ids.iter().flat_map(|id| {
            let id = id.as_u64().expect("ids are numbers") as u32;
            [2 * id, 2 * id + 1]
        });
        names.take(row["input_length"].as_u64().expect("input_length is a number") as usize / BLOCK).collect()
    };
    text.lines().filter(|l| !l.is_empty()).map(request).collect()
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn log_normal(&mut self, mu: f64, sigma: f64) -> f64 {
        let (a, b) = (self.next().max(1e-12), self.next());
        (mu + sigma * (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()).exp()
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() * n as f64) as usize
    }
}

/// Sixty agents: mean context about 60,000 tokens, 40 calls a session, 2% of calls fork sub-agents, 7% are followed by a
/// pause of minutes.
fn agents(seed: u64) -> Vec<Request> {
    let mut rng = Rng(seed);
    let mut next = 0u32;
    let mut fresh = |n: usize| {
        next += n as u32;
        (next - n as u32..next).collect::<Vec<u32>>()
    };
    let tools: Vec<_> = (0..4).map(|i| fresh(30 + 30 * (i % 3))).collect();
    let repositories: Vec<_> = (0..10).map(|i| fresh([40, 100, 200][i % 3])).collect();
    let mut queue = BinaryHeap::new();
    let mut sessions: Vec<(Request, usize, bool)> = Vec::new();
    let start = |rng: &mut Rng, at: f64, sessions: &mut Vec<_>, queue: &mut BinaryHeap<_>| {
        let mut context = tools[rng.below(4)].clone();
        if rng.next() < 0.6 {
            context.extend(&repositories[rng.below(10)]);
        }
        sessions.push((context, 2 + rng.log_normal(3.3, 0.9) as usize, true));
        queue.push((std::cmp::Reverse((at * 1e6) as u64), sessions.len() - 1));
    };
    for _ in 0..60 {
        let at = 600.0 * rng.next();
        start(&mut rng, at, &mut sessions, &mut queue);
    }
    let mut requests = Vec::new();
    while requests.len() < 6000
        && let Some((std::cmp::Reverse(at), who)) = queue.pop()
    {
        let at = at as f64 / 1e6;
        let (mut context, left, main) = std::mem::take(&mut sessions[who]);
        requests.push(context.clone());
        if main && rng.next() < 0.02 {
            for _ in 0..1 + rng.below(3) {
                let shared = [30, 60, context.len()][rng.below(3)].min(context.len());
                let mut own = context[..shared].to_vec();
                own.extend(fresh(5));
                sessions.push((own, 2 + rng.log_normal(2.0, 0.7) as usize, false));
                queue.push((std::cmp::Reverse(((at + 5.0 * rng.next()) * 1e6) as u64), sessions.len() - 1));
            }
        }
        context.extend(fresh(2 + rng.log_normal(1.0, 1.2) as usize));
        if context.len() > 3000 {
            context.truncate(60);
            context.extend(fresh(60));
        }
        if left > 1 {
            let pause = if rng.next() < 0.93 { rng.log_normal(1.2, 1.2) } else { rng.log_normal(5.0, 1.0) };
            sessions[who] = (context, left - 1, main);
            queue.push((std::cmp::Reverse(((at + pause) * 1e6) as u64), who));
        } else if main {
            start(&mut rng, at + 30.0, &mut sessions, &mut queue);
        }
    }
    requests
}

/// Tokens of a named block.
fn block(name: u32, out: &mut Vec<u32>) {
    let mut x = (u64::from(name) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    out.extend((0..BLOCK).map(|_| {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 20) as u32 % 129_280
    }));
}

fn replay(requests: &[Request], pages: u32, eviction: Eviction) -> (u64, f64) {
    let options = CacheOptions { pages, eviction, ..CacheOptions::default() };
    let mut cache = KvCache::new(&presets::flash(), &options).expect("the options are valid");
    let (mut hits, mut micros, mut tokens) = (0, 0.0, Vec::new());
    for names in requests.iter().filter(|r| !r.is_empty()) {
        tokens.clear();
        names.iter().for_each(|&name| block(name, &mut tokens));
        let n = tokens.len() as u32;
        let start = std::time::Instant::now();
        let known = cache.lookup(b"", &tokens, n).history;
        let mut seq = cache.attach(b"", &tokens, known, Hint::default());
        hits += u64::from(known) / BLOCK as u64;
        if cache.extend(&mut seq, n).is_ok() {
            cache.publish(&mut seq, &tokens, Step(0));
        }
        cache.release(seq, Step(0));
        micros += start.elapsed().as_secs_f64() * 1e6;
    }
    (hits, micros / requests.len() as f64)
}

fn main() {
    let mut args = std::env::args().skip(1);
    let source = args.next().expect("usage: trace_hit TRACE.jsonl|agents[:SEED] [BLOCKS,...]");
    let requests = match source.strip_prefix("agents") {
        Some(seed) => agents(seed.trim_start_matches(':').parse().unwrap_or(1)),
        None => from_file(&source),
    };
    let sizes = args.next().unwrap_or_else(|| "4096,16384,65536".to_owned());
    let total: usize = requests.iter().map(Vec::len).sum();
    println!("{source}: {} requests, {total} whole blocks", requests.len());
    println!("{:>8} {}", "blocks", Eviction::ALL.map(|e| format!("{:>20}", e.name())).join(""));
    for pages in sizes.split(',').map(|n| n.parse().expect("BLOCKS are numbers")) {
        let cell = |eviction| {
            let (hits, micros) = replay(&requests, pages, eviction);
            format!("{:>9.4} {micros:>5.0} us/r", hits as f64 / total as f64)
        };
        println!("{pages:>8} {}", Eviction::ALL.map(cell).join(""));
    }
}

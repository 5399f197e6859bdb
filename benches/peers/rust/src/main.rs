//! Measures and prints JSON lines.
//!
//!     dsv4-peer-bench micro              match, insert, evict, bytes, churn, steps
//!     dsv4-peer-bench trace FILE         hits and cost of a trace at several capacities
//!     dsv4-peer-bench growth [LARGEST]   match and step cost as tree and running requests grow
//!     dsv4-peer-bench count SYSTEM PATH N   runs match, insert or evict N times, for `benches/counts.sh`

use std::hint::black_box;
use std::process::ExitCode;

use dsv4_core::cache::Eviction;
use dsv4_core::cache::pool::PagePool;
use dsv4_core::layout::presets;
use dsv4_peer_bench::measure::{Counting, heap, median, report, report_us, us};
use dsv4_peer_bench::step::{MOST_NEW, Steps};
use dsv4_peer_bench::systems::{Floor, Maker, Ours, PrefixCache, all};
use dsv4_peer_bench::workload::{BLOCK, MILLION, Request, clairvoyant, tokens, trace};
use serde_json::json;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const BLOCKS: usize = MILLION / BLOCK;
const CHUNK: usize = 8192;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["micro"] => micro(),
        ["trace", path] => match trace(path) {
            Ok(requests) => replay(&requests),
            Err(e) => return fail(&format!("{path}: {e}")),
        },
        ["growth"] => growth(10_000_000),
        ["growth", largest] if largest.parse::<usize>().is_ok() => {
            growth(largest.parse().unwrap_or_default())
        }
        ["count", system, path, times @ ("1" | "2")] => {
            match all().into_iter().find(|m| m(1).name() == system) {
                Some(make) => count(make, path, if times == "1" { 1 } else { 2 }),
                None => return fail(&format!("{system} is not in this build")),
            }
        }
        _ => return fail("usage: dsv4-peer-bench micro | trace FILE | growth [LARGEST]"),
    }
    ExitCode::SUCCESS
}

#[expect(clippy::print_stderr, reason = "a program")]
fn fail(message: &str) -> ExitCode {
    eprintln!("{message}");
    ExitCode::from(2)
}

/// Runs a path once or twice on 262,144 tokens; set-up is the same, so the difference is the path alone.
fn count(make: Maker, path: &str, times: usize) {
    let prompts = [tokens(1, MILLION / 4), tokens(2, MILLION / 4)];
    let mut cache = make(2 * BLOCKS);
    if path != "insert" {
        prompts.iter().for_each(|p| _ = cache.request(p, 0));
    }
    for prompt in &prompts[..times] {
        match path {
            "match" => assert_eq!(cache.matched(prompt), BLOCKS / 4),
            "insert" => assert_eq!(cache.request(prompt, 0), Some(0)),
            _ => cache.evict(BLOCKS / 4),
        }
    }
}

fn micro() {
    let million = tokens(7, MILLION);
    floors(&million);
    for make in all() {
        matching(make, &million);
        inserting(make, &million);
        bytes_per_block(make);
    }
    churn();
    for running in [64, 256, 1024, 4096] {
        steps(running);
    }
}

/// Pages for that many requests in decode, and a million tokens besides.
fn pages_for(running: u32) -> u32 {
    running * (CHUNK as u32 + MOST_NEW) / BLOCK as u32 + 2 * BLOCKS as u32
}

/// What the machine does with the same bytes.
fn floors(million: &[u32]) {
    let twin = million.to_vec();
    let compare = || us(|| black_box(black_box(million) == black_box(&twin[..]))).0;
    median(101, compare); // the clock comes up to speed
    report_us("radix_match_1m", "floor", "memcmp", median(101, compare));
    report_us(
        "radix_insert_1m",
        "floor",
        "memcpy",
        median(101, || us(|| black_box(black_box(million).to_vec())).0),
    );
}

/// A million tokens that came as 128 prompts, each 8,192 longer than the one before.
fn grown(cache: &mut dyn PrefixCache, million: &[u32]) {
    (CHUNK..=MILLION).step_by(CHUNK).for_each(|n| _ = cache.request(&million[..n], n as u64));
}

fn matching(make: Maker, million: &[u32]) {
    let mut cache = make(2 * BLOCKS);
    grown(&mut *cache, million);
    let mut half = million.to_vec();
    half[MILLION / 2] ^= 1;
    for (case, prompt, blocks) in
        [("full hit", million, BLOCKS), ("diverges in the middle", &half[..], BLOCKS / 2)]
    {
        assert_eq!(cache.matched(prompt), blocks, "{}", cache.name());
        let time = median(31, || us(|| black_box(cache.matched(black_box(prompt)))).0);
        report_us("radix_match_1m", case, cache.name(), time);
    }
}

fn inserting(make: Maker, million: &[u32]) {
    let fresh = || make(2 * BLOCKS);
    let name = fresh().name().to_owned();
    let insert = median(11, || {
        let mut cache = fresh();
        us(|| assert_eq!(cache.request(million, 1), Some(0))).0
    });
    report_us("radix_insert_1m", "cold", &name, insert);
    // A server's usual case: memory is in use, and something else has to go.
    let (mut cache, other) = (make(BLOCKS), tokens(8, MILLION));
    let mut turn = 0;
    let replace = median(12, || {
        turn += 1;
        let prompt = if turn % 2 == 0 { million } else { &other[..] };
        us(|| cache.request(prompt, turn)).0
    });
    if name != "dynamo-kv-router" {
        report_us("radix_insert_1m", "in place of another", &name, replace);
    }
    let evict = median(11, || {
        // As large as what it holds, so that every system has to evict to give pages.
        let mut cache = make(BLOCKS);
        cache.request(million, 1);
        us(|| cache.evict(BLOCKS)).0
    });
    report_us("radix_evict_1m", "all of it", &name, evict);
}

fn bytes_per_block(make: Maker) {
    let (blocks, each) = (1 << 18, 512);
    let empty = heap();
    let mut cache = make(blocks);
    let slots = heap() - empty;
    for i in 0..blocks / each {
        cache.request(&tokens(1000 + i as u64, each * BLOCK), i as u64);
    }
    let all = (heap() - empty) as f64 / blocks as f64;
    let numbers = json!({
        "bytes": all - cache.token_bytes() as f64,
        "of_tokens": cache.token_bytes(),
        "before_use": slots as f64 / blocks as f64,
    });
    report("cache_bytes", "262,144 blocks", cache.name(), numbers);
}

fn churn() {
    let mut pool = PagePool::new(1 << 16);
    let mut held = Vec::with_capacity(4096);
    let mut floor = Floor::new(1 << 16);
    #[cfg(feature = "kvbm")]
    let kvbm = dsv4_peer_bench::kvbm::Kvbm::new(1 << 16);
    for n in [1usize, 16, 512, 4096] {
        let repeats = (1 << 14) / n;
        let time = |system: &str, f: &mut dyn FnMut()| {
            let (us, low) = median(15, || us(|| (0..repeats).for_each(|_| f())).0 / (repeats * n) as f64);
            report(
                "alloc_churn",
                &format!("{n} pages"),
                system,
                json!({ "ns": us * 1e3, "low_ns": low * 1e3 }),
            );
        };
        time("dsv4", &mut || {
            assert!(pool.alloc(n as u32, &mut held));
            held.drain(..).for_each(|p| pool.release(p));
        });
        time("floor", &mut || floor.churn(n));
        #[cfg(feature = "kvbm")]
        time("kvbm-logical", &mut || kvbm.churn(n));
    }
}

fn steps(running: u32) {
    let mut steps = Steps::new(&presets::flash(), pages_for(running), running, CHUNK, CHUNK as u32);
    let case = format!("{running} decodes at 8K");
    let mut times: Vec<f64> = (0..300).map(|_| us(|| steps.step()).0).collect();
    times.sort_by(f64::total_cmp);
    let numbers = json!({ "us": times[150], "low_us": times[0], "p99_us": times[297], "per_request_us": times[150] / f64::from(running) });
    report("sched_step", &case, "dsv4", numbers);
    let mut left = 0;
    let time = median(2 * MILLION / CHUNK, || {
        if left == 0 {
            steps.restart_long(MILLION);
            left = MILLION / CHUNK;
        }
        left -= 1;
        us(|| steps.step()).0
    });
    report_us("sched_step", &format!("{case} and a 1M prefill"), "dsv4", time);
}

const CAPACITIES: [usize; 4] = [4096, 16_384, 65_536, 600_000];

fn replay(requests: &[Request]) {
    let blocks: usize = requests.iter().map(|r| r.prompt.len() / BLOCK).sum();
    let mut makers = all();
    makers.push(|n| Box::new(Ours::new(n, Eviction::VALUE)));
    makers.push(|n| Box::new(Ours::new(n, Eviction::FIFO)));
    for capacity in CAPACITIES {
        let case =
            if capacity == CAPACITIES[3] { "unlimited".to_owned() } else { format!("{capacity} blocks") };
        for make in &makers {
            if make(1).name() == "dynamo-kv-router" && capacity != CAPACITIES[3] {
                continue; // an index without pages has no capacity
            }
            let (mut hits, mut refused, mut name) = (0, 0, String::new());
            let (time, low) = median(3, || {
                let mut cache = make(capacity);
                (hits, refused, name) = (0, 0, cache.name().to_owned());
                let mut one = |r: &Request| match cache.request(&r.prompt, r.at_us) {
                    Some(blocks) => hits += blocks,
                    None => refused += 1,
                };
                us(|| requests.iter().for_each(&mut one)).0 / requests.len() as f64
            });
            let numbers =
                json!({ "hit": hits as f64 / blocks as f64, "refused": refused, "us": time, "low_us": low });
            report("trace", &case, &name, numbers);
        }
        let hits = clairvoyant(requests, capacity);
        report("trace", &case, "clairvoyant", json!({ "hit": hits as f64 / blocks as f64 }));
    }
}

/// Blocks of 16 tokens, so that ten million of them fit into memory.
const SMALL: usize = 16;

fn growth(largest: usize) {
    let sizes = || std::iter::successors(Some(10_000), |n| Some(n * 10)).take_while(move |&n| n <= largest);
    let prompt = |i: usize| tokens(1_000_000 + i as u64, 64 * SMALL);
    for blocks in sizes() {
        let layout = presets::toy(SMALL as u32, 128, 1);
        let mut cache = Ours::with_layout(&layout, blocks + 1024, Eviction::LRU);
        let prompts = blocks / 64;
        (0..prompts).for_each(|i| _ = cache.request(&prompt(i), 0));
        let mut at = 0;
        let (us, low) = median(1001, || {
            at = (at + 7919) % prompts; // another one each time, so that its part of the tree is not in a CPU cache
            let wanted = prompt(at);
            us(|| assert_eq!(cache.matched(&wanted), 64)).0
        });
        let bytes = cache.cache.metadata_bytes() as f64 / f64::from(cache.cache.cached_blocks());
        let numbers = json!({ "blocks": blocks, "us": us, "low_us": low, "metadata_bytes": bytes });
        report("growth", "match of a random prompt of 64 blocks", "dsv4", numbers);
    }
    for blocks in sizes() {
        let pages = (blocks + blocks / 4) as u32 + 256 * (1024 + MOST_NEW) / SMALL as u32;
        let mut steps = Steps::idle(&presets::toy(SMALL as u32, 128, 1), pages, 256, 1 << 16);
        steps.fill((0..blocks / 64).map(prompt));
        steps.start(256, 1024);
        let (us, low) = median(301, || us(|| steps.step()).0);
        let numbers = json!({ "blocks": steps.cached_blocks(), "us": us, "low_us": low });
        report("growth", "step of 256 decodes", "dsv4", numbers);
    }
    for running in [64, 128, 256, 512, 1024, 2048, 4096] {
        let mut steps = Steps::new(&presets::flash(), pages_for(running), running, CHUNK, CHUNK as u32);
        let (us, low) = median(201, || us(|| steps.step()).0);
        let numbers = json!({ "running": running, "us": us, "low_us": low });
        report("growth", "step by running requests", "dsv4", numbers);
    }
}

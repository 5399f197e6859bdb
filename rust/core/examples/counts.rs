//! Runs one hot path a given number of times, for `benches/counts.sh`: `counts
//! match|insert|evict|alloc|step REPETITIONS`.

use dsv4_core::cache::pool::PagePool;
use dsv4_core::cache::retention::Hint;
use dsv4_core::cache::{CacheOptions, Eviction, KvCache};
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::presets;
use dsv4_core::plan::Plan;
use dsv4_core::sched::request::Submit;
use dsv4_core::{Core, Options};

const TOKENS: u32 = 1 << 18;

fn tokens(seed: u32) -> Vec<u32> {
    (0..TOKENS).map(|i| (i ^ seed).wrapping_mul(2_654_435_761) >> 15).collect()
}

fn store(cache: &mut KvCache, tokens: &[u32]) {
    let mut seq = cache.attach(b"", tokens, 0, Hint::default());
    cache.extend(&mut seq, TOKENS).expect("the pool is large enough");
    cache.publish(&mut seq, tokens, Step(0));
    cache.release(seq, Step(0));
}

/// 1,024 requests in decode after 128 tokens each, then `times` steps.
fn steps(times: usize) {
    let n = 1024;
    let options = Options { pages: 1 << 13, slabs: n, max_step_tokens: 1 << 18, ..Options::default() };
    let mut core = Core::new(&presets::flash(), options).expect("the options are valid");
    for i in 0..n {
        let prompt = (0..128).map(|t| if t == 0 { i } else { t }).collect();
        let submit = Submit { id: RequestId(i.into()), prompt, max_new: Some(512), ..Submit::default() };
        core.submit(submit).expect("there is room");
    }
    let mut plan = Plan::new(core.plan_schema());
    let (samples, accepted, mut events) = (vec![0; n as usize], vec![1; n as usize], vec![0; 6 * 4096]);
    for _ in 0..=times {
        let header = core.plan(plan.words()).expect("the buffer is long enough").expect("there is work");
        core.commit(Step(header.step), &samples, &accepted).expect("it is in flight");
        while core.events_into(&mut events) > 0 {}
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let (path, times) =
        (args.next().unwrap_or_default(), args.next().and_then(|n| n.parse().ok()).unwrap_or(1));
    if path == "step" {
        return steps(times);
    }
    let options = CacheOptions { pages: 4096, eviction: Eviction::LRU, ..CacheOptions::default() };
    let mut cache = KvCache::new(&presets::flash(), &options).expect("the options are valid");
    // What a path starts from is made as often whatever the repetitions, so that their difference is the path alone.
    let prompts = [tokens(1 << 20), tokens(1 << 21)];
    if path != "insert" {
        prompts.iter().for_each(|t| store(&mut cache, t));
    }
    let mut pool = PagePool::new(4096);
    let mut held = Vec::with_capacity(4096);
    for prompt in prompts.iter().take(times) {
        match path.as_str() {
            "match" => assert_eq!(cache.lookup(b"", prompt, TOKENS).history, TOKENS),
            "insert" => store(&mut cache, prompt),
            "evict" => assert_eq!(cache.evict_history(TOKENS / 256), TOKENS / 256),
            _ => {
                assert!(pool.alloc(4096, &mut held));
                held.drain(..).for_each(|p| pool.release(p));
            }
        }
    }
}

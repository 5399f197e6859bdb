//! Any order of cache operations keeps every invariant.
//!
//!     RUSTC_BOOTSTRAP=1 cargo fuzz run cache_ops --fuzz-dir rust/fuzz
#![no_main]

use arbitrary::Arbitrary;
use dsv4_core::cache::{CacheOptions, Eviction, KvCache, Sequence};
use dsv4_core::fence::Tickets;
use dsv4_core::ids::Step;
use dsv4_core::cache::retention::Hint;
use dsv4_core::layout::presets;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
enum Op {
    /// Starts a prompt of the low bits of `bits`.
    Attach { salt: bool, length: u8, bits: u64 },
    /// Computes further tokens of a running prompt and publishes them.
    Compute { which: u8, tokens: u8 },
    Save { which: u8, block: u8, evict: bool },
    Lease { salt: bool, length: u8, bits: u64 },
    Release { which: u8 },
    Launch,
    /// Ends one of the copies that hold a state, in any order.
    EndCopy { which: u8 },
    Retire,
    EvictSnapshots(u8),
    EvictHistory(u8),
}

struct Running {
    seq: Sequence,
    tokens: Vec<u32>,
    computed: usize,
}

fn prompt(length: u8, bits: u64) -> Vec<u32> {
    (0..usize::from(length % 48) + 1).map(|i| (bits >> (i % 64)) as u32 & 1).collect()
}

fuzz_target!(|ops: Vec<Op>| {
    let options = CacheOptions { pages: 24, eviction: Eviction::LRU, ..CacheOptions::default() };
    let mut cache = KvCache::new(&presets::toy(4, 6, 3), &options).expect("the options are valid");
    let (mut running, mut step): (Vec<Running>, u64) = (Vec::new(), 0);
    let (mut tickets, mut copies) = (Tickets::default(), Vec::new());
    for op in ops {
        let pick = |which: u8, n: usize| (n > 0).then(|| usize::from(which) % n);
        match op {
            Op::Attach { salt, length, bits } if running.len() < 6 => {
                let tokens = prompt(length, bits);
                let salt = [u8::from(salt)];
                let found = cache.lookup(&salt, &tokens, tokens.len() as u32 - 1);
                let seq = cache.attach_found(&salt, &tokens, found.history, Hint::default(), &found);
                running.push(Running { seq, tokens, computed: found.history as usize });
            }
            Op::Compute { which, tokens } => {
                let Some(i) = pick(which, running.len()) else { continue };
                let r = &mut running[i];
                let upto = (r.computed + usize::from(tokens % 16)).min(r.tokens.len());
                if cache.extend(&mut r.seq, upto as u32).is_ok() {
                    cache.publish(&mut r.seq, &r.tokens[..upto], Step(step));
                    r.computed = upto;
                }
            }
            Op::Save { which, block, evict } => {
                let Some(i) = pick(which, running.len()) else { continue };
                let pos = u32::from(block % 12) * 4;
                let Some(pages) = cache.reserve_snapshot(&running[i].seq, pos, evict) else { continue };
                if let Err(pages) = cache.publish_snapshot(&mut running[i].seq, pos, pages) {
                    cache.drop_snapshot(pages, Step(step));
                }
            }
            Op::Lease { salt, length, bits } => {
                let tokens = prompt(length, bits);
                let found = cache.lookup(&[u8::from(salt)], &tokens, tokens.len() as u32);
                if let Some(&(_, id)) = found.snapshots.last() {
                    cache.lease_snapshot(id, tickets.open(&mut copies));
                }
            }
            Op::Release { which } => {
                let Some(i) = pick(which, running.len()) else { continue };
                cache.release(running.swap_remove(i).seq, Step(step));
            }
            Op::Launch => step += 1,
            Op::Retire => cache.retire(Step(step), &[]),
            Op::EndCopy { which } => {
                let Some(i) = pick(which, copies.len()) else { continue };
                let ended = [copies.swap_remove(i)];
                tickets.end(&ended);
                cache.retire(Step(0), &ended);
            }
            Op::EvictSnapshots(n) => drop(cache.evict_snapshots(u32::from(n % 4))),
            Op::EvictHistory(n) => drop(cache.evict_history(u32::from(n % 4))),
            Op::Attach { .. } => {}
        }
        cache.check(running.iter().map(|r| &r.seq), std::iter::empty()).expect("the cache is sound");
    }
});

//! The prefix tree at a million tokens, beside a plain compare and copy of the same tokens in the same run.
//!
//!     cargo bench -p dsv4-core --bench tree
//!
//! - `radix_match_1m/*`: a whole hit, and one that diverges in the middle, stored as 128 prompts of growing length;
//!   `memcmp` is the floor.
//! - `radix_insert_1m`, `radix_evict_1m`: publish and evict all 4,096 blocks; `memcpy` is the floor of the former.
//! - `radix_growth/*`: a match of 8,192 tokens while the tree holds 10^3 to 10^5 other blocks.
//!
//! Bytes of bookkeeping per cached page are printed at the start (`cache_bytes`).
#![allow(missing_docs, clippy::print_stdout)]

use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use dsv4_core::cache::{CacheOptions, Eviction, KvCache};
use dsv4_core::ids::Step;
use dsv4_core::layout::presets;
use dsv4_core::retention::Hint;

const MILLION: u32 = 1 << 20;
const BLOCK: u32 = 256;

fn tokens(seed: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| (i ^ seed).wrapping_mul(2_654_435_761) >> 15).collect()
}

fn cache(pages: u32) -> KvCache {
    let options = CacheOptions { pages, eviction: Eviction::Lru, ..CacheOptions::default() };
    KvCache::new(&presets::flash(), &options).expect("the options are valid")
}

/// Publishes `tokens` as a prompt that ran alone.
fn store(cache: &mut KvCache, tokens: &[u32]) {
    let known = cache.lookup(b"", tokens, tokens.len() as u32).history;
    let mut seq = cache.attach(b"", tokens, known, Hint::default());
    cache.extend(&mut seq, tokens.len() as u32).expect("the pool is large enough");
    cache.publish(&mut seq, tokens, Step(0));
    cache.release(seq, Step(0));
}

/// A million tokens stored by 128 prompts, each 8,192 tokens longer than the one before.
fn million() -> (KvCache, Vec<u32>) {
    let (mut c, t) = (cache(8192), tokens(1, MILLION));
    for end in (8192..=MILLION).step_by(8192) {
        store(&mut c, &t[..end as usize]);
    }
    (c, t)
}

fn radix_match(c: &mut Criterion) {
    let (cache, t) = million();
    let per_page = cache.metadata_bytes() as f64 / f64::from(cache.cached_blocks());
    println!("cache_bytes: {per_page:.1} B of bookkeeping per cached page, tokens left out");
    let mut half = t.clone();
    half[MILLION as usize / 2] ^= 1;
    let mut group = c.benchmark_group("radix_match_1m");
    let twin = t.clone();
    group.bench_function("memcmp", |b| b.iter(|| black_box(black_box(&t) == black_box(&twin))));
    group.bench_function("full_hit", |b| b.iter(|| cache.lookup(b"", black_box(&t), MILLION).history));
    group.bench_function("diverges_in_the_middle", |b| {
        b.iter(|| cache.lookup(b"", black_box(&half), MILLION).history);
    });
    group.finish();
}

fn radix_insert_and_evict(c: &mut Criterion) {
    let t = tokens(1, MILLION);
    let mut group = c.benchmark_group("radix_insert_evict_1m");
    group.sample_size(20);
    group.bench_function("memcpy", |b| b.iter(|| black_box(&t).clone()));
    group.bench_function("insert", |b| {
        b.iter_batched_ref(|| cache(8192), |cache| store(cache, &t), BatchSize::LargeInput);
    });
    let full = || {
        let mut cache = cache(8192);
        store(&mut cache, &t);
        cache
    };
    group.bench_function("evict", |b| {
        b.iter_batched_ref(full, |cache| cache.evict_history(MILLION / BLOCK), BatchSize::LargeInput);
    });
    group.finish();
}

fn radix_growth(c: &mut Criterion) {
    let mut group = c.benchmark_group("radix_growth");
    let wanted = tokens(7, 8192);
    for blocks in [1_000u32, 10_000, 100_000] {
        let mut cache = cache(blocks + 4096);
        store(&mut cache, &wanted);
        for other in 0..blocks / 8 {
            store(&mut cache, &tokens(1_000_000 + other, 8 * BLOCK));
        }
        group.bench_function(BenchmarkId::from_parameter(blocks), |b| {
            b.iter(|| cache.lookup(b"", black_box(&wanted), 8192).history);
        });
    }
    group.finish();
}

criterion_group!(benches, radix_match, radix_insert_and_evict, radix_growth);
criterion_main!(benches);

//! The prefix tree at a million tokens, beside a plain compare and copy of the same tokens in the same run.
//!
//!     cargo bench -p dsv4-core --bench tree
//!
//! - `radix_match_1m/*`: a whole hit, and one that diverges in the middle, stored as 128 prompts of growing length;
//!   `memcmp` is the floor.
//! - `radix_insert_evict_1m/*`: store and evict all 4,096 blocks in a cache that has been in use; `memcpy` into memory that
//!   has been in use is the floor of the former.
//! - `radix_growth/*`: a match of 8,192 tokens while the tree holds 10^3 to 10^5 other blocks.
//!
//! `cache_bytes` is printed at the start: what the allocator gave for 2^20 cached pages in prompts of 32, tokens left out.
//! The same beside other engines' caches, and up to 10^7 blocks: `benches/peers`.
#![allow(missing_docs, clippy::print_stdout)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use dsv4_core::cache::retention::Hint;
use dsv4_core::cache::{CacheOptions, Eviction, KvCache};
use dsv4_core::ids::Step;
use dsv4_core::layout::presets;

/// Bytes that live on the heap.
static LIVE: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: every call is the system allocator's; only sizes are counted.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        LIVE.fetch_add(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LIVE.fetch_add(size, Ordering::Relaxed);
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MILLION: u32 = 1 << 20;
const BLOCK: u32 = 256;

fn tokens(seed: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| (i ^ seed).wrapping_mul(2_654_435_761) >> 15).collect()
}

fn cache(pages: u32) -> KvCache {
    let options = CacheOptions { pages, eviction: Eviction::LRU, ..CacheOptions::default() };
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

/// What the allocator gave for 2^20 cached pages, each prompt of 32 an edge of its own.
fn cache_bytes() {
    const SMALL: u32 = 16;
    let before = LIVE.load(Ordering::Relaxed);
    let options = CacheOptions { pages: MILLION, eviction: Eviction::VALUE, ..CacheOptions::default() };
    let mut cache = KvCache::new(&presets::toy(SMALL, 128, 1), &options).expect("the options are valid");
    (0..MILLION / 32).for_each(|i| store(&mut cache, &tokens(1_000_000 + i, 32 * SMALL)));
    let bytes = LIVE.load(Ordering::Relaxed) - before - 4 * (SMALL * MILLION) as usize;
    let (blocks, counted) = (f64::from(cache.cached_blocks()), cache.metadata_bytes() as f64);
    println!(
        "cache_bytes: {:.1} B per cached page, {:.1} by its own count",
        bytes as f64 / blocks,
        counted / blocks
    );
}

fn radix_match(c: &mut Criterion) {
    cache_bytes();
    let (cache, t) = million();
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
    let mut copy = t.clone();
    group.bench_function("memcpy", |b| b.iter(|| copy.copy_from_slice(black_box(&t))));
    let mut cache = cache(8192);
    // Both halves of one turn; each is timed alone.
    let mut turn = |times: u64, inserts: bool| {
        let mut total = Duration::ZERO;
        for _ in 0..times {
            let start = Instant::now();
            store(&mut cache, &t);
            let stored = Instant::now();
            assert_eq!(cache.evict_history(MILLION / BLOCK), MILLION / BLOCK);
            total += if inserts { stored - start } else { stored.elapsed() };
        }
        total
    };
    group.bench_function("insert", |b| b.iter_custom(|times| turn(times, true)));
    group.bench_function("evict", |b| b.iter_custom(|times| turn(times, false)));
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

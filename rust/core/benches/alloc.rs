//! Taking and giving back pages: nanoseconds per page should not depend on how many.
//!
//!     cargo bench -p dsv4-core --bench alloc
#![allow(missing_docs)]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dsv4_core::cache::pool::PagePool;

fn alloc_churn(c: &mut Criterion) {
    let mut group = c.benchmark_group("alloc_churn");
    let mut pool = PagePool::new(65_536);
    let mut held = Vec::with_capacity(4096);
    for pages in [1, 16, 512, 4096] {
        group.throughput(Throughput::Elements(u64::from(pages)));
        group.bench_function(BenchmarkId::from_parameter(pages), |b| {
            b.iter(|| {
                assert!(pool.alloc(pages, &mut held));
                held.drain(..).for_each(|p| pool.release(p));
            });
        });
    }
    group.finish();
}

criterion_group!(benches, alloc_churn);
criterion_main!(benches);

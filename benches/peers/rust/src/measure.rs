//! Medians of times, bytes on the heap, and results as JSON lines.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Instant;

use serde_json::{Value, json};

/// The system's allocator, which knows how much is in use.
pub struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is the system allocator's own; only a counter is kept beside it.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size(), Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        IN_USE.fetch_add(size, Relaxed);
        IN_USE.fetch_sub(layout.size(), Relaxed);
        unsafe { System.realloc(at, layout, size) }
    }
}

/// Bytes on the heap now.
pub fn heap() -> usize {
    IN_USE.load(Relaxed)
}

/// Microseconds that `f` takes, and what it gives.
pub fn us<T>(f: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let value = f();
    (start.elapsed().as_secs_f64() * 1e6, value)
}

/// The middle of `n` runs of `f`, which returns the time of what counts; and the lowest.
pub fn median(n: usize, mut f: impl FnMut() -> f64) -> (f64, f64) {
    let mut times: Vec<f64> = (0..n).map(|_| f()).collect();
    times.sort_by(f64::total_cmp);
    (times[n / 2], times[0])
}

/// Prints one result: `bench`, `case`, `system`, and its numbers.
#[expect(clippy::print_stdout, reason = "results go to standard output")]
pub fn report(bench: &str, case: &str, system: &str, numbers: Value) {
    let mut line = json!({ "bench": bench, "case": case, "system": system });
    if let (Value::Object(line), Value::Object(numbers)) = (&mut line, numbers) {
        line.extend(numbers);
    }
    println!("{line}");
}

/// Reports a median and the lowest time.
pub fn report_us(bench: &str, case: &str, system: &str, (median, low): (f64, f64)) {
    report(bench, case, system, json!({ "us": round(median), "low_us": round(low) }));
}

fn round(x: f64) -> f64 {
    (x * 1000.0).round() / 1000.0
}

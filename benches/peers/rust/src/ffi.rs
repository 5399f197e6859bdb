//! dsv4's cache and scheduler behind a C interface, for the Python peers.
//!
//! Safety: handles come from the `new` functions and go to `free` once; `tokens` points at `n` numbers.

use dsv4_core::cache::Eviction;
use dsv4_core::cache::pool::PagePool;
use dsv4_core::layout::presets;

use crate::step::{MOST_NEW, Steps};
use crate::systems::{Ours, PrefixCache};

/// A cache of `blocks` blocks.
#[unsafe(no_mangle)]
pub extern "C" fn cache_new(blocks: u32) -> *mut Ours {
    Box::into_raw(Box::new(Ours::new(blocks as usize, Eviction::LRU)))
}

/// Frees a cache.
///
/// # Safety
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cache_free(cache: *mut Ours) {
    drop(unsafe { Box::from_raw(cache) });
}

/// Blocks of the prompt that are cached.
///
/// # Safety
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cache_match(cache: *mut Ours, tokens: *const u32, n: usize) -> usize {
    unsafe { (*cache).matched(std::slice::from_raw_parts(tokens, n)) }
}

/// A whole request; blocks that were cached, or -1.
///
/// # Safety
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cache_request(cache: *mut Ours, tokens: *const u32, n: usize, now_us: u64) -> i64 {
    let hits = unsafe { (*cache).request(std::slice::from_raw_parts(tokens, n), now_us) };
    hits.map_or(-1, |blocks| blocks as i64)
}

/// Evicts so many blocks.
///
/// # Safety
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cache_evict(cache: *mut Ours, blocks: usize) {
    unsafe { (*cache).evict(blocks) };
}

/// A pool of pages.
#[unsafe(no_mangle)]
pub extern "C" fn pool_new(pages: u32) -> *mut PagePool {
    Box::into_raw(Box::new(PagePool::new(pages)))
}

/// Takes and gives back `n` pages, so often.
///
/// # Safety
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pool_churn(pool: *mut PagePool, n: u32, times: u32) {
    let (pool, mut held) = (unsafe { &mut *pool }, Vec::with_capacity(n as usize));
    for _ in 0..times {
        assert!(pool.alloc(n, &mut held), "so many are free");
        held.drain(..).for_each(|page| pool.release(page));
    }
}

/// Frees it.
///
/// # Safety
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pool_free(pool: *mut PagePool) {
    drop(unsafe { Box::from_raw(pool) });
}

/// `n` requests in decode with `context` tokens each.
#[unsafe(no_mangle)]
pub extern "C" fn steps_new(n: u32, context: usize) -> *mut Steps {
    let pages = n * (context as u32 + MOST_NEW) / 256 + 64;
    Box::into_raw(Box::new(Steps::new(&presets::flash(), pages, n, context, 1 << 20)))
}

/// Plan and commit of one step.
///
/// # Safety
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn steps_run(steps: *mut Steps) -> u32 {
    unsafe { (*steps).step() }
}

/// Frees them.
///
/// # Safety
/// See the module.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn steps_free(steps: *mut Steps) {
    drop(unsafe { Box::from_raw(steps) });
}

//! What owners say of their prefixes, one rule at a time; `cache_model.rs` has them all at random.

#![allow(clippy::unwrap_used)]

use dsv4_core::cache::retention::{Hint, Retention};
use dsv4_core::cache::{CacheOptions, Eviction, KvCache, Sequence};
use dsv4_core::ids::Step;
use dsv4_core::layout::presets;

const BLOCK: u32 = 4;

fn cache(pages: u32, eviction: Eviction) -> KvCache {
    let options = CacheOptions { pages, eviction, snapshot_budget: 1.0, ..CacheOptions::default() };
    KvCache::new(&presets::toy(BLOCK, 6, 3), &options).unwrap()
}

fn session(key: u64) -> Hint {
    Hint { retention: Retention { session: Some(key), ..Retention::default() }, ..Hint::default() }
}

/// Tokens that no other `who` has, `blocks` of them.
fn prompt(who: u32, blocks: u32) -> Vec<u32> {
    (0..blocks * BLOCK).map(|i| who * 1000 + i).collect()
}

fn known(cache: &KvCache, tokens: &[u32]) -> u32 {
    cache.lookup(b"", tokens, tokens.len() as u32).history / BLOCK
}

fn start(cache: &mut KvCache, tokens: &[u32], hint: Hint) -> Sequence {
    let found = known(cache, tokens) * BLOCK;
    let mut seq = cache.attach(b"", tokens, found, hint);
    cache.extend(&mut seq, tokens.len() as u32).unwrap();
    cache.publish(&mut seq, tokens, Step(0));
    seq
}

fn run(cache: &mut KvCache, tokens: &[u32], hint: Hint) {
    let seq = start(cache, tokens, hint);
    cache.release(seq, Step(0));
}

#[test]
fn a_session_that_is_over_goes_first_but_not_what_others_share_with_it() {
    for eviction in Eviction::ALL {
        let mut cache = cache(32, eviction);
        let shared = prompt(1, 2);
        let of = |who| [shared.clone(), prompt(who, 3)].concat();
        run(&mut cache, &of(2), session(2));
        run(&mut cache, &of(3), session(3));
        // Session 3 was used last, and still goes first.
        assert!(cache.end_session(3) && !cache.end_session(3));
        cache.evict_history(3);
        assert_eq!((known(&cache, &of(2)), known(&cache, &of(3))), (5, 2), "{eviction:?}");
        assert!(!cache.end_session(77), "nothing is known of it");
    }
}

#[test]
fn what_only_the_older_turn_of_a_session_has_goes_before_the_newer_turn() {
    for eviction in Eviction::ALL {
        let mut cache = cache(32, eviction);
        let shared = prompt(1, 2);
        let older = [shared.clone(), prompt(2, 2)].concat();
        let newer = [shared.clone(), prompt(3, 3)].concat();
        run(&mut cache, &older, session(9));
        run(&mut cache, &newer, session(9));
        run(&mut cache, &prompt(4, 2), Hint::default());
        cache.evict_history(2);
        let left = [&older, &newer, &prompt(4, 2)].map(|t| known(&cache, t));
        assert_eq!(left, [2, 5, 2], "{eviction:?}");
    }
}

#[test]
fn the_newest_state_of_a_session_replaces_the_one_before_and_a_used_one_comes_back() {
    let mut cache = cache(64, Eviction::LRU);
    let other = prompt(7, 2);
    let mut seq = start(&mut cache, &other, Hint::default());
    let save = |cache: &mut KvCache, seq: &mut Sequence, pos: u32| {
        let pages = cache.reserve_snapshot(seq, pos, true).unwrap();
        cache.publish_snapshot(seq, pos, pages).unwrap()
    };
    save(&mut cache, &mut seq, 8);
    cache.release(seq, Step(0));
    let tokens = prompt(8, 6);
    let mut seq = start(&mut cache, &tokens, session(1));
    let states = [8, 16, 24].map(|pos| save(&mut cache, &mut seq, pos));
    cache.release(seq, Step(0));
    // The state at 8 was superseded, then used: it is an ordinary one again, and the newest used. 16 goes first, then the
    // least recently used of the rest.
    cache.lease_snapshot(states[0], Step(0));
    let left = |cache: &KvCache| -> Vec<u32> {
        let mine = cache.lookup(b"", &tokens, 24).snapshots;
        let others = cache.lookup(b"", &other, 8).snapshots;
        mine.iter().chain(&others).map(|s| s.0).collect()
    };
    assert_eq!(left(&cache), [8, 16, 24, 8]);
    cache.evict_snapshots(1);
    assert_eq!(left(&cache), [8, 24, 8]);
    cache.evict_snapshots(1);
    assert_eq!(left(&cache), [8, 24]);
}

#[test]
fn the_pages_of_a_running_request_push_out_no_more_than_it_needs_and_come_back_first() {
    for eviction in Eviction::ALL {
        let mut cache = cache(16, eviction);
        run(&mut cache, &prompt(1, 6), Hint::default());
        run(&mut cache, &prompt(2, 6), Hint::default());
        for turn in 0..50u32 {
            // Never published: private to the end.
            let mut seq = cache.attach(b"", &prompt(100 + turn, 5), 0, Hint::default());
            for tokens in 1..=5 * BLOCK {
                cache.extend(&mut seq, tokens).unwrap();
            }
            cache.release(seq, Step(0));
        }
        // Five pages were needed at a time and four were free: one block went, once and for all.
        assert_eq!(cache.counters().evicted_blocks, 1, "{eviction:?}");
    }
}

#[test]
fn a_time_to_live_outlasts_everything_but_a_running_request() {
    let mut cache = cache(8, Eviction::VALUE);
    let kept = Retention { ttl_us: Some(1_000), ..Retention::default() };
    run(&mut cache, &prompt(1, 4), Hint { retention: kept, ..Hint::default() });
    run(&mut cache, &prompt(2, 3), Hint::default());
    run(&mut cache, &prompt(3, 3), Hint::default());
    assert_eq!([1, 2, 3].map(|p| known(&cache, &prompt(p, 3))), [3, 1, 3]);
    // A copy of a state does not get it, a running request does.
    let seq = start(&mut cache, &prompt(4, 4), Hint::default());
    assert!(cache.reserve_snapshot(&seq, 4, true).is_none());
    let more = start(&mut cache, &prompt(5, 2), Hint::default());
    assert_eq!(known(&cache, &prompt(1, 4)), 2);
    cache.release(seq, Step(0));
    cache.release(more, Step(0));
    // Its time is over, and it is the oldest.
    cache.set_time(1_000);
    cache.evict_history(2);
    assert_eq!(known(&cache, &prompt(1, 4)), 0);
}

//! Fifteen bugs that other engines had, each as a test of this one. Names and numbers follow docs/fifteen-bugs.md.
//!
//! Where a bug needs a part that does not exist here (drafts, tiers, transfers), the test holds the rule that it broke.

#![expect(clippy::unwrap_used, reason = "a refusal where none is expected fails the test")]

use std::collections::HashMap;

use dsv4_core::Options;
use dsv4_core::ids::RequestId;
use dsv4_core::layout::LayoutSpec;
use dsv4_core::layout::presets::{self, Past, toy_model};
use dsv4_core::sched::explain::Reason;
use dsv4_core::sched::request::Submit;
use dsv4_sim::world::World;

fn geometry(csa_ratio: u32, hca_ratio: u32, window: u32, block_tokens: u32) -> LayoutSpec {
    toy_model(&[Past::None, Past::Overlap(csa_ratio), Past::Plain(hca_ratio)], window, block_tokens, 640)
}

fn options() -> Options {
    let snapshots = "forks".parse().unwrap();
    Options { pages: 64, slabs: 4, max_step_tokens: 16, max_len: 200, snapshots, ..Options::default() }
}

/// Random-looking tokens; equal seeds start equal.
fn text(seed: u32, n: u32) -> Vec<u32> {
    (0..n).map(|i| (seed.wrapping_mul(2_654_435_761).wrapping_add(i * 40_503) >> 7) % 5).collect()
}

/// A world, and the two calls that most of these tests consist of.
struct Stage(World);

impl Stage {
    fn new(options: Options) -> Self {
        Stage(World::scripted(&presets::toy_v4(), options, 5))
    }

    fn enter(&mut self, prompt: Vec<u32>, max_new: u32) -> u64 {
        self.0.enter(Submit { prompt, max_new: Some(max_new), ..Submit::default() }).unwrap();
        self.0.last_id()
    }

    /// Runs a request to its end, alone. Returns its conversation.
    fn run(&mut self, prompt: Vec<u32>, max_new: u32) -> Vec<u32> {
        let id = self.enter(prompt, max_new);
        self.0.settle().unwrap();
        self.0.expected(id).to_vec()
    }

    /// One plan and, where `commit` says so, its result.
    fn step(&mut self, commit: bool) {
        self.0.plan().unwrap();
        self.0.check().unwrap();
        if commit {
            self.0.commit().unwrap();
            self.0.check().unwrap();
        }
    }

    fn stats(&mut self) -> HashMap<String, u64> {
        self.0.core().stats().into_iter().collect()
    }

    fn resumed(&mut self, id: u64) -> (u32, u32, Reason) {
        let e = self.0.core().explain(RequestId(id)).unwrap();
        (e.history_matched, e.resumed_at, e.reason)
    }

    /// Every page is free, holds a cached block, a snapshot, or belongs to somebody; nothing is counted twice.
    fn conserves_pages(&mut self) {
        let s = self.stats();
        let cached = s["cached_pages"] + s["snapshot_pages"];
        assert!(s["free_pages"] + cached <= s["pages"], "{s:?}");
        assert!(s["free_pages"] <= s["available_pages"] && s["available_pages"] <= s["pages"], "{s:?}");
    }
}

#[test]
fn bug_01_a_hit_from_another_slab_reads_the_state_of_the_prefix_and_not_of_the_slab() {
    let mut stage = Stage::new(options());
    let a = stage.run(text(1, 30), 9);
    let b = text(2, 30);
    // Other requests hold the first slabs, so the second run of `a` gets another one.
    let others = [stage.enter(b.clone(), 40), stage.enter(text(3, 22), 40)];
    (0..6).for_each(|_| stage.step(true));
    let again = stage.enter(a.clone(), 9);
    stage.0.settle().unwrap();
    assert!(stage.resumed(again).1 >= 28, "{:?}", stage.resumed(again));
    assert_eq!(stage.resumed(others[0]).1, 0);
    stage.run(b, 9);
    stage.run(a, 9);
}

#[test]
fn bug_02_whatever_is_published_is_found_again() {
    for n in 1..60 {
        let mut stage = Stage::new(options());
        let said = stage.run(text(n, n), 5);
        let known = said.len() as u32 - 1;
        let id = stage.enter(said.iter().copied().chain([1, 2, 3, 4]).collect(), 1);
        stage.0.settle().unwrap();
        let (matched, resumed, reason) = stage.resumed(id);
        assert_eq!(matched, known / 4 * 4, "a conversation of {known} computed tokens");
        assert!(resumed == matched || reason == Reason::DeclinedByCost, "{matched} {resumed} {reason:?}");
    }
}

#[test]
fn bug_03_passing_state_does_not_push_out_prefixes_of_a_pool_that_is_half_empty() {
    let mut stage = Stage::new(Options { pages: 400, ..options() });
    let mut talks: Vec<Vec<u32>> = (0..6).map(|i| text(100 + i, 60)).collect();
    for turn in 0..4 {
        for talk in &mut talks {
            let id = stage.enter(talk.clone(), 4);
            stage.0.settle().unwrap();
            *talk = [stage.0.expected(id), &text(turn, 3)].concat();
            assert!(turn == 0 || stage.resumed(id).1 + 4 >= stage.resumed(id).0, "{:?}", stage.resumed(id));
        }
    }
    let s = stage.stats();
    assert_eq!((s["evicted_blocks"], s["snapshots_evicted"], s["preemptions"]), (0, 0, 0));
    assert!(s["free_pages"] * 2 > s["pages"], "the pool was to stay half empty: {s:?}");
}

#[test]
fn bug_04_pages_are_conserved_after_every_operation() {
    let mut stage = Stage::new(Options { pages: 24, max_in_flight: 2, ..options() });
    for turn in 0..60 {
        stage.enter(text(turn % 5, 9 + turn % 30), turn % 11);
        stage.step(turn % 3 > 0);
        stage.conserves_pages();
    }
    stage.0.drain().unwrap();
    let s = stage.stats();
    assert_eq!(s["free_pages"], s["pages"]);
}

#[test]
fn bug_05_what_is_called_available_can_be_had_at_once() {
    let mut stage = Stage::new(Options { pages: 40, slabs: 2, ..options() });
    (0..12).for_each(|i| drop(stage.run(text(i, 37), 6)));
    let s = stage.stats();
    assert!(s["free_pages"] < 8 && s["available_pages"] == s["pages"], "the pool was to be full: {s:?}");
    // One request that needs every page of the pool.
    let id = stage.enter(text(77, 159), 2);
    stage.step(true);
    let s = stage.stats();
    assert_eq!((s["running"], s["waiting"]), (1, 0), "{s:?}");
    stage.0.settle().unwrap();
    assert_eq!(stage.resumed(id).0, 0);
}

#[test]
fn bug_06_every_row_is_where_its_position_says_after_eviction_and_resume() {
    let mut stage = Stage::new(Options { pages: 26, ..options() });
    for round in 0..12 {
        let said = stage.run(text(round % 3, 21 + round), 7);
        stage.0.core().evict_snapshots(round % 3);
        stage.0.core().evict_history(round % 5);
        stage.0.check().unwrap();
        stage.run(said, 7);
    }
}

#[test]
fn bug_07_a_prompt_far_longer_than_all_windows_is_admitted_and_every_decode_keeps_its_window() {
    let mut stage = Stage::new(Options { slabs: 3, max_step_tokens: 6, pages: 128, ..options() });
    stage.enter(text(2, 20), 60);
    stage.enter(text(3, 20), 60);
    stage.enter(text(1, 180), 3);
    for _ in 0..12 {
        stage.step(true);
    }
    assert_eq!(stage.stats()["running"], 3);
    stage.0.settle().unwrap();
}

#[test]
fn bug_08_pages_of_a_preempted_request_are_not_handed_out_while_its_step_runs() {
    let mut stage = Stage::new(Options { pages: 12, slabs: 3, max_in_flight: 2, ..options() });
    for round in 0..20 {
        for i in 0..3 {
            stage.enter(text(round * 3 + i, 6), 26);
        }
        stage.0.settle().unwrap();
    }
    assert!(stage.stats()["preemptions"] > 0, "nobody was preempted: the pool was to be too small");
}

#[test]
fn bug_09_a_request_may_end_while_the_next_step_runs_and_preemption_does_not_go_in_circles() {
    let mut stage = Stage::new(Options { pages: 12, slabs: 4, max_in_flight: 2, ..options() });
    let tokens: u32 = (0..8).map(|i| (stage.enter(text(i, 5), 30), 35).1).sum();
    stage.0.settle().unwrap();
    let s = stage.stats();
    assert!(s["preemptions"] > 0, "{s:?}");
    assert!(s["recomputed_tokens"] <= 4 * u64::from(tokens), "work was done over and over: {s:?}");
    assert!(s["steps"] <= 3 * u64::from(tokens), "{s:?}");
}

#[test]
fn bug_10_an_abort_in_any_state_ignores_late_results_and_harms_nobody() {
    for after in 0..9 {
        for abort in [true, false] {
            let mut stage = Stage::new(Options { max_in_flight: 2, max_step_tokens: 8, ..options() });
            let bystander = stage.enter(text(1, 12), 12);
            let victim = stage.enter(text(2, 21), 6);
            (0..after).for_each(|i| stage.step(i > 0));
            if stage.0.core().explain(RequestId(victim)).is_ok() && stage.0.is_live(victim) {
                stage.0.end(victim, abort).unwrap();
            }
            stage.0.check().unwrap();
            // At once again, with the same tokens: the late results of the first one are not its own.
            stage.enter(text(2, 21), 6);
            stage.0.settle().unwrap();
            assert_eq!(stage.0.expected(bystander).len(), 24);
            stage.0.drain().unwrap();
        }
    }
}

#[test]
fn bug_11_a_restored_state_is_whole_at_every_offset_to_windows_blocks_and_ratios() {
    let layout = geometry(4, 128, 128, 128);
    for policy in ["turns", "none", "every:128"] {
        let options = Options {
            snapshots: policy.parse().unwrap(),
            max_len: 800,
            max_step_tokens: 100,
            slabs: 2,
            pages: 64,
            ..Options::default()
        };
        for n in [127, 128, 129, 130, 255, 256, 257, 383, 384, 385, 511, 512, 513] {
            let mut world = World::scripted(&layout, options.clone(), 5);
            world.enter(Submit { prompt: text(n, n), max_new: Some(3), ..Submit::default() }).unwrap();
            world.settle().unwrap();
            let said = world.expected(1).to_vec();
            world.enter(Submit { prompt: said, max_new: Some(3), ..Submit::default() }).unwrap();
            world.settle().unwrap();
            let e = world.core().explain(RequestId(2)).unwrap();
            assert_eq!(e.history_matched, (n + 2) / 128 * 128, "{policy}: {n} tokens");
        }
    }
}

#[test]
fn bug_12_the_same_tokens_come_cold_after_a_hit_and_after_preemption() {
    let mut stage = Stage::new(Options { pages: 14, slabs: 3, ..options() });
    let cold = stage.run(text(9, 14), 20);
    let warm = stage.run(text(9, 14), 20);
    let ids: Vec<u64> = (0..3).map(|_| stage.enter(text(9, 14), 20)).collect();
    stage.0.settle().unwrap();
    assert_eq!(cold, warm);
    for id in ids {
        assert_eq!(stage.0.expected(id), cold);
    }
}

#[test]
fn bug_13_prompts_that_are_cached_to_none_one_all_but_one_and_all_pages_run_to_their_end() {
    for pages in [0, 1, 4, 5] {
        let mut stage = Stage::new(options());
        let whole = text(4, 20);
        if pages > 0 {
            stage.run(whole[..4 * pages].to_vec(), 0);
        }
        let id = stage.enter(whole.clone(), 3);
        stage.0.settle().unwrap();
        let (matched, resumed, _) = stage.resumed(id);
        assert_eq!(matched, 4 * pages.min(4) as u32, "the last token is always computed");
        assert!(resumed <= matched);
        assert_eq!(stage.0.expected(id).len(), 23);
    }
}

#[test]
fn bug_14_publishing_into_a_full_pool_does_not_take_the_publishers_own_pages() {
    let mut stage = Stage::new(Options { pages: 13, slabs: 2, max_in_flight: 2, ..options() });
    (0..5).for_each(|i| drop(stage.run(text(i, 20), 4)));
    for round in 0..10 {
        // Equal prompts publish equal blocks at the same time; each adopts the other's pages.
        stage.enter(text(50 + round, 17), 8);
        stage.enter(text(50 + round, 17), 8);
        stage.0.settle().unwrap();
        stage.conserves_pages();
    }
    assert!(stage.stats()["adopted_blocks"] > 0);
}

#[test]
fn bug_15_what_is_told_of_a_hit_is_what_was_used() {
    let mut stage = Stage::new(Options { pages: 40, ..options() });
    let mut said = text(1, 10);
    let mut computed = 0;
    for round in 0..24 {
        let id = stage.enter(said.clone(), 3);
        stage.0.settle().unwrap();
        let e = stage.0.core().explain(RequestId(id)).unwrap();
        computed += u64::from(e.prompt_tokens - e.cached_tokens());
        let s = stage.stats();
        assert_eq!(s["prompt_tokens"] - (s["resumed_tokens"] - s["replayed_tokens"]), computed);
        assert_eq!(e.reason == Reason::None, e.resumed_at - e.replayed == (e.prompt_tokens - 1) / 4 * 4);
        said = [stage.0.expected(id), &text(round, 2)].concat();
        said.truncate(if round % 5 == 4 { 15 } else { said.len() });
    }
}

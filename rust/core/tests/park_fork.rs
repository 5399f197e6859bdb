//! Giving way with the state saved, and starting from the state of another, one rule per test.

#![expect(clippy::unwrap_used, reason = "a refusal where none is expected fails the test")]

mod rig;

use dsv4_core::Options;
use dsv4_core::error::CoreError;
use dsv4_core::event::{Loss, What};
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::plan::{CopyKind, DECODE, Field, RESET, StateCopy};
use dsv4_core::sched::request::Submit;
use rig::{Rig, request, tokens};

/// No boundary where a piece of a prompt would end for a snapshot.
fn options() -> Options {
    Options { snapshots: "none".parse().unwrap(), ..rig::options() }
}

#[test]
fn a_higher_priority_takes_the_slab_and_the_state_comes_back() {
    let mut rig = Rig::new(Options { slabs: 1, ..options() });
    rig.core.submit(request(1, &tokens(6), 9)).unwrap();
    rig.step(5);
    rig.step(5);
    rig.core.submit(Submit { priority: 1, ..request(2, &[3; 3], 1) }).unwrap();
    // A step that only saves: position 7 is no block boundary, so the whole slab goes.
    let h = rig.plan().unwrap();
    assert_eq!((h.rows, rig.copied(CopyKind::Save)), (0, vec![7]));
    rig.commit(&h, 1);
    assert_eq!(rig.step(5), [(2, 0, 3, RESET, 1)]);
    let h = rig.plan().unwrap();
    assert_eq!((rig.rows(&h), rig.copied(CopyKind::Restore)), (vec![(1, 7, 1, 0, 1)], vec![7]));
    rig.core.commit(Step(h.step), &[5], &[1; 1]).unwrap();
    assert!(rig.events().contains(&(1, What::Preempted { loss: Loss::Priority })));
    let of = |name: &str| rig.stat(name);
    assert_eq!((of("preempted_with_state"), of("unparked"), of("recomputed_tokens")), (1, 1, 0));
}

#[test]
fn equal_priority_takes_no_slab() {
    let mut rig = Rig::new(Options { slabs: 1, ..options() });
    rig.core.submit(request(1, &tokens(6), 4)).unwrap();
    rig.step(5);
    rig.core.submit(request(2, &[3; 3], 1)).unwrap();
    assert_eq!(rig.step(5), [(1, 6, 1, DECODE, 1)]);
}

#[test]
fn a_long_prompt_gives_way_with_its_state_and_nothing_is_run_again() {
    // Request 2 holds pages that it has not written yet: they take its state.
    let mut rig = Rig::new(Options { pages: 16, max_step_tokens: 4, ..options() });
    rig.core.submit(request(1, &tokens(14), 20)).unwrap();
    (0..4).for_each(|_| drop(rig.step(1)));
    rig.core.submit(request(2, &[6; 41], 2)).unwrap();
    while rig.core.has_work() {
        rig.step(1);
    }
    let of = |name: &str| rig.stat(name);
    assert!(of("preempted_with_state") > 0 && of("preemptions") == of("preempted_with_state"));
    assert_eq!((of("recomputed_tokens"), of("replayed_tokens")), (0, 0));
}

#[test]
fn a_rolled_back_save_is_not_resumed_from() {
    let mut rig = Rig::new(Options { slabs: 1, ..options() });
    rig.core.submit(request(1, &tokens(6), 9)).unwrap();
    rig.step(5);
    rig.core.submit(Submit { priority: 1, ..request(2, &[3; 3], 1) }).unwrap();
    let h = rig.plan().unwrap();
    assert_eq!((h.copies, rig.stat("parked")), (1, 1));
    rig.core.rollback(Step(h.step)).unwrap();
    rig.core.check().unwrap();
    assert_eq!(rig.stat("parked"), 0);
    while rig.core.has_work() {
        rig.step(5);
    }
    assert_eq!(rig.stat("unparked"), 0);
}

#[test]
fn choices_of_one_prompt_compute_it_once() {
    let mut rig = Rig::new(Options { slabs: 4, ..options() });
    rig.core.submit(request(1, &tokens(7), 3)).unwrap();
    for id in 2..5 {
        rig.core.fork(RequestId(1), request(id, &tokens(7), 3)).unwrap();
    }
    // The parent stops before its last token, where its children part from it.
    assert_eq!(rig.step(5), [(1, 0, 6, RESET, 0)]);
    let h = rig.plan().unwrap();
    assert_eq!(rig.copied(CopyKind::Fork), [6, 6, 6]);
    let mut rows = rig.rows(&h);
    rows.sort_unstable();
    assert_eq!(rows, [(1, 6, 1, 0, 1), (2, 6, 1, 0, 1), (3, 6, 1, 0, 1), (4, 6, 1, 0, 1)]);
    // Slab and open page are copied: block 1 holds positions 4 to 7.
    let forks: Vec<StateCopy<'_>> = rig.out.copies(CopyKind::Fork).collect();
    let same = |f: &StateCopy<'_>| f.from == forks[0].from && f.pages[0] == forks[0].pages[0];
    assert!(forks.iter().all(|f| same(f) && f.pages[0] != f.pages[1]), "{forks:?}");
    rig.core.commit(Step(h.step), &[5, 6, 7, 8], &[1; 4]).unwrap();
    rig.core.check().unwrap();
    assert_eq!(rig.core.explain(RequestId(3)).unwrap().resumed_at, 6);
    while rig.core.has_work() {
        rig.step(5);
    }
    assert_eq!(rig.stat("forks"), 3);
}

#[test]
fn a_running_decode_is_forked_with_all_that_it_said() {
    let mut rig = Rig::new(options());
    rig.core.submit(request(1, &tokens(5), 9)).unwrap();
    rig.step(5);
    rig.step(5);
    rig.core.fork(RequestId(1), request(2, &[], 4)).unwrap();
    let h = rig.plan().unwrap();
    assert_eq!((h.copies, rig.rows(&h)), (1, vec![(1, 6, 1, DECODE, 1), (2, 6, 1, 0, 1)]));
    assert_eq!(rig.out[Field::token_ids][..2], [5, 5]);
}

#[test]
fn a_child_whose_parent_is_gone_or_ahead_starts_like_any_other() {
    let mut rig = Rig::new(options());
    rig.core.submit(request(1, &tokens(9), 9)).unwrap();
    rig.core.fork(RequestId(1), request(2, &tokens(9), 2)).unwrap();
    rig.core.abort(RequestId(1)).unwrap();
    while rig.core.has_work() {
        rig.step(5);
    }
    rig.core.submit(request(3, &[4; 9], 9)).unwrap();
    (0..4).for_each(|_| drop(rig.step(5)));
    rig.core.fork(RequestId(3), request(4, &[4; 9], 2)).unwrap();
    while rig.core.has_work() {
        rig.step(5);
    }
    assert_eq!((rig.stat("forks"), rig.stat("finished")), (0, 4));
    let gone = rig.core.fork(RequestId(1), request(5, &tokens(3), 1));
    assert_eq!(gone, Err(CoreError::UnknownRequest(1)));
}

#[test]
fn children_do_not_keep_others_from_starting() {
    // The parent came before them, but they know more of their prompt and so stand before it in line.
    let mut rig = Rig::new(Options { slabs: 1, max_waiting: 100, ..options() });
    rig.run(request(100, &tokens(8), 1));
    rig.core.submit(request(1, &[6; 30], 9)).unwrap();
    rig.step(5);
    rig.core.submit(Submit { deadline_us: Some(1 << 40), ..request(2, &tokens(3), 1) }).unwrap();
    rig.core.submit(request(3, &[5; 9], 1)).unwrap();
    for id in 4..20 {
        rig.core.fork(RequestId(3), Submit { prompt: tokens(9), ..request(id, &[5; 9], 1) }).unwrap();
        rig.core.fork(RequestId(3), request(100 + id, &[5; 9], 1)).unwrap();
    }
    while rig.core.has_work() {
        rig.step(5);
    }
    assert_eq!(rig.stat("finished"), 36);
}

#[test]
fn an_aborted_child_does_not_hold_its_parent() {
    let mut rig = Rig::new(Options { slabs: 1, ..options() });
    rig.core.submit(request(1, &tokens(20), 2)).unwrap();
    rig.core.fork(RequestId(1), request(2, &tokens(9), 2)).unwrap();
    rig.step(5);
    rig.core.abort(RequestId(2)).unwrap();
    while rig.core.has_work() {
        rig.step(5);
    }
    assert_eq!(rig.stat("finished"), 2);
}

#[test]
fn a_parked_request_starts_from_what_it_holds_or_not_at_all() {
    // Request 2 is parked after a token of its prompt; request 3 computes that prompt whole, and it is pinned. With few
    // pages left the tree offers request 2 a start that needs fewer of them than what it holds; holding both was an error.
    let mut parked = 0;
    for (pages, senior) in (8..16).flat_map(|pages| (4..9).map(move |senior| (pages, senior))) {
        let mut rig = Rig::new(Options { pages, max_step_tokens: 2, ..options() });
        rig.core.submit(Submit { priority: 2, ..request(1, &[9; 9][..senior], 20) }).unwrap();
        (0..4).for_each(|_| drop(rig.step(1)));
        rig.core.submit(request(2, &tokens(13), 1)).unwrap();
        rig.step(1);
        rig.core.submit(Submit { priority: 1, ..request(3, &tokens(13), 1) }).unwrap();
        while rig.stat("finished") == 0 {
            rig.step(1);
        }
        rig.core.pin(&[], &tokens(13));
        while rig.core.has_work() {
            rig.step(1);
        }
        parked += rig.stat("unparked");
    }
    assert!(parked > 0, "nobody was parked and came back");
}

//! The scheduler, one rule per test. Random runs against the cold run are in the simulator crate.

mod rig;

use dsv4_core::Options;
use dsv4_core::error::CoreError;
use dsv4_core::event::{Loss, What};
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::plan::{ALL_LOGITS, CopyKind, DECODE, Field, REPLAY, RESET, StepHeader};
use dsv4_core::sched::explain::Reason;
use dsv4_core::sched::request::{Finish, Submit};
use rig::{Rig, options, request, tokens};

#[test]
fn decode_comes_first_and_prompts_fill_the_rest_in_order() {
    let mut rig = Rig::new(Options { slabs: 3, ..options() });
    rig.core.submit(request(1, &tokens(3), 9)).unwrap();
    rig.core.submit(request(2, &tokens(10), 9)).unwrap();
    rig.core.submit(Submit { priority: 1, ..request(3, &tokens(2), 9) }).unwrap();
    assert_eq!(rig.step(5), [(3, 0, 2, RESET, 1), (1, 0, 3, RESET, 1), (2, 0, 3, RESET, 0)]);
    assert_eq!(rig.step(5), [(3, 2, 1, DECODE, 1), (1, 3, 1, DECODE, 1), (2, 3, 5, 0, 0)]);
    let samples = rig.events().into_iter().filter_map(|(r, w)| match w {
        What::Token { index, sample, .. } => Some((r, index, sample)),
        _ => None,
    });
    assert_eq!(samples.collect::<Vec<_>>(), [(3, 0, 0), (1, 0, 1), (3, 1, 0), (1, 1, 1)]);
}

#[test]
fn chunks_end_where_a_state_is_saved() {
    let mut rig = Rig::new(Options { snapshots: "turns".parse().unwrap(), max_step_tokens: 64, ..options() });
    rig.core.submit(request(1, &tokens(10), 4)).unwrap();
    let h = rig.plan().unwrap();
    assert_eq!((rig.rows(&h), rig.copied(CopyKind::Save)), (vec![(1, 0, 8, RESET, 0)], vec![8]));
    assert_eq!((rig.out[Field::copy_from][0], rig.out[Field::copy_to][0]), (0, -1));
    rig.commit(&h, 1);
    assert_eq!(rig.step(1), [(1, 8, 2, 0, 1)]);
    assert_eq!(rig.stat("snapshots"), 1);
    rig.step(1);
    // Position 12 is crossed in decode: kept aside, stored at the end of the output.
    let h = rig.plan().unwrap();
    assert_eq!(rig.copied(CopyKind::Save), [12]);
    rig.core.commit(Step(h.step), &[1], &[1; 1]).unwrap();
    assert_eq!(rig.stat("snapshots"), 1);
    rig.step(1);
    assert_eq!((rig.stat("snapshots"), rig.stat("running")), (2, 0));
}

#[test]
fn a_conversation_resumes_at_the_end_of_its_output() {
    let mut rig = Rig::new(options());
    rig.run(request(1, &tokens(10), 4));
    let mut next = tokens(10);
    next.extend([1, 1, 1, 1, 3, 3]);
    rig.core.submit(request(2, &next, 1)).unwrap();
    let h = rig.plan().unwrap();
    assert_eq!((rig.rows(&h), rig.copied(CopyKind::Restore)), (vec![(2, 12, 4, 0, 1)], vec![12]));
    let e = rig.core.explain(RequestId(2)).unwrap();
    assert_eq!((e.history_matched, e.resumed_at, e.cached_tokens(), e.reason), (12, 12, 12, Reason::None));
}

#[test]
fn a_replay_writes_no_history_and_ends_where_history_ends() {
    let mut rig = Rig::new(Options { snapshots: "none".parse().unwrap(), max_step_tokens: 4, ..options() });
    rig.run(request(1, &tokens(18), 1));
    rig.core.submit(request(2, &tokens(18), 1)).unwrap();
    assert_eq!(rig.step(1), [(2, 10, 4, RESET | REPLAY, 0)]);
    assert_eq!(rig.out[Field::row_replay_end][0], 16);
    assert_eq!(rig.step(1), [(2, 14, 2, REPLAY, 0)]);
    assert_eq!(rig.step(1), [(2, 16, 2, 0, 1)]);
    assert_eq!(rig.out[Field::row_replay_end][0], 0);
    let e = rig.core.explain(RequestId(2)).unwrap();
    assert_eq!((e.resumed_at, e.replayed, e.cached_tokens(), e.reason), (16, 6, 10, Reason::None));
}

#[test]
fn nothing_is_saved_before_the_end_of_a_replay() {
    let mut rig =
        Rig::new(Options { snapshots: "every:4".parse().unwrap(), max_step_tokens: 2, ..options() });
    rig.run(request(1, &tokens(18), 1));
    assert_eq!(rig.core.evict_snapshots(9), 4);
    rig.core.submit(request(2, &tokens(18), 1)).unwrap();
    let mut saves = Vec::new();
    while let Some(h) = rig.plan() {
        saves.push((rig.rows(&h)[0].1, rig.copied(CopyKind::Save).len()));
        rig.commit(&h, 1);
    }
    // The row at 10 ends at 12, a due boundary, but its state there is not exact.
    assert_eq!(saves, [(10, 0), (12, 0), (14, 1), (16, 0)]);
}

#[test]
fn a_fork_saves_where_the_prompt_left_known_history() {
    let mut rig = Rig::new(Options { snapshots: "forks".parse().unwrap(), ..options() });
    rig.run(request(1, &tokens(22), 1));
    let mut other = tokens(12);
    other.extend([8; 10]);
    rig.run(request(2, &other, 1));
    other.truncate(12);
    other.extend([9; 10]);
    rig.core.submit(request(3, &other, 1)).unwrap();
    let h = rig.plan().unwrap();
    assert_eq!((h.rows, rig.copied(CopyKind::Restore)), (1, vec![12]));
}

#[test]
fn all_logits_start_at_the_first_token() {
    let mut rig = Rig::new(options());
    rig.run(request(1, &tokens(9), 1));
    rig.core.submit(Submit { all_logits: true, ..request(2, &tokens(9), 2) }).unwrap();
    assert_eq!(rig.step(1), [(2, 0, 8, RESET | ALL_LOGITS, 0)]);
    assert_eq!(rig.step(1), [(2, 8, 1, ALL_LOGITS, 1)]);
    assert_eq!(rig.step(1), [(2, 9, 1, DECODE, 1)]);
    assert_eq!(rig.core.explain(RequestId(2)).unwrap().reason, Reason::Disabled);
}

#[test]
fn a_prompt_alone_is_computed_and_ends_without_a_token() {
    let mut rig = Rig::new(options());
    rig.core.submit(request(1, &tokens(6), 0)).unwrap();
    assert_eq!(rig.step(1), [(1, 0, 4, RESET, 0)]);
    assert_eq!(rig.step(1), [(1, 4, 2, 0, 0)]);
    let end = What::Finished { reason: Finish::Length, outputs: 0, stop: None };
    assert_eq!(rig.events().last(), Some(&(1, end)));
}

#[test]
fn a_stop_token_ends_a_request_and_is_part_of_its_output() {
    let mut rig = Rig::new(options());
    rig.core.submit(request(1, &tokens(2), 9)).unwrap();
    rig.step(99);
    let events = rig.events();
    assert!(events.contains(&(1, What::Token { token: 99, index: 0, sample: 0 })));
    let end = What::Finished { reason: Finish::Stop, outputs: 1, stop: Some(99) };
    assert_eq!(events.last(), Some(&(1, end)));
}

#[test]
fn with_two_steps_in_flight_an_unknown_token_is_a_placeholder() {
    let mut rig = Rig::new(Options { max_in_flight: 2, ..options() });
    rig.core.submit(request(1, &tokens(3), 9)).unwrap();
    rig.core.submit(request(2, &tokens(4), 9)).unwrap();
    let first = rig.plan().unwrap();
    let second = rig.plan().unwrap();
    assert_eq!(rig.out[Field::token_ids][..2], [-1, -2]);
    assert!(matches!(rig.core.plan(rig.out.words()), Err(CoreError::WrongStep { action: "planned", .. })));
    assert!(matches!(rig.core.commit(Step(second.step), &[1, 1], &[1, 1]), Err(CoreError::WrongStep { .. })));
    rig.core.commit(Step(first.step), &[99, 5], &[1; 2]).unwrap();
    // Request 1 is over; its row in flight is ignored, and its slab and pages wait for that step.
    assert_eq!((rig.stat("free_slabs"), rig.stat("running")), (0, 1));
    let third = rig.plan().unwrap();
    assert_eq!((rig.rows(&third), rig.out[Field::token_ids][0]), (vec![(2, 5, 1, DECODE, 1)], -2));
    rig.core.commit(Step(second.step), &[7, 6], &[1; 2]).unwrap();
    assert_eq!(rig.stat("free_slabs"), 1);
    let outputs = rig.events().into_iter().filter_map(|(r, w)| match w {
        What::Token { token, .. } => Some((r, token)),
        _ => None,
    });
    assert_eq!(outputs.collect::<Vec<_>>(), [(1, 99), (2, 5), (2, 6)]);
}

#[test]
fn a_request_can_be_aborted_in_every_state_and_twice() {
    let mut rig = Rig::new(Options { slabs: 1, max_in_flight: 2, ..options() });
    for (id, steps) in [(1, 0), (2, 1), (3, 2), (4, 3)] {
        rig.core.submit(request(id, &tokens(10), 9)).unwrap();
        let mut flying = Vec::new();
        for _ in 0..steps {
            if flying.len() == 2 {
                let h: StepHeader = flying.remove(0);
                rig.commit(&h, 1);
            }
            flying.extend(rig.plan());
        }
        assert_eq!(rig.core.abort(RequestId(id)), Ok(true));
        assert_eq!(rig.core.abort(RequestId(id)), Ok(false));
        rig.core.check().unwrap();
        for h in flying {
            rig.commit(&h, 1);
        }
        rig.core.check().unwrap();
        assert!(matches!(rig.events().last(), Some((_, What::Finished { reason: Finish::Abort, .. }))));
        assert_eq!((rig.stat("free_slabs"), rig.core.has_work()), (1, false));
    }
    rig.core.clear_prefix();
    assert_eq!(rig.stat("free_pages"), 32);
}

#[test]
fn the_last_in_order_gives_way_and_comes_back_with_the_same_tokens() {
    let mut rig = Rig::new(Options { pages: 7, snapshots: "none".parse().unwrap(), ..options() });
    rig.core.submit(request(1, &tokens(8), 12)).unwrap();
    rig.core.submit(request(2, &[3; 8], 12)).unwrap();
    let mut outputs = [0, 0];
    let mut preempted = Vec::new();
    while rig.core.has_work() {
        rig.step(1);
        for (id, what) in rig.events() {
            match what {
                What::Token { index, .. } => {
                    assert_eq!(index, outputs[id as usize - 1]);
                    outputs[id as usize - 1] += 1;
                }
                What::Preempted { .. } => preempted.push(id),
                _ => {}
            }
        }
    }
    assert_eq!(outputs, [12, 12]);
    assert!(!preempted.is_empty() && preempted.iter().all(|&id| id == 2), "{preempted:?}");
    assert_eq!(rig.core.explain(RequestId(2)).unwrap().preemptions, preempted.len() as u32);
}

#[test]
fn a_rolled_back_step_never_happened() {
    let mut rig = Rig::new(Options { max_in_flight: 2, ..options() });
    rig.core.submit(request(1, &tokens(3), 4)).unwrap();
    rig.step(5);
    let (a, b) = (rig.plan().unwrap(), rig.plan().unwrap());
    rig.core.commit(Step(a.step), &[6], &[1; 1]).unwrap();
    rig.core.rollback(Step(b.step)).unwrap();
    rig.core.check().unwrap();
    // The first of the two had crossed position 4 in decode, and the state kept aside then went into the tree.
    let h = rig.plan().unwrap();
    assert_eq!((rig.rows(&h), rig.copied(CopyKind::Restore)), (vec![(1, 4, 1, 0, 1)], vec![4]));
    rig.core.commit(Step(h.step), &[7], &[1; 1]).unwrap();
    let outputs = rig.events().into_iter().filter_map(|(_, w)| match w {
        What::Token { token, index, .. } => Some((index, token)),
        _ => None,
    });
    assert_eq!(outputs.collect::<Vec<_>>(), [(0, 5), (1, 6), (2, 7)]);
}

#[test]
fn a_row_of_which_nothing_is_accepted_never_happened() {
    let mut rig = Rig::new(Options { slabs: 3, max_in_flight: 2, ..options() });
    rig.core.submit(request(1, &tokens(3), 9)).unwrap();
    rig.core.submit(request(2, &tokens(4), 9)).unwrap();
    let (first, second) = (rig.plan().unwrap(), rig.plan().unwrap());
    assert_eq!((first.samples, first.sampled_rows), (2, 2));
    for accepted in [&[0, 2], &[-1, 1], &[1, i32::MAX]] {
        let refused = rig.core.commit(Step(first.step), &[6, 5], accepted);
        assert!(matches!(refused, Err(CoreError::WrongAccepted { step: 1, sampled: 1, .. })), "{refused:?}");
    }
    let refused = rig.core.commit(Step(first.step), &[6, 5], &[1]);
    assert_eq!(refused, Err(CoreError::WrongAcceptedCount { step: 1, expected: 2, got: 1 }));
    rig.core.commit(Step(first.step), &[6, 5], &[0, 1]).unwrap();
    rig.core.check().unwrap();
    // What request 1 has in the second step came from a token that does not count.
    let third = rig.plan().unwrap();
    assert_eq!(rig.rows(&third), [(2, 5, 1, DECODE, 1), (1, 0, 3, RESET, 1)]);
    rig.core.commit(Step(second.step), &[7, 8], &[1, 1]).unwrap();
    rig.core.commit(Step(third.step), &[4, 6], &[1, 1]).unwrap();
    rig.core.check().unwrap();
    let events = rig.events();
    assert!(events.contains(&(1, What::Preempted { loss: Loss::Rollback })));
    let said = events.into_iter().filter_map(|(r, w)| match w {
        What::Token { token, index, .. } => Some((r, index, token)),
        _ => None,
    });
    assert_eq!(said.collect::<Vec<_>>(), [(2, 0, 5), (2, 1, 8), (2, 2, 4), (1, 0, 6)]);
    assert_eq!((rig.stat("rows_refused"), rig.stat("rollbacks")), (1, 0));
}

#[test]
fn after_a_rollback_no_placeholder_refers_to_the_step_before_it() {
    // A request of the step before the rolled back one, not in that step for want of a page, gets one when the rollback
    // takes another's slab. Its token is unknown, and the samples on the device are those of the step rolled back.
    for i in 0..10 * 20 * 3 {
        let (pages, turns, gone) = (6 + i % 10, i / 10 % 20, 1 + u64::from(i) / 200);
        let mut rig =
            Rig::new(Options { pages, slabs: 3, max_step_tokens: 24, max_in_flight: 2, ..options() });
        for (id, first, n) in [(1, 3, 11), (2, 4, 7), (3, 5, 2)] {
            rig.core.submit(request(id, &vec![first; n], 12)).unwrap();
        }
        let mut before = rig.plan().unwrap();
        for _ in 0..turns {
            let next = rig.plan();
            rig.commit(&before, 1);
            match next.or_else(|| rig.plan()) {
                Some(h) => before = h,
                None => break,
            }
        }
        rig.core.abort(RequestId(gone)).unwrap();
        let Some(failed) = rig.plan() else { continue };
        rig.core.rollback(Step(failed.step)).unwrap();
        if let Some(h) = rig.plan() {
            let ids = &rig.out[Field::token_ids][..h.tokens as usize];
            assert!(ids.iter().all(|&id| id >= 0), "{pages} pages, turn {turns}, without {gone}: {ids:?}");
        }
    }
}

#[test]
fn what_can_never_run_is_refused_at_once() {
    let mut rig = Rig::new(Options { pages: 4, ..options() });
    let refused = [
        (request(1, &[], 1), CoreError::EmptyPrompt(1)),
        (request(1, &tokens(10), 60), CoreError::TooLong { tokens: 70, limit: 64 }),
        (request(1, &tokens(10), 8), CoreError::NeverFits { needed: 5, pages: 4, tokens: 16 }),
    ];
    for (submit, error) in refused {
        assert_eq!(rig.core.submit(submit), Err(error));
    }
    // 10 + 7 tokens: the last one is sampled and never computed.
    rig.run(request(1, &tokens(10), 7));
    rig.run(Submit { max_new: None, ..request(2, &tokens(10), 0) });
    assert_eq!(
        rig.events().last().map(|e| e.1),
        Some(What::Finished { reason: Finish::Length, outputs: 7, stop: None })
    );
    for id in 3..7 {
        rig.core.submit(request(id, &tokens(2), 1)).unwrap();
    }
    assert_eq!(rig.core.submit(request(3, &tokens(2), 1)), Err(CoreError::Duplicate(3)));
    assert_eq!(
        rig.core.submit(request(7, &tokens(2), 1)),
        Err(CoreError::Overloaded { waiting: 4, limit: 4 })
    );
}

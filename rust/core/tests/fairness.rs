//! Whose prompt is next, one rule per test.

#![expect(clippy::unwrap_used, reason = "a refusal where none is expected fails the test")]

mod rig;

use dsv4_core::core::Tenant;
use dsv4_core::layout::presets;
use dsv4_core::sched::request::Submit;
use dsv4_core::{Core, Options};
use rig::{Rig, options, request, tokens};

/// One slab, so that requests are computed one after the other.
fn one_by_one(more: Options) -> Rig {
    Rig::new(Options { slabs: 1, max_waiting: 1000, ..more })
}

/// Runs everything and returns the requests in the order in which they started.
fn order(rig: &mut Rig) -> Vec<u64> {
    let mut first = Vec::new();
    while rig.core.has_work() {
        for (id, ..) in rig.step(1) {
            if !first.contains(&id) {
                first.push(id);
            }
        }
    }
    first
}

fn submit(core: &mut Core, submit: Submit) {
    core.submit(submit).unwrap();
}

#[test]
fn small_requests_pass_one_that_does_not_fit_but_not_for_ever() {
    // 1 holds 4 of 12 pages for long; 2 needs 10; the others are small and keep coming.
    let mut rig = Rig::new(Options { pages: 12, slabs: 3, max_waiting: 1000, max_len: 200, ..options() });
    submit(&mut rig.core, request(1, &tokens(13), 30));
    rig.step(1);
    submit(&mut rig.core, request(2, &[6; 34], 4));
    let (mut passed, mut id, mut started) = (Vec::new(), 3, false);
    for _ in 0..60 {
        if !started {
            submit(&mut rig.core, request(id, &[id as u32; 2], 1));
            id += 1;
        }
        for (row, ..) in if rig.core.has_work() { rig.step(1) } else { Vec::new() } {
            started |= row == 2;
            if row > 2 && !started && !passed.contains(&row) {
                passed.push(row);
            }
        }
    }
    assert!(started, "request 2 was starved by {passed:?}");
    assert!((1..=16).contains(&passed.len()), "{passed:?}");
    assert_eq!(rig.stat("passed"), passed.len() as u64);
}

#[test]
fn the_longest_known_prefix_goes_first_then_whoever_came_first() {
    let mut rig = one_by_one(options());
    rig.run(request(1, &tokens(21), 1));
    submit(&mut rig.core, request(2, &[9; 4], 1));
    for (id, known) in [(3, 5), (4, 17), (5, 9), (6, 17)] {
        let mut prompt = tokens(known);
        prompt.extend([50 + id as u32; 3]);
        submit(&mut rig.core, request(id, &prompt, 1));
    }
    assert_eq!(order(&mut rig), [4, 6, 5, 3, 2]);
}

#[test]
fn what_becomes_known_while_a_request_waits_moves_it_up() {
    let mut rig = one_by_one(options());
    submit(&mut rig.core, request(1, &tokens(16), 1));
    submit(&mut rig.core, request(2, &[9; 4], 1));
    submit(&mut rig.core, request(3, &[8; 4], 1));
    let mut prompt = tokens(16);
    prompt.extend([7; 4]);
    submit(&mut rig.core, request(4, &prompt, 1));
    // Nothing of it was known when 4 came; 1 has computed it by now.
    assert_eq!(order(&mut rig), [1, 4, 2, 3]);
}

#[test]
fn the_earliest_deadline_that_can_be_met_goes_first() {
    // 10 us a token.
    let mut rig = one_by_one(options());
    submit(&mut rig.core, request(1, &tokens(4), 3));
    rig.step(1);
    let with = |id, deadline| Submit { deadline_us: Some(deadline), ..request(id, &[id as u32; 8], 1) };
    submit(&mut rig.core, request(2, &[2; 8], 1));
    submit(&mut rig.core, with(3, 10_000));
    submit(&mut rig.core, with(4, 5_000));
    // Cannot be met: 8 tokens take 80 us. It has no place before anyone.
    submit(&mut rig.core, with(5, 79));
    // Can be met now, and not any more when its turn comes.
    submit(&mut rig.core, with(6, 100));
    rig.core.set_time(50);
    rig.core.set_time(3);
    assert_eq!(order(&mut rig), [1, 4, 3, 2, 5, 6]);
    assert_eq!(rig.stat("deadlines_hopeless"), 1);
    assert_eq!(rig.stat("deadline_misses"), 0);
}

#[test]
fn a_first_token_after_its_deadline_is_counted() {
    let mut rig = one_by_one(options());
    submit(&mut rig.core, Submit { deadline_us: Some(100), ..request(1, &tokens(4), 2) });
    let h = rig.plan().unwrap();
    rig.core.set_time(101);
    rig.commit(&h, 1);
    rig.step(1);
    assert_eq!(rig.stat("deadline_misses"), 1);
}

#[test]
fn a_deadline_does_not_help_against_a_higher_priority() {
    let mut rig = one_by_one(options());
    submit(&mut rig.core, request(1, &tokens(4), 1));
    submit(&mut rig.core, Submit { deadline_us: Some(1000), ..request(2, &[2; 4], 1) });
    submit(&mut rig.core, Submit { priority: 1, ..request(3, &[3; 4], 1) });
    assert_eq!(order(&mut rig), [3, 2, 1]);
}

#[test]
fn whoever_waited_too_long_goes_ahead_of_all() {
    let mut rig = one_by_one(Options { max_wait_us: 1000, ..options() });
    submit(&mut rig.core, Submit { priority: -5, ..request(1, &[1; 4], 1) });
    rig.core.set_time(600);
    for id in 2..6 {
        submit(&mut rig.core, Submit { priority: 5, ..request(id, &[id as u32; 4], 1) });
    }
    let mut first = vec![rig.step(1)[0].0];
    rig.core.set_time(1000);
    first.extend(order(&mut rig));
    assert_eq!(first, [2, 1, 3, 4, 5]);
    assert_eq!(rig.stat("aged"), 1);
}

#[test]
fn tenants_get_prefill_by_weight_whatever_they_ask_for() {
    let tenants = vec![Tenant { id: 1, weight: 2.0, quota_pages: None }];
    let mut rig = one_by_one(Options { tenants, pages: 200, prefix_cache: false, ..options() });
    // Tenant 0 floods first; its prompts are longer, too.
    for i in 0..60 {
        submit(&mut rig.core, Submit { tenant: 0, ..request(i, &tokens(12), 1) });
    }
    for i in 0..60 {
        submit(&mut rig.core, Submit { tenant: 1, ..request(100 + i, &tokens(4), 1) });
        submit(&mut rig.core, Submit { tenant: 2, ..request(200 + i, &tokens(8), 1) });
    }
    let mut tokens = [0u32; 3];
    for _ in 0..90 {
        for (id, _, len, ..) in rig.step(1) {
            tokens[id as usize / 100] += len as u32;
        }
    }
    let [flood, twice, other] = tokens.map(f64::from);
    assert!((twice / flood - 2.0).abs() < 0.3 && (other / flood - 1.0).abs() < 0.2, "{tokens:?}");
    let served = rig.core.tenants();
    assert!(served.iter().all(|(_, share)| share.tokens > 0), "{served:?}");
}

#[test]
fn a_long_prompt_that_runs_shares_the_steps_with_others() {
    let mut rig = Rig::new(Options { slabs: 3, pages: 100, max_len: 400, ..options() });
    submit(&mut rig.core, Submit { tenant: 1, ..request(1, &tokens(300), 1) });
    (0..4).for_each(|_| drop(rig.step(1)));
    submit(&mut rig.core, Submit { tenant: 2, ..request(2, &[5; 6], 1) });
    // The newcomer's tenant is behind: it goes before the rest of the long prompt.
    assert_eq!(rig.step(1).iter().map(|r| r.0).collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn a_short_prompt_waits_for_one_step_of_a_long_one_which_keeps_half_of_the_time() {
    let mut rig = Rig::new(Options { slabs: 3, pages: 200, max_len: 400, prefix_cache: false, ..options() });
    submit(&mut rig.core, request(1, &tokens(300), 1));
    rig.step(1);
    // Of the same tenant short ones keep coming, each when the one before is done.
    let (mut read, mut short) = ([0, 0], 2);
    while read[0] < 200 {
        submit(&mut rig.core, request(short, &[short as u32; 4], 1));
        let done = (1..=2).find(|_| {
            let rows = rig.step(1);
            rows.iter().for_each(|r| read[usize::from(r.0 != 1)] += r.2);
            rows.iter().any(|r| r.0 == short && r.4 == 1)
        });
        assert!(done.is_some(), "request {short} waited for more than a step");
        short += 1;
    }
    assert!(read[0] >= read[1], "{read:?}");
}

#[test]
fn bad_shares_are_refused_by_name() {
    let with =
        |tenants| Core::new(&presets::toy_v4(), Options { tenants, ..options() }).map(drop).unwrap_err();
    let tenant = |id, weight| Tenant { id, weight, quota_pages: None };
    assert_eq!(with(vec![tenant(1, 0.0)]).to_string(), "tenants[0].weight is 0; it must be a number above 0");
    let twice = with(vec![tenant(3, 1.0), tenant(3, 2.0)]);
    assert_eq!(twice.to_string(), "tenants is 3; each tenant may be named once");
}

//! A dumped core goes on: same outputs as without the dump, and two loads give the same events.

#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;

use common::{Rng, for_seeds};
use dsv4_core::cost::CostModel;
use dsv4_core::event::{Event, What};
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::{LayoutSpec, presets};
use dsv4_core::plan::{Field, Plan};
use dsv4_core::sched::explain::{Reason, ZeroHits};
use dsv4_core::sched::request::{Retention, Submit};
use dsv4_core::{Core, Options};

fn layout() -> LayoutSpec {
    presets::toy(4, 6, 3)
}

fn options(pages: u32) -> Options {
    let cost = CostModel { restore_us: 0.0, ..CostModel::default() };
    Options { pages, slabs: 3, max_step_tokens: 8, max_len: 60, cost, ..Options::default() }
}

/// Plans and commits a step; a sample depends on the request and its position only. False: nothing could run.
fn step(core: &mut Core, events: &mut Vec<Event>) -> bool {
    let mut plan = Plan::new(core.plan_schema());
    let Some(header) = core.plan(plan.words()).unwrap() else { return false };
    let token = |r: usize| {
        let end = plan[Field::row_start][r] + plan[Field::row_len][r];
        (plan.long(Field::row_req, r) as u32 * 7 + end as u32 * 13) % 3
    };
    let samples: Vec<u32> =
        (0..header.rows as usize).filter(|&r| plan[Field::row_samples][r] > 0).map(token).collect();
    core.commit(Step(header.step), &samples, &vec![1; samples.len()]).unwrap();
    core.check().unwrap();
    events.extend(std::iter::from_fn(|| core.next_event()));
    true
}

fn outputs(events: &[Event]) -> BTreeMap<RequestId, Vec<u32>> {
    let mut out: BTreeMap<RequestId, Vec<u32>> = BTreeMap::new();
    for e in events {
        if let What::Token { token, .. } = e.what {
            out.entry(e.request).or_default().push(token);
        }
    }
    out
}

fn prompt(rng: &mut Rng) -> Submit {
    let n = 1 + rng.below(20);
    Submit {
        prompt: (0..n).map(|_| u32::from(rng.below(4) == 0)).collect(),
        max_new: Some(1 + rng.below(12) as u32),
        salt: vec![rng.below(2) as u8],
        priority: rng.below(2) as i32,
        retention: Retention { session: Some(rng.below(3)), ..Retention::default() },
        ..Submit::default()
    }
}

#[test]
fn a_loaded_core_goes_on_and_loading_twice_gives_the_same_events() {
    for_seeds(150, |seed| {
        let mut rng = Rng::new(seed);
        let mut core = Core::new(&layout(), options(16 + rng.below(20) as u32)).unwrap();
        let mut events = Vec::new();
        for id in 1..=8 {
            core.submit(Submit { id: RequestId(id), ..prompt(&mut rng) }).unwrap();
            for _ in 0..rng.below(5) {
                step(&mut core, &mut events);
            }
        }
        let text = core.dump();
        let mut twins = [0, 1].map(|_| Core::load(&layout(), &text).unwrap());
        assert_eq!(twins[0].dump(), twins[1].dump());
        let mut after = [events.clone(), events.clone()];
        for (twin, events) in twins.iter_mut().zip(&mut after) {
            twin.check().unwrap();
            while step(twin, events) {}
            assert!(!twin.has_work());
        }
        while step(&mut core, &mut events) {}
        assert_eq!(after[0], after[1]);
        assert_eq!(outputs(&after[0]), outputs(&events));
    });
}

#[test]
fn a_dump_of_another_layout_and_what_is_no_dump_are_refused() {
    let text = Core::new(&layout(), options(16)).unwrap().dump();
    let e = Core::load(&presets::toy(8, 6, 3), &text).unwrap_err();
    assert_eq!(e.to_string(), "dump is of another layout; load it with the layout of its model");
    let e = Core::load(&layout(), "{}").unwrap_err().to_string();
    assert!(e.starts_with("dump is missing field") && e.ends_with("it must be what dump() returned"), "{e}");
    let e = Core::load(&layout(), &text.replace("\"version\":5", "\"version\":9")).unwrap_err();
    assert_eq!(e.to_string(), "dump is of version 9; it must be what dump() returned");
}

/// Begins a prompt of 40 tokens, which takes `us`. Returns how long it was expected to take.
fn expected_us(core: &mut Core, id: u64, us: f64) -> u64 {
    let submit = Submit { id: RequestId(id), prompt: vec![id as u32; 40], ..Submit::default() };
    core.submit(submit).unwrap();
    let mut plan = Plan::new(core.plan_schema());
    let header = core.plan(plan.words()).unwrap().unwrap();
    core.observe(Step(header.step), us);
    let samples = header.samples as usize;
    core.commit(Step(header.step), &vec![0; samples], &vec![1; samples]).unwrap();
    core.abort(RequestId(id)).unwrap();
    core.stats().into_iter().find(|s| s.0 == "step_predicted_us").unwrap().1
}

#[test]
fn what_was_learnt_of_a_slow_device_goes_into_a_dump() {
    let mut core = Core::new(&layout(), options(64)).unwrap();
    let at_first = expected_us(&mut core, 1, 60_000.0);
    for id in 2..12 {
        expected_us(&mut core, id, 60_000.0);
    }
    let text = core.dump();
    let mut loaded = Core::load(&layout(), &text).unwrap();
    // The second answer also depends on which of the last measured steps is the oldest.
    for us in [5000.0, 5000.0, 5000.0] {
        let learnt = expected_us(&mut core, 40, us);
        assert!(learnt > 2 * at_first, "{learnt} us, {at_first} us before anything was measured");
        assert_eq!(expected_us(&mut loaded, 40, us), learnt);
    }
    let at = text.rfind("\"fixed\":").unwrap() + 8;
    let rest = text[at..].split_once(',').unwrap().1;
    let e = Core::load(&layout(), &format!("{}-1.0,{rest}", &text[..at])).map(drop).unwrap_err();
    let told = "dump is with a cost model that no steps can teach; it must be what dump() returned";
    assert_eq!(e.to_string(), told);
}

fn run(core: &mut Core, id: u64, prompt: Vec<u32>, salt: u8) -> Reason {
    let submit =
        Submit { id: RequestId(id), prompt, salt: vec![salt], max_new: Some(1), ..Submit::default() };
    core.submit(submit).unwrap();
    while step(core, &mut Vec::new()) {}
    core.explain(RequestId(id)).unwrap().reason
}

#[test]
fn a_pin_keeps_its_prefix_also_through_a_dump() {
    let mut core = Core::new(&layout(), options(16)).unwrap();
    let kept: Vec<u32> = (0..17).collect();
    run(&mut core, 1, kept.clone(), 0);
    let pin = core.pin(&[0], &kept);
    let mut core = Core::load(&layout(), &core.dump()).unwrap();
    core.clear_prefix();
    let stats: BTreeMap<String, u64> = core.stats().into_iter().collect();
    assert!(stats["pinned_pages"] > 4 && stats["cached_pages"] == 4, "four blocks and a state");
    assert_eq!(run(&mut core, 2, kept, 0), Reason::None);
    assert!(core.unpin(pin) && !core.unpin(pin));
    core.clear_prefix();
    assert_eq!(core.stats().into_iter().find(|s| s.0 == "free_pages").unwrap().1, 16);
}

#[test]
fn another_salt_is_named_and_repeated_prefixes_that_never_hit_make_a_warning() {
    let mut core = Core::new(&layout(), options(64)).unwrap();
    let warnings = |core: &Core| core.stats().into_iter().find(|s| s.0 == "zero_hit_warnings").unwrap().1;
    assert_eq!(run(&mut core, 1, vec![5; 9], 0), Reason::NeverStored);
    assert_eq!(run(&mut core, 2, vec![5; 9], 1), Reason::Salt);
    for i in 2..=ZeroHits::LIMIT {
        assert_eq!(warnings(&core), 0);
        run(&mut core, 10 + u64::from(i), vec![5; 9], i as u8);
    }
    assert_eq!(warnings(&core), 1);
    assert_eq!(run(&mut core, 5, vec![5; 9], ZeroHits::LIMIT as u8), Reason::None);
}

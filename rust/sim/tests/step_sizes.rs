//! Where a device pads steps with prompts to certain sizes, pieces are cut so that nothing is padded.

use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::presets;
use dsv4_core::plan::Plan;
use dsv4_core::sched::budget::StepBudget;
use dsv4_core::sched::request::Submit;
use dsv4_core::{Core, Options};

const SIZES: [u32; 6] = [64, 128, 256, 512, 1024, 2048];
const DECODES: u32 = 8;
const PROMPT: u32 = 200_000;

/// Tokens of the steps in which a long prompt is read beside decodes that take `decodes_us` alone; each token of a prompt takes 20 us.
fn steps(budget: StepBudget, decodes_us: f64, step_sizes: &[u32]) -> Vec<u32> {
    let options = Options {
        pages: 1 << 12,
        slabs: DECODES + 2,
        max_step_tokens: 2048,
        step_budget: budget,
        step_sizes: step_sizes.to_vec(),
        snapshots: "none".parse().expect("it is a policy"),
        ..Options::default()
    };
    let mut core = Core::new(&presets::flash(), options).expect("the options are valid");
    let mut plan = Plan::new(core.plan_schema());
    let submit = |core: &mut Core, id: u32, n: u32| {
        let prompt = (0..n).map(|t| t + id * PROMPT).collect();
        let submit =
            Submit { id: RequestId(u64::from(id)), prompt, max_new: Some(10_000), ..Submit::default() };
        core.submit(submit).expect("it fits");
    };
    (0..DECODES).for_each(|i| submit(&mut core, i, 100));
    let mut sizes = Vec::new();
    for n in 0..200 {
        if n == 50 {
            submit(&mut core, 100, PROMPT);
            submit(&mut core, 101, PROMPT);
        }
        let header = core.plan(plan.words()).expect("the buffer is long enough").expect("there is work");
        if n > 100 && header.tokens > header.rows {
            sizes.push(header.tokens);
        }
        core.observe(Step(header.step), decodes_us + 20.0 * f64::from(header.tokens - header.decode_rows));
        let samples = header.samples as usize;
        core.commit(Step(header.step), &vec![1; samples], &vec![1; samples]).expect("it is in flight");
        while core.next_event().is_some() {}
    }
    sizes
}

#[test]
fn pieces_are_cut_to_sizes_of_steps() {
    let floor = StepBudget::Decodes { times: 1.01, floor: 512 };
    assert!(steps(floor, 3_000.0, &[]).iter().all(|&n| n == 512 + DECODES), "without sizes the floor is met");
    let with = steps(floor, 3_000.0, &SIZES);
    assert!(!with.is_empty() && with.iter().all(|&n| n == 512), "{with:?}");
    let wide = steps(StepBudget::Decodes { times: 4.0, floor: 64 }, 8_000.0, &SIZES);
    assert!(wide.iter().all(|n| SIZES.contains(n)) && wide.contains(&1024), "1,200 tokens fit: {wide:?}");
}

#[test]
fn longer_steps_than_the_last_size_are_left_as_they_are() {
    let open = steps(StepBudget::Open, 3_000.0, &[64, 512]);
    assert!(open.iter().all(|&n| n == 2048), "{open:?}");
}

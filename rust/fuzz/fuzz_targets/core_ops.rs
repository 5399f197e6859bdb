//! Any order of calls at the core's border equals the cold run and keeps every invariant.
//!
//!     RUSTC_BOOTSTRAP=1 cargo fuzz run core_ops --fuzz-dir rust/fuzz
#![no_main]

use arbitrary::Arbitrary;
use dsv4_core::Options;
use dsv4_core::ids::{RequestId, Step};
use dsv4_core::layout::presets;
use dsv4_core::sched::request::Submit;
use dsv4_sim::world::{World, snapshot_policies};
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Run {
    pages: u8,
    slabs: u8,
    step_tokens: u8,
    two_in_flight: bool,
    policy: u8,
    ops: Vec<Op>,
}

#[derive(Arbitrary, Debug)]
enum Op {
    /// A prompt of the low bits of `bits`.
    Enter {
        salt: bool,
        length: u8,
        bits: u64,
        outputs: u8,
        stop: bool,
        priority: i8,
        all_logits: bool,
    },
    /// The conversation of an earlier request and more.
    Continue {
        which: u8,
        more: u8,
        outputs: u8,
    },
    Plan,
    /// Rows by the bits of `refused` do not count.
    Commit {
        refused: u8,
    },
    End {
        which: u8,
        abort: bool,
    },
    RollBack,
    EvictSnapshots(u8),
    EvictHistory(u8),
    ClearPrefix,
    /// Calls with numbers that mean nothing: refused, and nothing changes.
    Misuse {
        step: u64,
        tokens: u8,
        accepted: Vec<i8>,
        request: u64,
    },
}

fn apply(world: &mut World, op: &Op) -> Result<(), String> {
    match *op {
        Op::Enter { salt, length, bits, outputs, stop, priority, all_logits } => world.enter(Submit {
            prompt: (0..u32::from(length % 60) + 1).map(|i| (bits >> (i % 64)) as u32 & 1).collect(),
            max_new: Some(u32::from(outputs % 40)),
            stop_ids: if stop { vec![1] } else { Vec::new() },
            salt: vec![7; usize::from(salt)],
            priority: i32::from(priority),
            all_logits,
            ..Submit::default()
        }),
        Op::Continue { which, more, outputs } if world.last_id() > 0 => {
            let id = u64::from(which) % world.last_id() + 1;
            let mut prompt = world.expected(id).to_vec();
            prompt.extend((0..more % 9).map(|i| u32::from(i) & 1));
            world.enter(Submit { prompt, max_new: Some(u32::from(outputs % 20)), ..Submit::default() })
        }
        Op::Plan => world.plan().map(drop),
        Op::Commit { refused } => world.commit_without(|row| refused >> (row % 8) & 1 == 1),
        Op::End { which, abort } if world.last_id() > 0 => {
            let id = u64::from(which) % world.last_id() + 1;
            if world.is_live(id) { world.end(id, abort) } else { Ok(()) }
        }
        Op::RollBack => world.roll_back(),
        Op::EvictSnapshots(n) => Ok(_ = world.core().evict_snapshots(n.into())),
        Op::EvictHistory(n) => Ok(_ = world.core().evict_history(n.into())),
        Op::ClearPrefix => Ok(_ = world.core().clear_prefix()),
        Op::Misuse { step, tokens, ref accepted, request } => {
            let (step, core) = (Step(step.saturating_add(1 << 40)), world.core());
            let accepted: Vec<i32> = accepted.iter().map(|&n| n.into()).collect();
            let taken = core.commit(step, &vec![0; tokens.into()], &accepted).is_ok()
                || core.rollback(step).is_ok()
                || core.abort(RequestId(request.saturating_add(1 << 40))) != Ok(false);
            if taken { Err("misuse was taken".to_owned()) } else { Ok(()) }
        }
        _ => Ok(()),
    }
}

fuzz_target!(|run: Run| {
    let policies = snapshot_policies(&[4, 8]);
    let options = Options {
        pages: u32::from(run.pages % 40) + 6,
        slabs: u32::from(run.slabs % 4) + 1,
        max_step_tokens: u32::from(run.step_tokens % 32) + 1,
        max_len: 120,
        max_waiting: 8,
        max_in_flight: if run.two_in_flight { 2 } else { 1 },
        snapshots: policies[usize::from(run.policy) % policies.len()],
        ..Options::default()
    };
    let mut world = World::scripted(&presets::toy_v4(), options, 2);
    let ran = run.ops.iter().try_for_each(|op| apply(&mut world, op).and_then(|()| world.check()));
    if let Err(what) = ran.and_then(|()| world.drain()) {
        panic!("{what}");
    }
});

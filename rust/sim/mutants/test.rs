//! Every known bug is caught by random runs when it is switched on, and by none of them when it is off. A part of the
//! patched copy only, see `rust/sim/mutants/run.py`.

use std::panic::{AssertUnwindSafe, catch_unwind};

use dsv4_core::mutant::{ALL, with};
use dsv4_sim::world::{Overrides, World};

const OPS: u64 = 400;
/// Seeds after which a bug that nobody noticed counts as missed.
const PATIENCE: u64 = 150;

/// What a run finds wrong: a difference to the cold run, broken invariants, or an assertion of the core itself.
fn run(seed: u64) -> Result<(), String> {
    let run = || World::new(seed, Overrides::default()).run(OPS).map(drop);
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(|&s| s.to_owned())).unwrap_or_default())
    })
}

#[test]
fn every_mutant_is_caught() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| ()));
    let caught = ALL.map(|mutant| {
        let found = (0..PATIENCE).find_map(|seed| with(mutant, || run(seed)).err().map(|e| (seed, e)));
        (mutant, found)
    });
    std::panic::set_hook(hook);
    for (mutant, found) in &caught {
        match found {
            Some((seed, what)) => println!("{mutant}: seed {seed}: {}", what.lines().next().unwrap_or("")),
            None => println!("{mutant}: not caught"),
        }
    }
    let missed: Vec<&str> = caught.iter().filter(|c| c.1.is_none()).map(|c| c.0).collect();
    assert!(missed.is_empty(), "not caught in {PATIENCE} runs: {missed:?}");
}

#[test]
fn without_a_mutant_the_same_runs_are_right() {
    for seed in 0..PATIENCE {
        if let Err(what) = with("", || run(seed)) {
            panic!("seed {seed}: {what}");
        }
    }
}

//! `dsv4-sim [--seeds N] [--from SEED] [--ops N]`: one line per seed, or the first failure.

use std::collections::BTreeMap;
use std::process::ExitCode;

use dsv4_sim::world::{Overrides, World};

const USAGE: &str = "usage: dsv4-sim [--seeds N] [--from SEED] [--ops N]";

/// What shows that a run went everywhere.
const REPORTED: [&str; 14] = [
    "steps",
    "finished",
    "aborts",
    "preemptions",
    "rollbacks",
    "prompt_tokens",
    "resumed_tokens",
    "replayed_tokens",
    "recomputed_tokens",
    "snapshots_taken",
    "snapshots_used",
    "snapshots_evicted",
    "evicted_blocks",
    "adopted_blocks",
];

fn parse(mut args: impl Iterator<Item = String>) -> Result<(u64, u64, u64), String> {
    let (mut seeds, mut from, mut ops) = (10, 0, 400);
    while let Some(flag) = args.next() {
        let value = args
            .next()
            .and_then(|v| v.parse().ok())
            .ok_or_else(|| format!("{flag} needs a number; {USAGE}"))?;
        match flag.as_str() {
            "--seeds" => seeds = value,
            "--from" => from = value,
            "--ops" => ops = value,
            _ => return Err(format!("{flag} is not known; {USAGE}")),
        }
    }
    Ok((seeds, from, ops))
}

#[expect(clippy::print_stdout, reason = "a command line tool")]
fn main() -> ExitCode {
    let (seeds, from, ops) = match parse(std::env::args().skip(1)) {
        Ok(settings) => settings,
        Err(message) => {
            println!("{message}");
            return ExitCode::from(2);
        }
    };
    let mut totals: BTreeMap<String, u64> = BTreeMap::new();
    for seed in from..from + seeds {
        match World::new(seed, Overrides::default()).run(ops) {
            Ok(r) => {
                if seeds <= 20 {
                    println!("seed {seed}: events {:016x}, {} us virtual", r.events, r.micros);
                }
                r.stats.into_iter().for_each(|(name, n)| *totals.entry(name).or_default() += n);
            }
            Err(what) => {
                println!("seed {seed}: {what}\nagain: dsv4-sim --from {seed} --seeds 1 --ops {ops}");
                return ExitCode::FAILURE;
            }
        }
    }
    for name in REPORTED {
        println!("{name:>20} {}", totals.get(name).copied().unwrap_or(0));
    }
    println!("{seeds} seeds from {from}, {ops} operations each: all as the cold run");
    ExitCode::SUCCESS
}

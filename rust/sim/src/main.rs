//! `dsv4-sim`: runs seeds, one line each or the first failure. See `USAGE`.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use dsv4_sim::world::{Overrides, World};

const USAGE: &str = "usage: dsv4-sim [--seeds N | --seconds S] [--from SEED | --from fresh] [--ops N]";

/// What shows that a run went everywhere.
const REPORTED: [&str; 24] = [
    "requests",
    "steps",
    "finished",
    "aborts",
    "preemptions",
    "preempted_with_state",
    "unparked",
    "parked_lost",
    "forks",
    "aged",
    "passed",
    "deadline_misses",
    "pins_broken",
    "rollbacks",
    "rows_refused",
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

/// Which seeds, and how much of each.
struct Settings {
    from: u64,
    seeds: u64,
    limit: Option<Duration>,
    ops: u64,
}

impl Settings {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let mut settings = Settings { from: 0, seeds: 10, limit: None, ops: 400 };
        while let Some(flag) = args.next() {
            let text = args.next().ok_or_else(|| format!("{flag} needs a value; {USAGE}"))?;
            let number =
                || text.parse::<u64>().map_err(|_| format!("{flag} is {text}, it must be a number; {USAGE}"));
            match flag.as_str() {
                "--from" if text == "fresh" => settings.from = fresh(),
                "--from" => settings.from = number()?,
                "--seeds" => settings.seeds = number()?,
                "--seconds" => {
                    (settings.seeds, settings.limit) = (u64::MAX, Some(Duration::from_secs(number()?)));
                }
                "--ops" => settings.ops = number()?,
                _ => return Err(format!("{flag} is not known; {USAGE}")),
            }
        }
        Ok(settings)
    }
}

/// A seed that nobody has seen.
fn fresh() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos() as u64) >> 8
}

/// What all threads have done so far.
#[derive(Default)]
struct Outcome {
    seeds: u64,
    totals: BTreeMap<String, u64>,
    failure: Option<(u64, String)>,
}

/// Takes seeds until there are none left, the time is up, or one has failed.
#[expect(clippy::print_stdout, reason = "a command line tool")]
fn work(settings: &Settings, next: &AtomicU64, outcome: &Mutex<Outcome>, start: Instant) {
    let over = || settings.limit.is_some_and(|limit| start.elapsed() >= limit);
    while !over() {
        let nth = next.fetch_add(1, Ordering::Relaxed);
        if nth >= settings.seeds {
            return;
        }
        let seed = settings.from.wrapping_add(nth);
        let result = World::new(seed, Overrides::default()).run(settings.ops);
        let Ok(mut outcome) = outcome.lock() else { return };
        if outcome.failure.is_some() {
            return;
        }
        match result {
            Ok(report) => {
                if settings.seeds <= 20 {
                    println!("seed {seed}: events {:016x}, {} us virtual", report.events, report.micros);
                }
                outcome.seeds += 1;
                *outcome.totals.entry("requests".to_owned()).or_default() += report.requests;
                for (name, n) in report.stats {
                    *outcome.totals.entry(name).or_default() += n;
                }
            }
            Err(what) => outcome.failure = Some((seed, what)),
        }
    }
}

#[expect(clippy::print_stdout, reason = "a command line tool")]
fn main() -> ExitCode {
    let settings = match Settings::parse(std::env::args().skip(1)) {
        Ok(settings) => settings,
        Err(message) => {
            println!("{message}");
            return ExitCode::from(2);
        }
    };
    let (next, outcome, start) = (AtomicU64::new(0), Mutex::new(Outcome::default()), Instant::now());
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| work(&settings, &next, &outcome, start));
        }
    });
    let outcome = outcome.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (from, ops) = (settings.from, settings.ops);
    if let Some((seed, what)) = outcome.failure {
        println!("seed {seed}: {what}\nagain: dsv4-sim --from {seed} --seeds 1 --ops {ops}");
        return ExitCode::FAILURE;
    }
    for name in REPORTED {
        println!("{name:>20} {}", outcome.totals.get(name).copied().unwrap_or(0));
    }
    println!("{} seeds from {from}, {ops} operations each: all as the cold run", outcome.seeds);
    ExitCode::SUCCESS
}

//! Seeds for tests: fresh ones by default, `DSV4_SEED` repeats a run. A failing test prints its seed.

/// SplitMix64.
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Runs `case` with `cases` seeds; a panic inside names the seed that repeats it.
pub fn for_seeds(cases: u64, case: impl Fn(u64) + std::panic::RefUnwindSafe) {
    let given = std::env::var("DSV4_SEED").ok().map(|s| s.parse().expect("DSV4_SEED is a number"));
    let clock = || {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_nanos()) as u64
    };
    let first = given.unwrap_or_else(clock);
    for seed in (0..if given.is_some() { 1 } else { cases }).map(|i| first.wrapping_add(i)) {
        if let Err(panic) = std::panic::catch_unwind(|| case(seed)) {
            eprintln!("failed with DSV4_SEED={seed}");
            std::panic::resume_unwind(panic);
        }
    }
}

//! Known bugs that can be switched on, to show that the tests would catch them (feature `mutants`).
//!
//! Without the feature [`on`] is a constant `false`, so nothing of this is left in a release build. A mutant is active in
//! one thread and for one call of [`with`].

/// A bug that somebody has had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mutant {
    /// Some pages are not given back: a leak.
    SkippedDecrement,
    /// The tree does not count itself as a holder of what is published.
    SkippedIncrement,
    /// Pages are free at once although a step in flight touches them.
    FreeAtAbort,
    /// The pages of a state are not held while it is restored.
    LeaseForgotten,
    /// A salt does not matter: other tenants' prefixes are found.
    SaltIgnored,
    /// A state is stored one block before its position.
    StateOfOtherPosition,
    /// A pinned prefix stays in line for eviction.
    PinnedInLine,
    /// The device is not told that a request took over an equal block's page.
    AdoptionUntold,
    /// A prefix is matched one block further than it was compared.
    MatchTooLong,
    /// A replay starts one token late.
    WindowOffByOne,
    /// A request starts from a saved state that nobody restores.
    HitWithoutState,
    /// A replay writes history from a state that is not exact yet.
    ReplayWrites,
    /// Results of an earlier stay in a slab count.
    LateResultCounts,
    /// A slab is free at once although a step in flight writes it.
    SlabAtOnce,
    /// A fork does not copy the page that its parent is writing.
    ForkSharesTail,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Mutant; 15] = [
        Mutant::SkippedDecrement,
        Mutant::SkippedIncrement,
        Mutant::FreeAtAbort,
        Mutant::LeaseForgotten,
        Mutant::SaltIgnored,
        Mutant::StateOfOtherPosition,
        Mutant::PinnedInLine,
        Mutant::AdoptionUntold,
        Mutant::MatchTooLong,
        Mutant::WindowOffByOne,
        Mutant::HitWithoutState,
        Mutant::ReplayWrites,
        Mutant::LateResultCounts,
        Mutant::SlabAtOnce,
        Mutant::ForkSharesTail,
    ];
}

#[cfg(feature = "mutants")]
mod switch {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Whether this bug is switched on.
    pub fn on(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }

    /// Calls `f` with one bug switched on, or none.
    pub fn with<T>(mutant: Option<Mutant>, f: impl FnOnce() -> T) -> T {
        struct Off;
        impl Drop for Off {
            fn drop(&mut self) {
                ACTIVE.set(None);
            }
        }
        let _off = Off;
        ACTIVE.set(mutant);
        f()
    }
}

#[cfg(feature = "mutants")]
pub use switch::{on, with};

/// Whether this bug is switched on: never, without the feature.
#[cfg(not(feature = "mutants"))]
pub(crate) const fn on(_: Mutant) -> bool {
    false
}

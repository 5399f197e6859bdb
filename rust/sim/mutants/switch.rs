//! Known bugs that can be switched on: a part of the patched copy only, see `rust/sim/mutants/run.py`.

use std::cell::Cell;

thread_local! {
    static ACTIVE: Cell<&'static str> = const { Cell::new("") };
}

/// Whether this bug is switched on in this thread.
pub fn on(mutant: &str) -> bool {
    ACTIVE.get() == mutant
}

/// Calls `f` with one bug switched on, or none (`""`).
pub fn with<T>(mutant: &'static str, f: impl FnOnce() -> T) -> T {
    struct Off;
    impl Drop for Off {
        fn drop(&mut self) {
            ACTIVE.set("");
        }
    }
    let _off = Off;
    ACTIVE.set(mutant);
    f()
}

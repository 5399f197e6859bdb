//! Drives the core in virtual time against a fake device that knows what every row of its memory must hold.
//!
//! | file | holds |
//! | --- | --- |
//! | `fake.rs` | a model whose activations are hashes: any wrong, missing or stale row changes everything after it |
//! | `oracle.rs` | the cold run of that model over plain vectors: what every position must give |
//! | `device.rs` | pages, slabs and page tables; runs plans as a GPU would, and objects to conflicts |
//! | `world/` | one seed = one run of requests, steps and faults, checked after every operation; `chance.rs` draws them |
//!
//! Equality with the oracle at every computed position is the whole statement of exactness: restored, replayed, chunked,
//! preempted or rolled back, a token's activation is the cold one.

pub mod device;
pub mod fake;
pub mod oracle;
pub mod replay;
pub mod rng;
pub mod world;

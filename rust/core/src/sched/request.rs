//! A request and its states.
//!
//! ```text
//!             Admit            PromptPlanned           Token
//!   Waiting ─────────▶ Prefill ─────────────▶ Decode ◀───────┐
//!      ▲                  │                     │ └──────────┘
//!      └────── Lose ──────┴─────────────────────┤ preempted, or its step was rolled back
//!                                               ▼
//!   any live state ── Finish(Stop | Abort | Error), Decode ── Finish(Length) ──▶ Finished
//! ```

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::cache::Sequence;
pub use crate::cache::retention::{Hint, Retention};
use crate::cache::snapshot::SnapshotPages;
use crate::error::CoreError;
use crate::ids::{PageId, RequestId, SlabId, Step, Ticket};
use crate::sched::explain::Explain;
pub use crate::sched::park::Parked;
use crate::sched::policy::Due;
pub use crate::sched::queue::{Order, Place};
use crate::sched::tokens::Tokens;

/// Why a request ended; the numbers are those of the FINISHED event.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Finish {
    /// A stop token was sampled, or the caller found a stop string.
    Stop = 1,
    /// `max_new` tokens are there.
    Length = 2,
    /// The caller gave it up.
    Abort = 3,
    /// Its step could not be run.
    Error = 4,
}

/// Where a request stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// In the queue; holds no memory.
    Waiting,
    /// Has a slab; some of its known tokens are not yet planned.
    Prefill,
    /// Every known token is planned; one more per step.
    Decode,
    /// Over.
    Finished(Finish),
}

/// What can happen to a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// It gets a slab and pages.
    Admit,
    /// The last of its known tokens is in a plan.
    PromptPlanned,
    /// A token was sampled.
    Token,
    /// Its slab is taken away: preemption or rollback.
    Lose,
    /// It ends.
    Finish(Finish),
}

impl Phase {
    /// The next state. Fails with both names where the change is not allowed.
    pub fn after(self, change: Change, request: RequestId) -> Result<Phase, CoreError> {
        match (self, change) {
            (Phase::Waiting, Change::Admit) => Ok(Phase::Prefill),
            (Phase::Prefill, Change::PromptPlanned) | (Phase::Decode, Change::Token) => Ok(Phase::Decode),
            (Phase::Prefill | Phase::Decode, Change::Lose) => Ok(Phase::Waiting),
            (Phase::Decode, Change::Finish(f)) => Ok(Phase::Finished(f)),
            (Phase::Waiting | Phase::Prefill, Change::Finish(f)) if f != Finish::Length => {
                Ok(Phase::Finished(f))
            }
            (state, event) => {
                Err(CoreError::Illegal { request: request.0, state: state.name(), event: event.name() })
            }
        }
    }

    /// As it reads in messages.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Waiting => "waiting",
            Phase::Prefill => "in prefill",
            Phase::Decode => "in decode",
            Phase::Finished(_) => "finished",
        }
    }
}

impl Change {
    /// As it reads in messages.
    pub fn name(self) -> &'static str {
        match self {
            Change::Admit => "admission",
            Change::PromptPlanned => "the end of its prompt",
            Change::Token => "a token",
            Change::Lose => "the loss of its slab",
            Change::Finish(Finish::Length) => "an end by length",
            Change::Finish(_) => "an end",
        }
    }
}

/// What the caller submits.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Submit {
    /// The caller's name for it; free again once it has finished.
    pub id: RequestId,
    /// At least one token.
    pub prompt: Vec<u32>,
    /// Tokens to sample at most; `None`: as many as `max_len` and the pool allow. With 0 the prompt is only computed.
    pub max_new: Option<u32>,
    /// Sampling one of these ends the request.
    pub stop_ids: Vec<u32>,
    /// Requests share prefixes only with the same salt.
    pub salt: Vec<u8>,
    /// Higher goes first.
    pub priority: i32,
    /// Logits of every prompt position are wanted, so nothing is reused.
    pub all_logits: bool,
    /// Whose share of the device it uses; see [`crate::core::Tenant`].
    pub tenant: u32,
    /// When its first token is wanted, on the clock of [`crate::Core::set_time`].
    pub deadline_us: Option<u64>,
    /// What its owner says of later use of its prefix.
    pub retention: Retention,
}

/// Seniority among running requests: higher priority first, then first come. The last one gives way first.
pub type Rank = (Reverse<i32>, u64);

/// A live request.
#[derive(Debug)]
pub struct Request {
    /// The caller's name.
    pub id: RequestId,
    /// Prompt, then what was sampled and committed.
    pub tokens: Tokens,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens to sample at most.
    pub max_new: u32,
    /// Tokens that end it; a few lie here, where each step looks at them.
    pub stop_ids: SmallVec<[u32; 6]>,
    /// Whose prefixes it may share.
    pub salt: Box<[u8]>,
    /// Priority, tenant, and its place in line while it waits.
    pub place: Place,
    /// When it came, on the core's clock.
    pub arrived_us: u64,
    /// See [`Submit::deadline_us`].
    pub deadline_us: Option<u64>,
    /// Admissions of requests behind it while it did not fit.
    pub passed: u32,
    /// Pages available and requests running when it last did not fit.
    pub blocked: Option<(u32, u32)>,
    /// The live request whose state it may start from.
    pub forked: Option<Forked>,
    /// See [`Submit::all_logits`].
    pub all_logits: bool,
    /// Its tenant and retention.
    pub hint: Hint,
    /// Where it stands.
    pub phase: Phase,
    /// What it holds while it runs.
    pub run: Option<Run>,
    /// What it holds while it waits with its state saved.
    pub parked: Option<Box<Parked>>,
    /// Tokens of its prefix that were known when it was last looked up.
    pub known_prefix: u32,
    /// Tokens that were computed when it last lost its slab.
    pub computed_before: u32,
    /// What is told about it; complete when it is first admitted.
    pub explain: Explain,
}

/// From which live request a waiting one may start, and how far.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Forked {
    /// The other request.
    pub parent: RequestId,
    /// Its arrival: names are given again.
    pub arrival: u64,
    /// Leading tokens that both have; the state is taken there at the latest.
    pub shared: u32,
}

impl Request {
    /// Its seniority while it runs.
    pub fn rank(&self) -> Rank {
        (Reverse(self.place.priority), self.place.arrival)
    }

    /// Moves to the next state.
    pub fn change(&mut self, change: Change) -> Result<(), CoreError> {
        self.phase = self.phase.after(change, self.id)?;
        Ok(())
    }

    /// As it could be submitted again.
    pub fn as_submitted(&self, prompt: Vec<u32>) -> Submit {
        Submit {
            id: self.id,
            prompt,
            max_new: Some(self.max_new),
            stop_ids: self.stop_ids.to_vec(),
            salt: self.salt.to_vec(),
            priority: self.place.priority,
            all_logits: self.all_logits,
            tenant: self.hint.tenant,
            deadline_us: self.deadline_us,
            retention: self.hint.retention,
        }
    }

    /// Known tokens.
    pub fn known(&self) -> u32 {
        self.tokens.len()
    }

    /// Tokens sampled so far.
    pub fn outputs(&self) -> u32 {
        self.known() - self.prompt
    }
}

/// What a running request holds.
#[derive(Debug)]
pub struct Run {
    /// Tells this stay in a slab from earlier ones of the same request: results of earlier ones are ignored.
    pub epoch: u64,
    /// Its live state.
    pub slab: SlabId,
    /// Its history.
    pub seq: Sequence,
    /// Tokens whose forward is planned; the next one to plan is at this position.
    pub planned: u32,
    /// Tokens whose forward is committed.
    pub computed: u32,
    /// Sampled tokens not committed yet.
    pub unknown: u32,
    /// Where the newest of them comes from: step and index among its samples.
    pub sampled_at: (Step, u32),
    /// End of the replay, 0 without one. Positions below write no history.
    pub replay_end: u32,
    /// What its first row starts from.
    pub start: Start,
    /// No token from here on is planned: another request takes its state over here first.
    pub hold: u32,
    /// Tokens that were computed for it when the stay began.
    pub begun: u32,
    /// Where chunks end so that a state can be saved.
    pub due: Due,
    /// Blocks whose page the device knows.
    pub told: u32,
    /// Blocks whose page changed since the device was told.
    pub adopted: Vec<(u32, PageId)>,
    /// The newest state saved in decode, not yet in the tree.
    pub spare: Option<(u32, SnapshotPages)>,
}

impl Run {
    /// A stay that begins at position `at`: everything before it is computed, or will be restored or replayed.
    pub fn new(epoch: u64, slab: SlabId, seq: Sequence, at: u32, start: Start, due: Due) -> Self {
        Run {
            epoch,
            slab,
            seq,
            planned: at,
            computed: at,
            unknown: 0,
            sampled_at: (Step(0), 0),
            replay_end: 0,
            start,
            hold: u32::MAX,
            begun: at,
            due,
            told: 0,
            adopted: Vec::new(),
            spare: None,
        }
    }
}

/// What a slab holds when a request's first row runs.
#[derive(Debug)]
pub enum Start {
    /// Nothing: the row says RESET.
    Empty,
    /// A saved state at this position, restored from these pages by this copy.
    Saved(u32, Vec<PageId>, Ticket),
    /// The rows before.
    Running,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_state_and_change_is_allowed_or_refused_by_name() {
        use Change::{Admit, Lose, PromptPlanned, Token};
        let states = [Phase::Waiting, Phase::Prefill, Phase::Decode, Phase::Finished(Finish::Stop)];
        let changes = [
            (Admit, [true, false, false, false]),
            (PromptPlanned, [false, true, false, false]),
            (Token, [false, false, true, false]),
            (Lose, [false, true, true, false]),
            (Change::Finish(Finish::Length), [false, false, true, false]),
            (Change::Finish(Finish::Stop), [true, true, true, false]),
            (Change::Finish(Finish::Abort), [true, true, true, false]),
        ];
        for (change, allowed) in changes {
            for (state, ok) in states.into_iter().zip(allowed) {
                let next = state.after(change, RequestId(7));
                assert_eq!(next.is_ok(), ok, "{state:?} {change:?}");
                if let Err(e) = next {
                    let text = e.to_string();
                    assert!(text.contains(state.name()) && text.contains(change.name()), "{text}");
                }
            }
        }
    }
}

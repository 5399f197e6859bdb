//! A request and its stages.
//!
//! ```text
//!   Waiting ── start ──▶ Running: in prefill ── prompt_planned ──▶ in decode ◀── token ──┐
//!      ▲                             │                                 │ └───────────────┘
//!      └─────────── stop ────────────┴─────────────────────────────────┤ preempted, or its step was rolled back
//!                                                                      ▼
//!   any stage ── finish(Stop | Abort | Error), in decode ── finish(Length) ──▶ gone from the table
//! ```
//!
//! What a request holds lies in its stage, so it cannot hold what its stage has not. A request whose pages are on their way
//! from another memory will be a third stage, `Loading`, between waiting and running: it holds its history and the tickets
//! of its copies, but no slab.

use std::cmp::Reverse;

use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::cache::Sequence;
pub use crate::cache::retention::{Hint, Retention};
use crate::cache::snapshot::SnapshotPages;
use crate::error::CoreError;
use crate::ids::{PageId, RequestId, SlabId, Step, Ticket};
use crate::sched::explain::Explain;
use crate::sched::policy::Due;
pub use crate::sched::requests::queue::{Order, Place};
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
}

/// Where a request stands, and what it holds there.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "each step looks at the run of each running request")]
pub enum Stage {
    /// In the queue. One that gave way with its state saved keeps history and state.
    Waiting {
        /// What it goes on from.
        parked: Option<Box<Parked>>,
    },
    /// Has a slab and the pages of its known tokens.
    Running(Run),
}

impl Stage {
    /// Waiting with nothing.
    const IDLE: Stage = Stage::Waiting { parked: None };

    /// What a running request holds.
    pub fn run_mut(&mut self) -> Option<&mut Run> {
        if let Stage::Running(run) = self { Some(run) } else { None }
    }

    /// As it reads in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Stage::Waiting { .. } => "waiting",
            Stage::Running(run) if run.decoding => "in decode",
            Stage::Running(_) => "in prefill",
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
    /// Where it stands, and what it holds there.
    pub stage: Stage,
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

    /// A request that has come and waits.
    pub fn new(submit: Submit, place: Place, max_new: u32, now_us: u64) -> Self {
        let prompt = submit.prompt.len() as u32;
        Request {
            id: submit.id,
            prompt,
            tokens: submit.prompt.into(),
            max_new,
            stop_ids: submit.stop_ids.into(),
            salt: submit.salt.into(),
            place,
            arrived_us: now_us,
            deadline_us: submit.deadline_us,
            passed: 0,
            blocked: None,
            forked: None,
            all_logits: submit.all_logits,
            hint: Hint { tenant: submit.tenant, retention: submit.retention },
            stage: Stage::IDLE,
            known_prefix: 0,
            computed_before: 0,
            explain: Explain { prompt_tokens: prompt, ..Explain::default() },
        }
    }

    /// What it holds while it runs.
    pub fn run(&self) -> Option<&Run> {
        if let Stage::Running(run) = &self.stage { Some(run) } else { None }
    }

    /// What it holds while it runs.
    pub fn run_mut(&mut self) -> Option<&mut Run> {
        self.stage.run_mut()
    }

    /// What it holds while it waits with its state saved.
    pub fn parked(&self) -> Option<&Parked> {
        if let Stage::Waiting { parked } = &self.stage { parked.as_deref() } else { None }
    }

    /// It no longer has its saved state.
    pub fn take_parked(&mut self) -> Option<Parked> {
        if let Stage::Waiting { parked } = &mut self.stage { parked.take().map(|p| *p) } else { None }
    }

    /// It waits with its state saved.
    pub fn hold(&mut self, parked: Parked) {
        self.stage = Stage::Waiting { parked: Some(Box::new(parked)) };
    }

    /// It gets a slab and pages. Fails unless it waits.
    pub fn start(&mut self, run: Run) -> Result<(), CoreError> {
        if let Stage::Running(_) = self.stage {
            return Err(self.illegal("admission"));
        }
        self.blocked = None;
        self.stage = Stage::Running(run);
        Ok(())
    }

    /// The last of its known tokens is in a plan. Fails unless it is in prefill.
    pub fn prompt_planned(&mut self) -> Result<(), CoreError> {
        match &mut self.stage {
            Stage::Running(run) if !run.decoding => run.decoding = true,
            _ => return Err(self.illegal("the end of its prompt")),
        }
        Ok(())
    }

    /// A token was sampled. Fails unless it is in decode.
    pub fn token(&mut self, token: u32) -> Result<(), CoreError> {
        match &mut self.stage {
            Stage::Running(run) if run.decoding => run.unknown -= 1,
            _ => return Err(self.illegal("a token")),
        }
        self.tokens.push(token);
        Ok(())
    }

    /// Its slab is taken away: it waits again. Fails unless it runs.
    pub fn stop(&mut self) -> Result<Run, CoreError> {
        match std::mem::replace(&mut self.stage, Stage::IDLE) {
            Stage::Running(run) => {
                self.explain.preemptions += 1;
                self.computed_before = run.computed;
                Ok(run)
            }
            waiting @ Stage::Waiting { .. } => {
                self.stage = waiting;
                Err(self.illegal("the loss of its slab"))
            }
        }
    }

    /// Whether it may end so: by length only in decode.
    pub fn may_finish(&self, reason: Finish) -> Result<(), CoreError> {
        let decoding = self.run().is_some_and(|run| run.decoding);
        if reason == Finish::Length && !decoding { Err(self.illegal("an end by length")) } else { Ok(()) }
    }

    #[cold]
    fn illegal(&self, event: &'static str) -> CoreError {
        CoreError::Illegal { request: self.id.0, state: self.stage.name(), event }
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

    /// Of these, those that are still to be read: not planned, or of a waiting request not found in the cache when it was looked up last.
    pub fn left(&self) -> u32 {
        self.known() - self.run().map_or(self.known_prefix, |run| run.planned).min(self.known())
    }

    /// Tokens sampled so far.
    pub fn outputs(&self) -> u32 {
        self.known() - self.prompt
    }
}

/// What a running request holds.
#[derive(Debug)]
pub struct Run {
    /// Tells this stay in a slab from earlier ones of the same request: results of earlier ones are ignored. Given when it
    /// starts.
    pub epoch: u64,
    /// Every known token is planned; one more per step.
    pub decoding: bool,
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
    pub fn new(slab: SlabId, seq: Sequence, at: u32, start: Start, due: Due) -> Self {
        Run {
            epoch: 0,
            decoding: false,
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

/// What a waiting request holds so that nothing of it has to be run again.
#[derive(Debug)]
pub struct Parked {
    /// The state's position.
    pub pos: u32,
    /// The history up to there.
    pub seq: Sequence,
    /// Where the state lies.
    pub state: SnapshotPages,
    /// The copy that saves it.
    pub saved: Ticket,
    /// Boundaries at which its state is saved for others.
    pub due: Due,
    /// A state kept aside in decode.
    pub spare: Option<(u32, SnapshotPages)>,
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
    use crate::cache::{CacheOptions, KvCache, Lost, Match};
    use crate::layout::presets;
    use crate::sched::policy::SnapshotPolicy;

    fn request(stage: Stage) -> Request {
        let order = Order::Known(Reverse(0));
        let place = Place { arrival: 1, priority: 0, tenant: 0, order };
        let submit = Submit { id: RequestId(7), prompt: vec![1, 2], ..Submit::default() };
        Request { stage, ..Request::new(submit, place, 4, 0) }
    }

    fn run(decoding: bool) -> Run {
        let layout = presets::toy(4, 6, 3);
        let mut cache = KvCache::new(&layout, &CacheOptions::default()).unwrap();
        let seq = cache.attach(b"", &[], 0, Hint::default());
        let due = SnapshotPolicy::None.due(4, 2, 2, &Match::nothing(Lost::Nothing));
        Run { decoding, unknown: 1, ..Run::new(SlabId(0), seq, 0, Start::Empty, due) }
    }

    #[test]
    fn every_pair_of_stage_and_change_is_allowed_or_refused_by_name() {
        type Act = fn(&mut Request) -> Result<(), CoreError>;
        let stages: [fn() -> Stage; 3] =
            [|| Stage::IDLE, || Stage::Running(run(false)), || Stage::Running(run(true))];
        let changes: [(&str, Act, [&str; 3]); 7] = [
            ("admission", |r| r.start(run(false)), ["in prefill", "", ""]),
            ("the end of its prompt", Request::prompt_planned, ["", "in decode", ""]),
            ("a token", |r| r.token(9), ["", "", "in decode"]),
            ("the loss of its slab", |r| r.stop().map(drop), ["", "waiting", "waiting"]),
            ("an end by length", |r| r.may_finish(Finish::Length), ["", "", "in decode"]),
            ("an end", |r| r.may_finish(Finish::Stop), ["waiting", "in prefill", "in decode"]),
            ("an end", |r| r.may_finish(Finish::Abort), ["waiting", "in prefill", "in decode"]),
        ];
        for (name, change, becomes) in changes {
            for (stage, next) in stages.iter().zip(becomes) {
                let mut request = request(stage());
                let before = request.stage.name();
                match change(&mut request) {
                    Ok(()) => assert_eq!(request.stage.name(), next, "{name}, {before}"),
                    Err(e) => {
                        let text = e.to_string();
                        assert!(next.is_empty() && text.contains(before) && text.contains(name), "{text}");
                        assert_eq!((request.stage.name(), request.known()), (before, 2), "{name}");
                    }
                }
            }
        }
    }
}

//! What can be wrong: refusals that a caller can act on, and damage that `check()` finds.

use thiserror::Error;

/// A refusal. Every message names the field or request, the value and the limit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CoreError {
    /// A layout or an option that cannot work.
    #[error("{field} is {value}; {expected}")]
    Config {
        /// The setting or layout field.
        field: String,
        /// What it was.
        value: String,
        /// What it can be.
        expected: String,
    },
    /// The waiting queue is full.
    #[error("{waiting} requests are waiting and max_waiting is {limit}; try again later")]
    Overloaded {
        /// Requests waiting now.
        waiting: usize,
        /// The queue's limit.
        limit: usize,
    },
    /// The request needs more pages than the pool has, even if it were alone.
    #[error(
        "the request needs {needed} pages of history and the pool has {pages}; at most {tokens} tokens fit"
    )]
    NeverFits {
        /// Pages for prompt and output.
        needed: u32,
        /// Pages of the pool.
        pages: u32,
        /// Tokens that the pool can hold.
        tokens: u64,
    },
    /// Prompt and output are longer than allowed.
    #[error("prompt and output have {tokens} tokens and max_len is {limit}")]
    TooLong {
        /// Prompt tokens plus `max_new`.
        tokens: u64,
        /// The limit.
        limit: u32,
    },
    /// A prompt without tokens.
    #[error("request {0} has an empty prompt; it needs at least one token")]
    EmptyPrompt(u64),
    /// The id is taken by a live request.
    #[error("request {0} is already known")]
    Duplicate(u64),
    /// No such request.
    #[error("request {0} is not known")]
    UnknownRequest(u64),
    /// A step that is not the next one to commit, or not in flight.
    #[error("step {step} cannot be {action}; in flight are {in_flight:?}")]
    WrongStep {
        /// The step named by the caller.
        step: u64,
        /// `committed` or `rolled back`.
        action: &'static str,
        /// Steps in flight, oldest first.
        in_flight: Vec<u64>,
    },
    /// `commit` got another number of tokens than the step samples.
    #[error("step {step} samples {expected} tokens, but {got} were committed")]
    WrongTokenCount {
        /// The step.
        step: u64,
        /// Its sample rows.
        expected: usize,
        /// Tokens given.
        got: usize,
    },
    /// `commit` got another number of accepted counts than rows sample.
    #[error(
        "step {step} samples in {expected} rows, but accepted has {got} counts; it needs one for each of them"
    )]
    WrongAcceptedCount {
        /// The step.
        step: u64,
        /// Its rows that sample.
        expected: usize,
        /// Counts given.
        got: usize,
    },
    /// `commit` got a count of accepted tokens that the row cannot have.
    #[error(
        "step {step}, row {row}: {accepted} tokens are accepted; it sampled {sampled}, so it must be 0 to {sampled}"
    )]
    WrongAccepted {
        /// The step.
        step: u64,
        /// The row.
        row: usize,
        /// Tokens that it sampled.
        sampled: u32,
        /// The count given.
        accepted: i32,
    },
    /// A state machine was asked for something that its state does not allow.
    #[error("request {request} is {state}, which does not allow {event}")]
    Illegal {
        /// The request.
        request: u64,
        /// Its state.
        state: &'static str,
        /// What was asked.
        event: &'static str,
    },
}

impl CoreError {
    pub(crate) fn config(field: &str, value: impl ToString, expected: impl ToString) -> Self {
        CoreError::Config {
            field: field.to_owned(),
            value: value.to_string(),
            expected: expected.to_string(),
        }
    }
}

/// Damage found by a check: a bug of ours, never the caller's.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{what}: {detail}")]
pub struct Malformed {
    /// The invariant that does not hold.
    pub what: &'static str,
    /// Where, with the numbers that differ.
    pub detail: String,
}

impl Malformed {
    pub(crate) fn unless(
        holds: bool,
        what: &'static str,
        detail: impl FnOnce() -> String,
    ) -> Result<(), Malformed> {
        if holds { Ok(()) } else { Err(Malformed { what, detail: detail() }) }
    }
}

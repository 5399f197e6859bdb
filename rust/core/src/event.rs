//! What happened to requests, in order. At the border an event is six integers.

use std::collections::VecDeque;

use crate::ids::{RequestId, Step};
use crate::sched::request::Finish;

/// Integers of one event at the border: kind, request, step, a, b, c.
pub const EVENT_WIDTH: usize = 6;

/// Why a running request lost its slab.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Loss {
    /// A request before it in line needed pages.
    Memory = 0,
    /// Its step was rolled back.
    Rollback = 1,
    /// A request of higher priority got its slab.
    Priority = 2,
}

/// One thing that happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// A token was sampled.
    Token {
        /// Its id.
        token: u32,
        /// Its place in the output, from 0.
        index: u32,
        /// Its place among the samples of the step.
        sample: u32,
    },
    /// The request is over.
    Finished {
        /// Why.
        reason: Finish,
        /// Tokens sampled.
        outputs: u32,
        /// The stop token that ended it.
        stop: Option<u32>,
    },
    /// It waits again.
    Preempted {
        /// Why.
        loss: Loss,
    },
    /// It got a slab, for the first time or again.
    Resumed {
        /// Tokens whose history is shared.
        at: u32,
        /// Tokens whose history was known.
        history: u32,
        /// Tokens that are run again although their history is known.
        replayed: u32,
    },
    /// A piece of its prompt is computed.
    Prefill {
        /// Tokens computed or reused so far.
        done: u32,
        /// Tokens in all.
        total: u32,
    },
}

/// An event of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Event {
    /// Whose.
    pub request: RequestId,
    /// The step that was committed or planned last.
    pub step: Step,
    /// What.
    pub what: What,
}

impl Event {
    /// The six integers (absent values are -1 or 0, see `_core.pyi`).
    pub fn to_row(self) -> [i64; EVENT_WIDTH] {
        let (kind, a, b, c) = match self.what {
            What::Token { token, index, sample } => (1, token.into(), index.into(), sample.into()),
            What::Finished { reason, outputs, stop } => {
                (2, reason as i64, outputs.into(), stop.map_or(-1, i64::from))
            }
            What::Preempted { loss } => (3, loss as i64, 0, 0),
            What::Resumed { at, history, replayed } => (4, at.into(), history.into(), replayed.into()),
            What::Prefill { done, total } => (5, done.into(), total.into(), 0),
        };
        [kind, self.request.0 as i64, self.step.0 as i64, a, b, c]
    }
}

/// Events that nobody has fetched yet.
#[derive(Debug, Default)]
pub struct Events(VecDeque<Event>);

impl Events {
    /// Adds one.
    pub fn push(&mut self, request: RequestId, step: Step, what: What) {
        self.0.push_back(Event { request, step, what });
    }

    /// Takes the oldest.
    pub fn pop(&mut self) -> Option<Event> {
        self.0.pop_front()
    }

    /// Fills `out` with whole rows and returns how many.
    pub fn drain_into(&mut self, out: &mut [i64]) -> usize {
        let n = self.0.len().min(out.len() / EVENT_WIDTH);
        for (row, event) in out.chunks_exact_mut(EVENT_WIDTH).zip(self.0.drain(..n)) {
            row.copy_from_slice(&event.to_row());
        }
        n
    }

    /// Events waiting.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `_core.pyi` has them: Python reads these numbers.
    #[test]
    fn rows_are_those_of_the_border() {
        let whats = [
            (What::Token { token: 17, index: 2, sample: 5 }, [1, 17, 2, 5]),
            (What::Finished { reason: Finish::Stop, outputs: 3, stop: Some(9) }, [2, 1, 3, 9]),
            (What::Finished { reason: Finish::Length, outputs: 3, stop: None }, [2, 2, 3, -1]),
            (What::Finished { reason: Finish::Abort, outputs: 0, stop: None }, [2, 3, 0, -1]),
            (What::Preempted { loss: Loss::Memory }, [3, 0, 0, 0]),
            (What::Preempted { loss: Loss::Rollback }, [3, 1, 0, 0]),
            (What::Preempted { loss: Loss::Priority }, [3, 2, 0, 0]),
            (What::Resumed { at: 8, history: 12, replayed: 6 }, [4, 8, 12, 6]),
            (What::Prefill { done: 4, total: 30 }, [5, 4, 30, 0]),
        ];
        for (what, [kind, a, b, c]) in whats {
            let event = Event { request: RequestId(7), step: Step(11), what };
            assert_eq!(event.to_row(), [kind, 7, 11, a, b, c], "{what:?}");
        }
    }

    #[test]
    fn what_does_not_fit_as_a_whole_row_stays() {
        let mut events = Events::default();
        for done in 1..=3 {
            events.push(RequestId(1), Step(1), What::Prefill { done, total: 3 });
        }
        let mut out = [-7; 2 * EVENT_WIDTH + 5];
        assert_eq!((events.drain_into(&mut out), events.len()), (2, 1));
        assert_eq!((out[3], out[EVENT_WIDTH + 3]), (1, 2));
        assert!(out[2 * EVENT_WIDTH..].iter().all(|&x| x == -7));
        assert_eq!(events.drain_into(&mut out[..EVENT_WIDTH - 1]), 0);
        assert_eq!((events.drain_into(&mut out), out[3], events.is_empty()), (1, 3, true));
    }
}

//! What may still be in use is given back when its use is over.
//!
//! Memory is used by *steps*, which end in the order in which they were planned, and by *copies*, which have a ticket each and
//! may end in any order. Today every copy runs on the device between two forwards and ends with its step; one to or from
//! another memory ends when it ends.

use crate::ids::{Step, Ticket};

/// When something is no longer in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Until {
    /// This step and all before it are over.
    Step(Step),
    /// This copy has ended.
    Copy(Ticket),
}

impl Until {
    /// It is not in use.
    pub const NOW: Until = Until::Step(Step(0));
}

impl From<Step> for Until {
    fn from(step: Step) -> Self {
        Until::Step(step)
    }
}

impl From<Ticket> for Until {
    fn from(ticket: Ticket) -> Self {
        Until::Copy(ticket)
    }
}

/// Copies that have not ended.
#[derive(Debug, Default)]
pub struct Tickets {
    last: u64,
    /// Ascending.
    open: Vec<Ticket>,
}

impl Tickets {
    /// A new copy, which is put into `list` as well.
    pub fn open(&mut self, list: &mut Vec<Ticket>) -> Ticket {
        self.last += 1;
        let ticket = Ticket(self.last);
        self.open.push(ticket);
        list.push(ticket);
        ticket
    }

    /// Whether a copy has not ended.
    pub fn is_open(&self, ticket: Ticket) -> bool {
        self.open.binary_search(&ticket).is_ok()
    }

    /// These copies, in ascending order, have ended.
    pub fn end(&mut self, ended: &[Ticket]) {
        if !ended.is_empty() {
            self.open.retain(|ticket| ended.binary_search(ticket).is_err());
        }
    }

    /// Copies that have not ended.
    pub fn open_count(&self) -> usize {
        self.open.len()
    }
}

/// Things that wait until they are no longer in use.
#[derive(Debug)]
pub struct Fence<T> {
    done: Step,
    waiting: Vec<(Until, T)>,
}

impl<T> Default for Fence<T> {
    fn default() -> Self {
        Fence { done: Step(0), waiting: Vec::new() }
    }
}

impl<T> Fence<T> {
    /// Keeps `what` back. Returns it when the step is over already. A copy must not have ended.
    #[must_use]
    pub fn put(&mut self, what: T, until: Until) -> Option<T> {
        if matches!(until, Until::Step(at) if at <= self.done) {
            return Some(what);
        }
        self.waiting.push((until, what));
        None
    }

    /// All steps up to `done` are over, and these copies (in ascending order) have ended. Returns what waited for them, in the
    /// order in which it came.
    pub fn retire(&mut self, done: Step, ended: &[Ticket]) -> Vec<T> {
        self.done = self.done.max(done);
        if self.waiting.is_empty() {
            return Vec::new();
        }
        let done = self.done;
        let over = |until: Until| match until {
            Until::Step(at) => at <= done,
            Until::Copy(ticket) => ended.binary_search(&ticket).is_ok(),
        };
        self.waiting.extract_if(.., |(until, _)| over(*until)).map(|(_, what)| what).collect()
    }

    /// What waits.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.waiting.iter().map(|(_, what)| what)
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_end_in_order_and_copies_in_any() {
        let (mut tickets, mut list) = (Tickets::default(), Vec::new());
        let [a, b, c] = [(); 3].map(|()| tickets.open(&mut list));
        assert_eq!(list, [a, b, c]);
        let mut fence = Fence::default();
        for (what, until) in [("a", a.into()), ("2", Step(2).into()), ("b", b.into()), ("1", Step(1).into())]
        {
            assert_eq!(fence.put(what, until), None);
        }
        tickets.end(&[b]);
        assert_eq!([a, b, c].map(|t| tickets.is_open(t)), [true, false, true]);
        assert_eq!(fence.retire(Step(0), &[b]), ["b"]);
        assert_eq!(fence.retire(Step(1), &[]), ["1"]);
        assert_eq!((fence.put("now", Until::NOW), fence.put("1", Step(1).into())), (Some("now"), Some("1")));
        assert_eq!(fence.iter().collect::<Vec<_>>(), [&"a", &"2"]);
        tickets.end(&[a, c]);
        assert_eq!(fence.retire(Step(9), &[a, c]), ["a", "2"]);
        assert!(fence.is_empty() && tickets.open_count() == 0);
        assert_eq!(fence.put("8", Step(8).into()), Some("8"));
    }
}

//! Where saved states are worth taking.
//!
//! ```text
//!   turns    |····|····|····|··        p = last boundary inside the prompt (and its end, where that is a boundary);
//!                           p n        in decode the newest boundary is kept aside and stored when the request ends
//!   forks    turns, and where this prompt left the known history: others may leave it there too
//!   auto     forks, one block apart at least; and while memory is short only what is worth more than what would go
//!   every:N  every N tokens
//! ```

use std::mem::discriminant;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::cache::Match;
use crate::error::CoreError;

/// The value of `snapshots`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum SnapshotPolicy {
    /// Never; resume by replay.
    None,
    /// Every so many tokens, rounded up to whole blocks.
    Every(u32),
    /// End of prompt and end of output.
    Turns,
    /// Turns, and where a prompt diverged from known history.
    Forks,
    /// Forks, where a hit was lost for want of one, and spacing; admitted by expected use under a budget.
    Auto,
}

impl SnapshotPolicy {
    /// Each kind by its name, in the order of messages; N is a number of tokens.
    const TABLE: [(&'static str, SnapshotPolicy); 5] = [
        ("auto", SnapshotPolicy::Auto),
        ("forks", SnapshotPolicy::Forks),
        ("turns", SnapshotPolicy::Turns),
        ("every:N", SnapshotPolicy::Every(1)),
        ("none", SnapshotPolicy::None),
    ];

    /// The name of each kind, in the order of messages; N is a number of tokens.
    pub fn names() -> [&'static str; 5] {
        Self::TABLE.map(|(name, _)| name)
    }
}

impl TryFrom<String> for SnapshotPolicy {
    type Error = CoreError;

    fn try_from(text: String) -> Result<Self, CoreError> {
        text.parse()
    }
}

impl From<SnapshotPolicy> for String {
    fn from(policy: SnapshotPolicy) -> String {
        let kind = discriminant(&policy);
        let name = SnapshotPolicy::TABLE
            .iter()
            .find(|(_, other)| discriminant(other) == kind)
            .map_or("", |(name, _)| name);
        match policy {
            SnapshotPolicy::Every(n) => name.replace('N', &n.to_string()),
            _ => name.to_owned(),
        }
    }
}

impl FromStr for SnapshotPolicy {
    type Err = CoreError;

    fn from_str(text: &str) -> Result<Self, CoreError> {
        let found = Self::TABLE.into_iter().find_map(|(name, policy)| match name.strip_suffix('N') {
            Some(front) => {
                text.strip_prefix(front)?.parse().ok().filter(|&n| n > 0).map(SnapshotPolicy::Every)
            }
            None => (name == text).then_some(policy),
        });
        found.ok_or_else(|| {
            let valid = format!("valid values are {}", Self::names().join(", "));
            CoreError::config("snapshots", format!("{text:?}"), valid)
        })
    }
}

/// What to do with the state at a boundary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// Not worth saving.
    No,
    /// Into the tree.
    Publish,
    /// Aside, in place of the one before; the last one goes into the tree.
    Spare,
}

/// The due boundaries of one stay of a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Due {
    block: u32,
    prompt: u32,
    every: u32,
    /// Boundaries in prefill, ascending; 0 = none.
    marks: [u32; 4],
    decode: bool,
}

impl SnapshotPolicy {
    /// Boundaries for a prompt of `prompt` tokens of which, with what was generated before, `known` are to be computed;
    /// `found` was known of them: no state is saved again where there is one.
    pub fn due(self, block: u32, prompt: u32, known: u32, found: &Match) -> Due {
        let inner = |n: u32| (n - 1) / block * block;
        let whole = if prompt.is_multiple_of(block) { prompt } else { 0 };
        let mut marks = match self {
            SnapshotPolicy::None | SnapshotPolicy::Every(_) => [0; 4],
            SnapshotPolicy::Turns => [inner(prompt), whole, inner(known), 0],
            SnapshotPolicy::Forks => [inner(prompt), whole, inner(known), found.history],
            // A state one block beyond another saves next to nothing.
            SnapshotPolicy::Auto => [inner(prompt), 0, inner(known), found.history],
        };
        let saved = |pos: u32| found.snapshots.iter().any(|s| s.0 == pos);
        marks.iter_mut().filter(|m| saved(**m)).for_each(|m| *m = 0);
        marks.sort_unstable();
        let every = if let SnapshotPolicy::Every(n) = self { n.div_ceil(block) * block } else { 0 };
        let decode = !matches!(self, SnapshotPolicy::None | SnapshotPolicy::Every(_));
        Due { block, prompt, every, marks, decode }
    }
}

impl Due {
    /// The first due boundary of prefill after `pos`.
    pub fn next(&self, pos: u32) -> Option<u32> {
        match pos.checked_div(self.every) {
            Some(passed) => (passed + 1).checked_mul(self.every),
            None => self.marks.into_iter().find(|&m| m > pos),
        }
    }

    /// What to do with the state at `pos`, reached in decode or at the end of a prefill chunk.
    pub fn keep(&self, pos: u32, decode: bool) -> Keep {
        if !pos.is_multiple_of(self.block) {
            Keep::No
        } else if self.every > 0 {
            if pos.is_multiple_of(self.every) { Keep::Publish } else { Keep::No }
        } else if decode || pos > self.prompt {
            if self.decode { Keep::Spare } else { Keep::No }
        } else if pos > 0 && self.marks.contains(&pos) {
            Keep::Publish
        } else {
            Keep::No
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::Lost;

    fn found(history: u32) -> Match {
        Match { history, ..Match::nothing(Lost::NeverStored) }
    }

    fn stops(policy: &str, prompt: u32, known: u32, matched: u32) -> Vec<u32> {
        let due = policy.parse::<SnapshotPolicy>().unwrap().due(4, prompt, known, &found(matched));
        std::iter::successors(due.next(0), |&p| due.next(p)).take_while(|&p| p <= known).collect()
    }

    #[test]
    fn boundaries_by_policy() {
        assert!(stops("none", 18, 18, 8).is_empty());
        assert_eq!(stops("every:6", 18, 18, 0), [8, 16]);
        assert_eq!(stops("turns", 18, 18, 8), [16]);
        assert_eq!(stops("turns", 16, 16, 8), [12, 16]);
        assert_eq!(stops("forks", 18, 18, 8), [8, 16]);
        assert_eq!(stops("auto", 16, 16, 8), [8, 12]);
        assert_eq!(stops("turns", 18, 27, 0), [16, 24]);
        assert!(stops("turns", 4 - 1, 3, 0).is_empty());
    }

    #[test]
    fn states_in_the_output_are_kept_aside() {
        let due = SnapshotPolicy::Turns.due(4, 18, 18, &found(0));
        assert_eq!((due.keep(16, false), due.keep(12, false)), (Keep::Publish, Keep::No));
        assert_eq!((due.keep(20, true), due.keep(21, true)), (Keep::Spare, Keep::No));
        assert_eq!(SnapshotPolicy::Every(8).due(4, 18, 18, &found(0)).keep(24, true), Keep::Publish);
        assert_eq!(SnapshotPolicy::None.due(4, 18, 18, &found(0)).keep(20, true), Keep::No);
    }

    #[test]
    fn every_name_reads_as_it_is_written() {
        for name in SnapshotPolicy::names().map(|name| name.replace('N', "7")) {
            assert_eq!(String::from(name.parse::<SnapshotPolicy>().unwrap()), name);
        }
    }

    #[test]
    fn an_unknown_policy_is_refused_with_the_known_ones() {
        let e = "every:0".parse::<SnapshotPolicy>().unwrap_err();
        assert_eq!(
            e.to_string(),
            "snapshots is \"every:0\"; valid values are auto, forks, turns, every:N, none"
        );
    }
}

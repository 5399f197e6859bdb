//! Which state of a turn the next prompt goes on from: the prompt's end or the output's end.
//!
//! ```text
//!   ── history ──┤prompt's end├── output ──┤output's end├──   next prompt repeats the output:   goes on from the second
//!                              └── … rewritten              drops or renders it anew:          goes on from the first
//! ```
//!
//! Clients differ, and each keeps to its way. So every turn that has ended leaves a mark at both places, and where a later
//! prompt leaves the known path tells which way its client went. It is counted along the conversation, by tenant and over
//! all; the conversation's own counts weigh most. Marks need no saved state: what was declined or evicted is learned from as well.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{KvCache, Sequence};

/// Where a turn's two states are.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum End {
    /// The last boundary inside the prompt.
    Prompt,
    /// The last boundary that prompt and output reach.
    Output,
}

/// How often each end was gone on from.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Habit {
    prompt: u16,
    output: u16,
}

/// Turns after which a conversation's counts halve.
const OF_ONE: u16 = 16;

/// … and those of a tenant, and over all.
const OF_MANY: u16 = 1024;

/// Turns that what is known of all weighs for a tenant.
const TENANT_PRIOR: f64 = 4.0;

/// Turns that what is known of a tenant weighs for a conversation.
const OWN_PRIOR: f64 = 1.0;

impl Habit {
    fn count(&mut self, end: End, most: u16) {
        match end {
            End::Prompt => self.prompt += 1,
            End::Output => self.output += 1,
        }
        if self.prompt + self.output > most {
            (self.prompt, self.output) = (self.prompt / 2, self.output / 2);
        }
    }

    /// The share of prompts' ends, where `prior` weighs as much as `weight` turns.
    fn share(self, prior: f64, weight: f64) -> f64 {
        (f64::from(self.prompt) + weight * prior) / (f64::from(self.prompt + self.output) + weight)
    }
}

/// What a turn has left at the end of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Turn {
    pub end: End,
    /// Of its conversation, this turn included when it is `seen`.
    pub habit: Habit,
    /// A later prompt has gone on from it.
    pub seen: bool,
    /// The node at the output's end, and when that was stored.
    pub output: (u32, u64),
}

/// What is known of all conversations.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Habits {
    all: Habit,
    tenants: BTreeMap<u32, Habit>,
}

impl Habits {
    fn count(&mut self, tenant: u32, end: End) {
        self.all.count(end, OF_MANY);
        self.tenants.entry(tenant).or_default().count(end, OF_MANY);
    }

    /// The likelihood that the next prompt goes on from the prompt's end, if it goes on.
    fn share(&self, tenant: u32, own: Habit) -> f64 {
        let all = self.all.share(0.5, 2.0);
        let tenant = self.tenants.get(&tenant).copied().unwrap_or_default();
        own.share(tenant.share(all, TENANT_PRIOR), OWN_PRIOR)
    }
}

impl KvCache {
    /// The likelihood that the prompt after this sequence goes on from the prompt's end and not from the output's.
    pub(super) fn drops_output(&self, seq: &Sequence) -> f64 {
        self.habits.share(seq.hint.tenant, seq.habit)
    }

    /// The deepest mark of a turn on the path to `node`, of those that end within `blocks`.
    pub(super) fn last_turn(&self, node: u32, blocks: u32) -> Option<(u32, Turn)> {
        let marked = |id: u32| self.tree.node(id).turn.map(|turn| (id, turn));
        self.tree.path(node).filter(|&id| self.tree.node(id).end() <= blocks).find_map(marked)
    }

    /// A prompt leaves the known path at `blocks`, at or above the end of `node`: learns from where its conversation goes on.
    /// Returns the conversation's habit.
    pub(super) fn goes_on(&mut self, node: u32, blocks: u32, tenant: u32) -> Habit {
        let Some((id, mut turn)) = self.last_turn(node, blocks) else { return Habit::default() };
        if !turn.seen {
            turn.seen = true;
            turn.habit.count(turn.end, OF_ONE);
            self.habits.count(tenant, turn.end);
            self.tree.node_mut(id).turn = Some(turn);
            let (output, born) = turn.output;
            if self.options.admit_by_value
                && turn.end == End::Prompt
                && self.habits.share(tenant, turn.habit) > 0.5
                && self.is_node(output, born)
                && self.tree.node(output).is_free_leaf()
            {
                self.end_blocks(output);
            }
        }
        turn.habit
    }

    /// A request has ended as it should: marks the ends of its prompt and of its output, if there is a block between them.
    pub fn end_turn(&mut self, seq: &Sequence) {
        if seq.asked == 0 || seq.asked >= seq.published {
            return;
        }
        let prompt = self.tree.split(self.tree.node_at(seq.cursor, seq.asked), seq.asked);
        let output = (seq.cursor, self.tree.node(seq.cursor).facts.born);
        for (node, end) in [(prompt, End::Prompt), (seq.cursor, End::Output)] {
            let mark = &mut self.tree.node_mut(node).turn;
            // Of prompts that come more than once the first tells.
            if mark.is_none() {
                *mark = Some(Turn { end, habit: seq.habit, seen: false, output });
            }
        }
    }

    /// Whether a node has only one way on that may be taken again: an output that was rewritten does not count.
    pub(super) fn goes_one_way(&self, id: u32) -> bool {
        let n = self.tree.node(id);
        let left = self.options.admit_by_value && n.turn.is_some_and(|t| t.end == End::Prompt && t.seen);
        n.children <= 1 + u32::from(left)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_conversation_does_weighs_more_than_its_tenant_and_that_more_than_all() {
        let mut habits = Habits::default();
        assert_eq!(habits.share(1, Habit::default()), 0.5);
        (0..100).for_each(|_| habits.count(1, End::Output));
        assert!(habits.share(1, Habit::default()) < 0.01 && habits.share(2, Habit::default()) < 0.01);
        (0..20).for_each(|_| habits.count(2, End::Prompt));
        assert!(habits.share(2, Habit::default()) > 0.8 && habits.share(1, Habit::default()) < 0.05);
        let mut own = Habit::default();
        own.count(End::Prompt, OF_ONE);
        assert!(habits.share(1, own) > 0.5);
    }

    #[test]
    fn a_client_that_changes_its_way_is_followed() {
        let mut habit = Habit::default();
        (0..1000).for_each(|_| habit.count(End::Output, OF_ONE));
        assert!(habit.share(0.5, OWN_PRIOR) < 0.1);
        (0..2 * OF_ONE).for_each(|_| habit.count(End::Prompt, OF_ONE));
        assert!(habit.share(0.5, OWN_PRIOR) > 0.8);
    }
}

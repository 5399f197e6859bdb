//! What a router of a fleet knows of a cache: only what the cache told of its changes.

#![allow(clippy::unwrap_used, reason = "a block that is unknown fails the test")]

use std::collections::{BTreeSet, HashMap};

use dsv4_core::cache::Change;

struct Block {
    salt: u8,
    /// The prefix that it ends.
    tokens: Vec<u32>,
    followers: usize,
}

/// Blocks by name.
#[derive(Default)]
pub struct Mirror(HashMap<u64, Block>);

impl Mirror {
    /// Follows changes; each must fit to what is known.
    pub fn follow(&mut self, changes: Vec<Change>, block: usize) {
        for change in changes {
            match change {
                Change::Stored { parent, blocks, tokens, salt, .. } => {
                    assert_eq!(tokens.len(), blocks.len() * block);
                    let mut last = parent;
                    for (name, tokens) in blocks.into_iter().zip(tokens.chunks_exact(block)) {
                        self.store(name, last, tokens, salt[0]);
                        last = Some(name);
                    }
                }
                Change::Removed { blocks } => blocks.into_iter().for_each(|name| self.remove(name)),
            }
        }
    }

    fn store(&mut self, name: u64, parent: Option<u64>, tokens: &[u32], salt: u8) {
        let mut prefix = parent.map_or_else(Vec::new, |p| {
            let parent = self.0.get_mut(&p).expect("the block before is known");
            assert_eq!(parent.salt, salt);
            parent.followers += 1;
            parent.tokens.clone()
        });
        prefix.extend(tokens);
        let before = self.0.insert(name, Block { salt, tokens: prefix, followers: 0 });
        assert!(before.is_none(), "a block is stored once");
    }

    fn remove(&mut self, name: u64) {
        let gone = self.0.remove(&name).expect("what goes is known");
        assert_eq!(gone.followers, 0, "the end of a prefix goes first");
        let before = |b: &&mut Block| {
            b.salt == gone.salt && gone.tokens.starts_with(&b.tokens) && b.tokens.len() < gone.tokens.len()
        };
        if let Some(parent) = self.0.values_mut().filter(before).max_by_key(|b| b.tokens.len()) {
            parent.followers -= 1;
        }
    }

    /// All prefixes that end with a block.
    pub fn prefixes(&self) -> BTreeSet<(u8, Vec<u32>)> {
        self.0.values().map(|b| (b.salt, b.tokens.clone())).collect()
    }
}

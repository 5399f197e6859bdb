//! What enters and leaves the tree, for those who mirror it elsewhere: the routers of a fleet.
//!
//! A block is named by a chained hash: of its tokens and of the name of the block before it, the first from the salt and the
//! layout. The name says which prefix is meant and nothing else: inside the core prefixes are compared token by token.

use crate::cache::tree::hash_block;
use crate::ids::PageId;

/// A change of what is cached.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Blocks that follow each other are known now.
    Stored {
        /// The block before the first of them; `None` at the start of a prompt.
        parent: Option<u64>,
        /// Their names.
        blocks: Vec<u64>,
        /// Their tokens.
        tokens: Vec<u32>,
        /// Only requests of this salt find them.
        salt: Box<[u8]>,
        /// The session of the request that brought them.
        session: Option<u64>,
    },
    /// Blocks that were evicted, the last of a prefix first.
    Removed {
        /// Their names.
        blocks: Vec<u64>,
    },
}

/// The names of the blocks in the tree, by page, and the changes that nobody has taken yet.
#[derive(Debug)]
pub(crate) struct Changes {
    block: usize,
    names: Vec<u64>,
    list: Vec<Change>,
}

impl Changes {
    pub fn new(block_tokens: u32, pages: u32) -> Self {
        Changes { block: block_tokens as usize, names: vec![0; pages as usize], list: Vec::new() }
    }

    pub fn name(&self, page: PageId) -> u64 {
        self.names[page.0 as usize]
    }

    /// Names the blocks in `pages`, which follow the one in `before`, or start a prompt whose salt has this seed.
    pub fn name_blocks(&mut self, seed: u64, before: Option<PageId>, pages: &[PageId], tokens: &[u32]) {
        let mut last = before.map_or(seed, |page| self.name(page));
        for (page, block) in pages.iter().zip(tokens.chunks_exact(self.block)) {
            last = hash_block(last, block);
            self.names[page.0 as usize] = last;
        }
    }

    pub fn stored(
        &self,
        before: Option<PageId>,
        pages: &[PageId],
        tokens: Vec<u32>,
        salt: &[u8],
        session: Option<u64>,
    ) -> Change {
        let blocks = pages.iter().map(|&p| self.name(p)).collect();
        Change::Stored { parent: before.map(|p| self.name(p)), blocks, tokens, salt: salt.into(), session }
    }

    pub fn note(&mut self, change: Change) {
        self.list.push(change);
    }

    pub fn removed(&mut self, pages: &[PageId]) {
        let blocks = pages.iter().map(|&p| self.name(p)).collect();
        self.list.push(Change::Removed { blocks });
    }

    pub fn take(&mut self) -> Vec<Change> {
        std::mem::take(&mut self.list)
    }
}

//! The tokens of a request.
//!
//! The newest few lie in the request itself. A long prompt ends in a page of memory that nothing else uses; to touch it for
//! every token of every running request costs more than the rest of a step (`cargo bench --bench plan`).

/// Tokens that lie in the request before they go where the others are.
const NEWEST: usize = 16;

/// A list of tokens that grows at its end.
#[derive(Debug, Default)]
pub struct Tokens {
    settled: Vec<u32>,
    newest: [u32; NEWEST],
    /// How many of `newest` are there.
    few: u32,
    /// All.
    len: u32,
}

impl Tokens {
    /// How many.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Adds one.
    pub fn push(&mut self, token: u32) {
        if self.few as usize == NEWEST {
            self.settle();
        }
        self.newest[self.few as usize] = token;
        self.few += 1;
        self.len += 1;
    }

    /// The token at a position.
    pub fn get(&self, pos: u32) -> Option<u32> {
        let settled = self.len - self.few;
        if pos < settled {
            self.settled.get(pos as usize).copied()
        } else {
            self.newest[..self.few as usize].get((pos - settled) as usize).copied()
        }
    }

    /// All of them in one piece.
    pub fn all(&mut self) -> &[u32] {
        self.settle();
        &self.settled
    }

    /// A copy.
    pub fn to_vec(&self) -> Vec<u32> {
        [&self.settled[..], &self.newest[..self.few as usize]].concat()
    }

    fn settle(&mut self) {
        self.settled.extend_from_slice(&self.newest[..self.few as usize]);
        self.few = 0;
    }
}

/// Memory of prompts that have ended, for those that come: memory that the system gives anew is faulted in page by page, which takes several
/// times as long as to copy a long prompt into it.
#[derive(Debug, Default)]
pub struct Spare(Vec<Vec<u32>>);

impl Spare {
    /// How many it keeps.
    const MOST: usize = 4;
    /// Below so many tokens the allocator keeps what is freed.
    const LEAST: usize = 1 << 15;

    /// Empty, with room for so many tokens: the smallest that fits, else new and with room for what may come behind them.
    pub fn take(&mut self, tokens: usize) -> Vec<u32> {
        let fits = self.0.iter().position(|v| v.capacity() >= tokens).filter(|_| tokens >= Self::LEAST);
        fits.map_or_else(|| Vec::with_capacity(tokens + tokens / 8), |at| self.0.remove(at))
    }

    /// Keeps memory that is no longer in use, the largest pieces.
    pub fn keep(&mut self, tokens: Tokens) {
        let mut memory = tokens.settled;
        if memory.capacity() < Self::LEAST {
            return;
        }
        memory.clear();
        let at = self.0.partition_point(|v| v.capacity() < memory.capacity());
        self.0.insert(at, memory);
        if self.0.len() > Self::MOST {
            self.0.remove(0);
        }
    }
}

impl From<Vec<u32>> for Tokens {
    fn from(settled: Vec<u32>) -> Self {
        Tokens { len: settled.len() as u32, settled, ..Tokens::default() }
    }
}

impl Extend<u32> for Tokens {
    fn extend<I: IntoIterator<Item = u32>>(&mut self, tokens: I) {
        tokens.into_iter().for_each(|token| self.push(token));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_prompt_gets_the_smallest_memory_of_earlier_ones_that_fits() {
        let (mut spare, long) = (Spare::default(), Spare::LEAST);
        let sizes = [5, 1, 4, 2, 3, 6].map(|n| n * long);
        sizes.into_iter().for_each(|size| spare.keep(vec![7; size].into()));
        spare.keep(vec![7; long - 1].into());
        assert_eq!(spare.0.iter().map(Vec::capacity).collect::<Vec<_>>(), [3, 4, 5, 6].map(|n| n * long));
        let mut take = |tokens| (spare.take(tokens), spare.0.len());
        assert_eq!((take(long - 1).1, take(7 * long).1), (4, 4), "the allocator has it, or nobody");
        for (tokens, size, left) in [(4 * long, 4, 3), (4 * long, 5, 2), (long, 3, 1), (6 * long, 6, 0)] {
            let (memory, kept) = take(tokens);
            assert_eq!((memory.len(), memory.capacity(), kept), (0, size * long, left));
        }
        assert_eq!(take(8 * long).0.capacity(), 9 * long);
    }

    #[test]
    fn every_token_is_where_it_was_put_whenever_they_are_brought_together() {
        for (prompt, every) in [(0, 1), (1, 3), (5, 16), (20, 17), (3, 1000)] {
            let mut plain: Vec<u32> = (0..prompt).collect();
            let mut tokens = Tokens::from(plain.clone());
            for token in 100..200 {
                plain.push(token);
                tokens.push(token);
                if token % every == 0 {
                    assert_eq!(tokens.all(), plain);
                }
                assert_eq!((tokens.len() as usize, tokens.to_vec()), (plain.len(), plain.clone()));
                for pos in 0..=plain.len() {
                    assert_eq!(tokens.get(pos as u32), plain.get(pos).copied());
                }
            }
        }
    }
}

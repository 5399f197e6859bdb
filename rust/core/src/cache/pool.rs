//! The page pool: reference counts and a free list. It knows nothing of what a page holds or of steps.

use crate::error::Malformed;
use crate::ids::PageId;

/// Pages by reference count; a count of zero means free.
#[derive(Debug)]
pub struct PagePool {
    refs: Vec<u32>,
    free: Vec<PageId>,
}

impl PagePool {
    /// All pages free; page 0 is handed out first.
    pub fn new(pages: u32) -> Self {
        PagePool { refs: vec![0; pages as usize], free: (0..pages).rev().map(PageId).collect() }
    }

    /// Pages in all.
    pub fn len(&self) -> u32 {
        self.refs.len() as u32
    }

    /// Whether the pool has no pages at all.
    pub fn is_empty(&self) -> bool {
        self.refs.is_empty()
    }

    /// Bytes of bookkeeping.
    pub fn bytes(&self) -> usize {
        (self.refs.capacity() + self.free.capacity()) * 4
    }

    /// Pages that can be allocated now.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Takes `n` pages with one reference each and appends them to `out`: all or none.
    #[must_use]
    pub fn alloc(&mut self, n: u32, out: &mut Vec<PageId>) -> bool {
        let Some(rest) = self.free.len().checked_sub(n as usize) else {
            return false;
        };
        let first = out.len();
        out.extend(self.free.drain(rest..).rev());
        out[first..].iter().for_each(|page| self.refs[page.0 as usize] = 1);
        true
    }

    /// One more holder.
    pub fn retain(&mut self, page: PageId) {
        let count = &mut self.refs[page.0 as usize];
        debug_assert!(*count > 0, "page {page:?} is free and cannot be shared");
        *count += 1;
    }

    /// One holder less; the last one frees the page.
    pub fn release(&mut self, page: PageId) {
        let count = &mut self.refs[page.0 as usize];
        assert!(*count > 0, "page {page:?} is already free");
        *count -= 1;
        if *count == 0 {
            self.free.push(page);
        }
    }

    /// Holders of a page.
    pub fn refs(&self, page: PageId) -> u32 {
        self.refs[page.0 as usize]
    }

    /// Compares the counts with `held`, every reference that exists (a page once per holder).
    pub fn check(&self, held: impl Iterator<Item = PageId>) -> Result<(), Malformed> {
        let mut expected = vec![0u32; self.refs.len()];
        for page in held {
            expected[page.0 as usize] += 1;
        }
        for (i, (&is, &should)) in self.refs.iter().zip(&expected).enumerate() {
            Malformed::unless(is == should, "page reference count", || {
                format!("page {i}: {is}, holders {should}")
            })?;
        }
        let mut seen = vec![false; self.refs.len()];
        for &PageId(p) in &self.free {
            let twice = std::mem::replace(&mut seen[p as usize], true);
            Malformed::unless(!twice && self.refs[p as usize] == 0, "free list", || format!("page {p}"))?;
        }
        let zero = self.refs.iter().filter(|&&r| r == 0).count();
        Malformed::unless(zero == self.free.len(), "pages conserved", || {
            format!("{zero} without holders, {} in the free list", self.free.len())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allocation_is_all_or_none_and_counts_hold() {
        let mut pool = PagePool::new(4);
        let mut held = Vec::new();
        assert!(pool.alloc(3, &mut held) && !pool.alloc(2, &mut held));
        assert_eq!((held.len(), pool.free()), (3, 1));
        pool.retain(held[0]);
        pool.release(held[0]);
        pool.check(held.iter().copied()).unwrap();
        held.drain(..).for_each(|p| pool.release(p));
        pool.check(std::iter::empty()).unwrap();
        assert_eq!(pool.free(), 4);
    }

    #[test]
    fn a_wrong_count_is_found() {
        let mut pool = PagePool::new(2);
        let mut held = Vec::new();
        assert!(pool.alloc(1, &mut held));
        assert_eq!(pool.check(std::iter::empty()).unwrap_err().what, "page reference count");
    }
    #[test]
    fn a_page_that_is_free_twice_and_one_that_is_lost_are_found() {
        let mut pool = PagePool::new(3);
        pool.free.push(PageId(1));
        let e = pool.check(std::iter::empty()).unwrap_err();
        assert_eq!((e.what, e.detail.as_str()), ("free list", "page 1"));
        let mut pool = PagePool::new(3);
        pool.free.pop();
        let e = pool.check(std::iter::empty()).unwrap_err();
        assert_eq!((e.what, e.detail.as_str()), ("pages conserved", "3 without holders, 2 in the free list"));
    }
}

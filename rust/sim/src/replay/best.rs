//! What could have been hit at best: with unlimited memory, and by the best possible use of a pool.
//!
//! Both look at blocks of the cache's size in the order in which requests were admitted. A block of a prompt *could* hit
//! when an earlier request held it; its page must then have been kept from the last such request to this one. That is an
//! interval, and a pool of `C` pages can keep at most `C` intervals at any time. The most intervals that can be kept are
//! found by dropping, whenever there are more than `C`, the one that ends last (Belady's MIN; for intervals of equal
//! worth it is optimal).
//!
//! So it is an upper bound for every policy with this pool: it knows the future, needs no page for saved states, running
//! outputs or the request at hand, and takes a block for stored as soon as its request is admitted. It is no bound on what
//! another order of requests could hit.

use std::collections::{BTreeMap, HashMap};

use crate::replay::trace::Trace;
use crate::rng::scramble;

/// Blocks of every request by a number that is equal where the whole prefix up to the block's end is.
#[derive(Debug, Clone)]
pub struct Blocks {
    ids: Vec<u32>,
    /// Per request: first block, first block that cannot be hit, end. Blocks of a known output follow those of the prompt.
    spans: Vec<(usize, usize, usize)>,
    count: u32,
}

/// Hits in tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Best {
    /// With memory for everything.
    pub unlimited: u64,
    /// With the pool's pages.
    pub pool: u64,
}

impl Blocks {
    /// Blocks of `block` tokens of every request.
    pub fn new(trace: &Trace, block: u32) -> Self {
        let mut known: HashMap<u64, u32> = HashMap::new();
        let (mut ids, mut spans) = (Vec::new(), Vec::new());
        for r in trace.requests() {
            let start = ids.len();
            let (mut chain, mut at) = (0x5eed, 0);
            let prompt = if trace.prompts_known() { r.input } else { 0 };
            let end = if trace.output_known(r) { r.input + r.output } else { prompt };
            while at + block <= end {
                for (id, first, n) in trace.pieces(r, at, at + block) {
                    chain = scramble(chain ^ scramble(id ^ scramble(u64::from(first) << 32 | u64::from(n))));
                }
                let next = known.len() as u32;
                ids.push(*known.entry(chain).or_insert(next));
                at += block;
            }
            // The last token of a prompt is always computed.
            spans.push((start, start + (prompt.saturating_sub(1) / block) as usize, ids.len()));
        }
        Blocks { ids, spans, count: known.len() as u32 }
    }

    /// Different blocks in all.
    pub fn distinct(&self) -> u32 {
        self.count
    }

    /// Hits, in blocks, of the requests in `order`, each with whether it counts (a request that is admitted again after
    /// a preemption holds its blocks again, and no hit is counted).
    pub fn best(&self, order: &[(u32, bool)], pages: u32) -> Best {
        const NEVER: u32 = u32::MAX;
        let mut next_use = vec![NEVER; self.count as usize];
        // For each block of each admission: the admission that hits it next.
        let mut uses: Vec<u32> =
            vec![NEVER; order.iter().map(|&(r, _)| self.span(r).2 - self.span(r).0).sum()];
        let mut at = uses.len();
        for (i, &(r, counts)) in order.iter().enumerate().rev() {
            let (start, hittable, end) = self.span(r);
            at -= end - start;
            for (k, &id) in self.ids[start..end].iter().enumerate() {
                uses[at + k] = next_use[id as usize];
                next_use[id as usize] = if counts && start + k < hittable { i as u32 } else { NEVER };
            }
        }
        let unlimited = uses.iter().filter(|&&u| u != NEVER).count() as u64;
        Best { unlimited, pool: self.keep_best(order, &uses, pages) }
    }

    fn span(&self, r: u32) -> (usize, usize, usize) {
        self.spans[r as usize]
    }

    /// Only the numbers of intervals by their end matter, not which blocks they are.
    fn keep_best(&self, order: &[(u32, bool)], uses: &[u32], pages: u32) -> u64 {
        let (mut kept, mut held, mut hits) = (BTreeMap::<u32, u64>::new(), 0u64, 0u64);
        let mut at = 0;
        for (i, &(r, _)) in order.iter().enumerate() {
            let over = kept.remove(&(i as u32)).unwrap_or(0);
            (hits, held) = (hits + over, held - over);
            let blocks = self.span(r).2 - self.span(r).0;
            for &next in uses[at..at + blocks].iter().filter(|&&u| u != u32::MAX) {
                *kept.entry(next).or_default() += 1;
                held += 1;
            }
            at += blocks;
            while held > u64::from(pages) {
                let mut last = kept.last_entry().expect("something is held");
                let gone = (held - u64::from(pages)).min(*last.get());
                *last.get_mut() -= gone;
                held -= gone;
                if *last.get() == 0 {
                    last.remove();
                }
            }
        }
        hits
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};
    use std::fmt::Write;

    use super::*;
    use crate::rng::Rng;

    /// Requests with prefixes of a few streams, two tokens a block, ids of two tokens.
    fn random_trace(rng: &mut Rng, requests: u32) -> Trace {
        let mut text = String::new();
        for t in 0..requests {
            let blocks = rng.range(1, 4);
            let ids: Vec<u64> = (0..blocks).map(|depth| u64::from(10 * depth + rng.below(2))).collect();
            let input = 2 * blocks - rng.below(2);
            writeln!(
                text,
                r#"{{"timestamp": {t}, "input_length": {input}, "output_length": 1, "hash_ids": {ids:?}}}"#
            )
            .unwrap();
        }
        let mut trace = Trace::new(2).unwrap();
        trace.read("random", text.as_bytes()).unwrap();
        trace
    }

    /// Every choice of what to keep, by the state of the cache: the plain meaning of "best possible". A block hits only
    /// with all blocks before it.
    fn brute_force(prompts: &[Vec<u32>], order: &[(u32, bool)], pages: usize) -> u64 {
        let prefixes = |p: &[u32]| (1..=p.len() / 2).map(|n| p[..2 * n].to_vec()).collect::<Vec<_>>();
        let mut states: HashMap<BTreeSet<Vec<u32>>, u64> = [(BTreeSet::new(), 0)].into();
        for &(r, counts) in order {
            let prompt = &prompts[r as usize];
            let mut next: HashMap<BTreeSet<Vec<u32>>, u64> = HashMap::new();
            for (cache, hits) in states {
                let usable = prefixes(&prompt[..prompt.len() - 1]);
                let found = usable.iter().take_while(|p| cache.contains(*p)).count() as u64;
                let all: Vec<Vec<u32>> = cache
                    .iter()
                    .cloned()
                    .chain(prefixes(prompt))
                    .collect::<BTreeSet<_>>()
                    .into_iter()
                    .collect();
                for choice in 0u32..1 << all.len() {
                    if choice.count_ones() as usize > pages {
                        continue;
                    }
                    let kept =
                        (0..all.len()).filter(|i| choice >> i & 1 == 1).map(|i| all[i].clone()).collect();
                    let best = next.entry(kept).or_default();
                    *best = (*best).max(hits + if counts { found } else { 0 });
                }
            }
            states = next;
        }
        states.into_values().max().unwrap()
    }

    #[test]
    fn min_is_the_best_of_all_choices() {
        let mut differ = 0;
        for seed in 0..40 {
            let mut rng = Rng::new(seed);
            let trace = random_trace(&mut rng, 6);
            let prompts: Vec<Vec<u32>> = trace.requests().iter().map(|r| trace.prompt(r)).collect();
            let order: Vec<(u32, bool)> = (0..6).map(|i| (i, rng.chance(85))).collect();
            let pages = rng.range(1, 3);
            let best = Blocks::new(&trace, 2).best(&order, pages);
            assert_eq!(
                best.pool,
                brute_force(&prompts, &order, pages as usize),
                "seed {seed}, {pages} pages"
            );
            assert_eq!(best.unlimited, Blocks::new(&trace, 2).best(&order, 1000).pool, "seed {seed}");
            differ += u32::from(best.pool < best.unlimited);
        }
        assert!(differ > 10, "memory was short in {differ} of 40 runs only");
    }

    #[test]
    fn known_outputs_can_be_hit_and_others_cannot() {
        let text = |output: &str| {
            format!(
                r#"{{"timestamp": 0, "input_length": 3, "output_length": 2, "hash_ids": [1, 2]{output}}}
                   {{"timestamp": 1, "input_length": 7, "output_length": 1, "hash_ids": [1, 2, 3, 4]}}"#
            )
        };
        for (output, hits) in [("", 1), (r#", "output_hash_ids": [2, 3]"#, 2)] {
            let mut trace = Trace::new(2).unwrap();
            trace.read("t", text(output).as_bytes()).unwrap();
            let best = Blocks::new(&trace, 2).best(&[(0, true), (1, true)], 10);
            assert_eq!(best, Best { unlimited: hits, pool: hits });
        }
    }
}

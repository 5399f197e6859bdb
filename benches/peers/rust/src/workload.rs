//! Tokens, and request traces in the format that `dsv4 simulate` reads.

use std::collections::{BinaryHeap, HashMap};
use std::io;

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Tokens of a block.
pub const BLOCK: usize = 256;
/// A million.
pub const MILLION: usize = 1 << 20;
/// Tokens that an id of a trace stands for.
const TRACE_BLOCK: usize = 512;
const VOCABULARY: u64 = 129_280;

/// `n` tokens; the same for the same seed.
pub fn tokens(seed: u64, n: usize) -> Vec<u32> {
    let mut out = Vec::with_capacity(n);
    fill(seed, n, &mut out);
    out
}

fn fill(seed: u64, n: usize, out: &mut Vec<u32>) {
    let mut x = (seed + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    for _ in 0..n {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        out.push(((x >> 20) % VOCABULARY) as u32);
    }
}

/// A request of a trace.
pub struct Request {
    /// When it came, in microseconds.
    pub at_us: u64,
    /// Its prompt.
    pub prompt: Vec<u32>,
}

/// Reads a trace; equal ids become equal tokens.
pub fn trace(path: &str) -> io::Result<Vec<Request>> {
    let bad = |line: usize, what: &str| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{path}:{line}: {what} is missing"))
    };
    let text = std::fs::read_to_string(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    lines
        .map(|(i, line)| {
            let record: Value = serde_json::from_str(line)?;
            let length = record["input_length"].as_u64().ok_or_else(|| bad(i + 1, "input_length"))? as usize;
            let ids = record["hash_ids"].as_array().ok_or_else(|| bad(i + 1, "hash_ids"))?;
            let mut prompt = Vec::with_capacity(ids.len() * TRACE_BLOCK);
            for id in ids {
                fill(
                    id.as_u64().ok_or_else(|| bad(i + 1, "a number in hash_ids"))?,
                    TRACE_BLOCK,
                    &mut prompt,
                );
            }
            prompt.truncate(length);
            let at_us = (record["timestamp"].as_f64().unwrap_or(0.0) * 1000.0) as u64;
            Ok(Request { at_us, prompt })
        })
        .collect()
}

/// Hits in blocks of a cache of `capacity` blocks that knows the future: after each request the blocks go whose next
/// use is furthest away. It trims only then, so it may briefly hold more, and is an upper bound.
pub fn clairvoyant(trace: &[Request], capacity: usize) -> usize {
    let names: Vec<Vec<u64>> = trace.iter().map(|r| chain(&r.prompt)).collect();
    let (mut last, mut next) = (HashMap::new(), vec![Vec::new(); names.len()]);
    for (i, blocks) in names.iter().enumerate().rev() {
        next[i] = blocks.iter().map(|b| last.get(b).copied().unwrap_or(usize::MAX)).collect();
        blocks.iter().for_each(|&b| _ = last.insert(b, i));
    }
    let (mut held, mut order, mut hits) = (HashMap::new(), BinaryHeap::new(), 0);
    for (blocks, next) in names.iter().zip(&next) {
        hits += blocks.iter().take_while(|b| held.contains_key(*b)).count();
        for (depth, (&b, &at)) in blocks.iter().zip(next).enumerate() {
            held.insert(b, at);
            order.push((at, depth, b));
        }
        while held.len() > capacity {
            let Some((at, _, b)) = order.pop() else { break };
            if held.get(&b) == Some(&at) {
                held.remove(&b);
            }
        }
    }
    hits
}

/// One hash per whole block, each over all tokens up to its end.
pub fn chain(prompt: &[u32]) -> Vec<u64> {
    let hashes = prompt.chunks_exact(BLOCK).scan(0, |hash, block| {
        *hash = xxh3_64_with_seed(bytes(block), *hash);
        Some(*hash)
    });
    hashes.collect()
}

/// The bytes of tokens, for hashes.
pub fn bytes(tokens: &[u32]) -> &[u8] {
    // SAFETY: u32 has no padding and u8 no alignment.
    unsafe { std::slice::from_raw_parts(tokens.as_ptr().cast(), size_of_val(tokens)) }
}

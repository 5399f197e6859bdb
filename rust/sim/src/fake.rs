//! A model with V4's data flow and hashes for activations.
//!
//! Per layer and token: a window row is written; compressors fold the token in and emit a history row when their entry
//! closes; attention reads the window and every visible history row; the output hashes all of it. So an output is right
//! only if every row that V4 would attend to is right.

use dsv4_core::layout::{Kind, LayoutSpec};

use crate::rng::scramble;

/// An open compressor entry without tokens.
pub const EMPTY: u64 = 0;

/// How a layer compresses.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Compress {
    /// Not at all.
    None,
    /// With overlap: an entry starts from the low half of the block before.
    Csa(u32),
    /// Without overlap.
    Hca(u32),
}

impl Compress {
    /// Tokens per history row, 0 without.
    pub fn ratio(self) -> u32 {
        match self {
            Compress::None => 0,
            Compress::Csa(r) | Compress::Hca(r) => r,
        }
    }
}

/// What the fake model needs of a layout.
#[derive(Clone, Debug)]
pub struct Geometry {
    /// Tokens of a page.
    pub block: u32,
    /// Window in tokens.
    pub window: u32,
    /// Tokens of a replay.
    pub replay_tokens: u32,
    /// Pages of a snapshot.
    pub snapshot_pages: u32,
    /// Pages of a whole slab.
    pub slab_pages: u32,
    /// Per layer.
    pub layers: Vec<Compress>,
    /// First history row of each layer in a page; the last element is the rows of a page.
    pub first_row: Vec<u32>,
}

impl Geometry {
    /// From a V4 layout. The index component goes in lockstep with `csa`, so it is left out.
    pub fn of(layout: &LayoutSpec, replay_tokens: u32) -> Self {
        let mut layers = vec![Compress::None; layout.layers as usize];
        for c in &layout.components {
            let Kind::Stride { ratio } = c.kind else { continue };
            let kind = match c.name.as_str() {
                "csa" => Compress::Csa(ratio),
                "hca" => Compress::Hca(ratio),
                _ => continue,
            };
            c.layers.iter().for_each(|&l| layers[l as usize] = kind);
        }
        let mut first_row = vec![0];
        for l in &layers {
            let rows = layout.block_tokens.checked_div(l.ratio()).unwrap_or(0);
            first_row.push(first_row[first_row.len() - 1] + rows);
        }
        let (block, window) = (layout.block_tokens, layout.window);
        Geometry {
            block,
            window,
            replay_tokens,
            snapshot_pages: layout.snapshot_pages(),
            slab_pages: layout.slab_pages(),
            layers,
            first_row,
        }
    }

    /// The first position of each layer that takes part in a replay up to `end`.
    pub fn floor(&self, end: u32, layer: usize) -> u32 {
        let start = i64::from(end) - i64::from(self.replay_tokens);
        if start <= 0 { 0 } else { start as u32 + (self.window - 1) * layer as u32 }
    }
}

/// Where rows live.
pub trait Memory {
    /// The window row of a position.
    fn window(&self, layer: usize, pos: u32) -> u64;
    /// Writes the window row of a position.
    fn set_window(&mut self, layer: usize, pos: u32, value: u64);
    /// A history row.
    fn history(&self, layer: usize, entry: u32) -> u64;
    /// Writes a history row.
    fn set_history(&mut self, layer: usize, entry: u32, value: u64);
    /// The layer's open entries.
    fn pools(&mut self, layer: usize) -> &mut [u64; 2];
}

/// Hash of two words.
pub fn mix(a: u64, b: u64) -> u64 {
    scramble(a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1
}

/// The input of the first layer; a salt is like an adapter, equal tokens give other values.
pub fn embed(token: u32, salt: &[u8]) -> u64 {
    salt.iter().fold(mix(0x5eed, u64::from(token)), |x, &b| mix(x, u64::from(b)))
}

/// Runs the token at `pos` with input `x`; `replay_end` 0 means that everything takes part and history is written.
/// Returns the output of the last layer, or `None` where a replay does not get that far.
pub fn forward(g: &Geometry, m: &mut impl Memory, mut x: u64, pos: u32, replay_end: u32) -> Option<u64> {
    for (layer, &kind) in g.layers.iter().enumerate() {
        let floor = if replay_end > 0 { g.floor(replay_end, layer) } else { 0 };
        if pos < floor {
            return None;
        }
        let tag = 16 * (layer as u64 + 1);
        m.set_window(layer, pos, mix(mix(tag, x), u64::from(pos)));
        let ratio = kind.ratio();
        if ratio > 0 {
            let pools = m.pools(layer);
            pools[0] = mix(pools[0], mix(tag + 1, x));
            if matches!(kind, Compress::Csa(_)) {
                pools[1] = mix(pools[1], mix(tag + 2, x));
            }
            if (pos + 1).is_multiple_of(ratio) {
                let row = mix(pools[0], u64::from(pos / ratio));
                (pools[0], pools[1]) = (pools[1], EMPTY);
                if pos >= replay_end {
                    m.set_history(layer, pos / ratio, row);
                }
            }
        }
        let mut out = mix(tag + 3, x);
        for p in floor.max((pos + 1).saturating_sub(g.window))..=pos {
            out = mix(out, m.window(layer, p));
        }
        for entry in 0..(pos + 1).checked_div(ratio).unwrap_or(0) {
            out = mix(out, m.history(layer, entry));
        }
        x = out;
    }
    Some(x)
}

/// The greedy token of an output.
pub fn sample(output: u64, vocabulary: u32) -> u32 {
    ((output >> 17) % u64::from(vocabulary)) as u32
}

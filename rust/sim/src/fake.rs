//! A model with V4's data flow and hashes for activations.
//!
//! Per layer and token: a window row is written; compressors fold the token in and emit a history row when their entry
//! closes; attention reads the window and every visible history row; the output hashes all of it. So an output is right
//! only if every row that V4 would attend to is right.

use dsv4_core::layout::{Kind, LayoutSpec};

use crate::rng::scramble;

/// An open compressor entry without tokens.
pub const EMPTY: u64 = 0;

/// The history of a layer.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Past {
    /// Tokens per history row, 0 without history.
    pub ratio: u32,
    /// Each row depends on the block before, too.
    pub overlap: bool,
    /// The layer whose rows it reads.
    pub of: usize,
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
    pub layers: Vec<Past>,
    /// First history row of each layer in a page; the last element is the rows of a page.
    pub first_row: Vec<u32>,
}

impl Geometry {
    /// From a layout of V4's components, whatever their ratios. The index goes in lockstep with the rows that it is of, so
    /// it is left out. Panics at any other component: what it would do is not modelled here.
    pub fn of(layout: &LayoutSpec, replay_tokens: u32) -> Self {
        let named = |name: &str| layout.components.iter().find(|c| c.name == name);
        let mut layers = vec![Past::default(); layout.layers.len()];
        for c in &layout.components {
            let main = |suffix: &str| c.name.strip_suffix(suffix).and_then(named);
            match c.kind {
                Kind::Window { tokens, slack: 0 } if tokens == layout.window => {}
                Kind::Stride { ratio } if main("_index").is_some_and(|of| of.kind == c.kind) => {
                    assert!(
                        named(&format!("{}_pool", c.name)).is_some(),
                        "{ratio} tokens of {} in no pool",
                        c.name
                    );
                }
                Kind::Stride { ratio } => {
                    let pool = named(&format!("{}_pool", c.name)).map(|pool| pool.kind);
                    let overlap = match pool {
                        Some(Kind::Pool { rows: 2, saved: 1 }) => true,
                        Some(Kind::Pool { rows: 1, saved: 0 }) => false,
                        _ => panic!("the fake model does not know component {} with pool {pool:?}", c.name),
                    };
                    for &l in &c.layers {
                        layers[usize::from(l)] = Past { ratio, overlap, of: l.into() };
                    }
                }
                Kind::Pool { .. } if main("_pool").is_some_and(|of| of.is_history()) => {}
                _ => panic!("the fake model does not know component {} of {:?}", c.name, c.kind),
            }
        }
        let mut first_row = vec![0];
        for l in &layers {
            let rows = layout.block_tokens.checked_div(l.ratio).unwrap_or(0);
            first_row.push(first_row[first_row.len() - 1] + rows);
        }
        for (l, layer) in layout.layers.iter().enumerate() {
            if let Some(of) = layer.history_of {
                layers[l] = layers[usize::from(of)];
            }
        }
        Geometry {
            block: layout.block_tokens,
            window: layout.window,
            replay_tokens,
            snapshot_pages: layout.snapshot_pages(),
            slab_pages: layout.slab_pages(),
            layers,
            first_row,
        }
    }

    /// The ratio of the history that a layer stores, 0 where it stores none.
    pub fn own_ratio(&self, layer: usize) -> u32 {
        let past = self.layers[layer];
        if past.of == layer { past.ratio } else { 0 }
    }

    /// The first position that takes part in a replay up to `end`.
    pub fn floor(&self, end: u32) -> u32 {
        end.saturating_sub(self.replay_tokens)
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

/// Runs the token at `pos` with input `x` and returns the output of the last layer; `replay_end` 0 means that everything
/// takes part and history is written. What a replay makes of its first tokens is wrong, by as many more in each layer as it
/// reaches back.
pub fn forward(g: &Geometry, m: &mut impl Memory, mut x: u64, pos: u32, replay_end: u32) -> u64 {
    let floor = if replay_end > 0 { g.floor(replay_end) } else { 0 };
    for (layer, &past) in g.layers.iter().enumerate() {
        let tag = 16 * (layer as u64 + 1);
        m.set_window(layer, pos, mix(mix(tag, x), u64::from(pos)));
        let ratio = g.own_ratio(layer);
        if ratio > 0 {
            let pools = m.pools(layer);
            pools[0] = mix(pools[0], mix(tag + 1, x));
            if past.overlap {
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
        for entry in 0..(pos + 1).checked_div(past.ratio).unwrap_or(0) {
            out = mix(out, m.history(past.of, entry));
        }
        x = out;
    }
    x
}

/// The greedy token of an output.
pub fn sample(output: u64, vocabulary: u32) -> u32 {
    ((output >> 17) % u64::from(vocabulary)) as u32
}

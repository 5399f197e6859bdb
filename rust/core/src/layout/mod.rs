//! Geometry as data: what of a token's past is stored, where, and in how many bytes.
//!
//! ```text
//!   page  (block_tokens tokens of every layer)          slab  (live state of one request)
//!   | csa l2 | csa l4 | … | csa_index l2 | … | hca l3 | … |    | window l0 | window l1 | … | csa_pool l2 | … | hca_pool l3 | … |
//!   ^ offset, one region per layer, layer_stride apart        ^ the same, for the other kinds
//! ```
//!
//! A [`LayoutSpec`] lists components. Every byte count, stride and offset follows from it and from nowhere else.

pub mod presets;

use serde::{Deserialize, Serialize};

use crate::error::CoreError;

/// Regions start at multiples of this, so that rows can be loaded 16 bytes at a time.
const REGION_ALIGN: u32 = 16;
/// Pages and slabs are padded to a multiple of this.
const PAGE_ALIGN: u32 = 256;

/// How a component persists.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Kind {
    /// One row per `ratio` tokens, in history pages, shared and immutable.
    Stride {
        /// Tokens per row.
        ratio: u32,
    },
    /// A ring of the last tokens in the slab; slot = position mod rows. A snapshot keeps `tokens` rows, oldest first.
    Window {
        /// Rows that attention may read.
        tokens: u32,
        /// Further rows, for tokens that may be taken back.
        slack: u32,
    },
    /// Open compressor entries in the slab; a snapshot keeps the first `saved` rows.
    Pool {
        /// Rows per layer.
        rows: u32,
        /// Rows that hold something at a block boundary.
        saved: u32,
    },
}

/// One component of the cache, in all layers that have it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Component {
    /// `csa`, `csa_index`, `hca`, `window`, `csa_pool`, `csa_index_pool`, `hca_pool` in V4.
    pub name: String,
    /// How it persists.
    pub kind: Kind,
    /// The layers that have it, ascending.
    pub layers: Vec<u16>,
    /// Bytes of one row.
    pub row_bytes: u32,
    /// Name of the row format; the codec is Python's or a kernel's.
    pub format: String,
}

impl Component {
    /// Rows of one layer: in a page for `Stride`, in a slab otherwise.
    pub fn rows(&self, block_tokens: u32) -> u32 {
        match self.kind {
            Kind::Stride { ratio } => block_tokens / ratio,
            Kind::Window { tokens, slack } => tokens + slack,
            Kind::Pool { rows, .. } => rows,
        }
    }

    /// Rows of one layer that a snapshot keeps.
    pub fn saved_rows(&self) -> u32 {
        match self.kind {
            Kind::Stride { .. } => 0,
            Kind::Window { tokens, .. } => tokens,
            Kind::Pool { saved, .. } => saved,
        }
    }

    /// Whether it lives in history pages.
    pub fn is_history(&self) -> bool {
        matches!(self.kind, Kind::Stride { .. })
    }
}

/// Where a component lies in a page or slab, and in a snapshot. Bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Placement {
    /// First layer's region, from the start of the page or slab.
    pub offset: u32,
    /// From one layer's region to the next.
    pub layer_stride: u32,
    /// First layer's saved rows, from the start of the snapshot.
    pub snapshot_offset: u32,
    /// From one layer's saved rows to the next.
    pub snapshot_layer_stride: u32,
}

/// The numbers of a V4 checkpoint that its cache depends on.
#[derive(Clone, Debug)]
pub struct V4Geometry {
    /// Per layer: 0 (window only), the CSA ratio or the HCA ratio; draft layers cut off.
    pub compress_ratios: Vec<u32>,
    /// Tokens per CSA row (4).
    pub csa_ratio: u32,
    /// Tokens per HCA row (128).
    pub hca_ratio: u32,
    /// Channels of a main row.
    pub head_dim: u32,
    /// Channels of an index row.
    pub index_head_dim: u32,
    /// Sliding window in tokens, the query included.
    pub window: u32,
    /// Bytes and format of window and compressed rows.
    pub row: (u32, String),
    /// Bytes and format of index rows.
    pub index_row: (u32, String),
    /// Tokens of a page.
    pub block_tokens: u32,
    /// Window rows beyond the window, for draft tokens.
    pub draft_slack: u32,
}

/// The cache of a model, as data.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LayoutSpec {
    /// Tokens of a page; a multiple of every ratio.
    pub block_tokens: u32,
    /// Sliding window in tokens, the query included.
    pub window: u32,
    /// Attention layers.
    pub layers: u32,
    /// Components in the order in which they lie in memory.
    pub components: Vec<Component>,
}

fn align(n: u32, to: u32) -> u32 {
    n.div_ceil(to) * to
}

impl LayoutSpec {
    /// The cache of a V4 checkpoint. Fails when a ratio is none of the two, or `block_tokens` is no multiple of both.
    pub fn v4(g: &V4Geometry) -> Result<Self, CoreError> {
        if let Some(bad) = g.compress_ratios.iter().find(|&&r| r != 0 && r != g.csa_ratio && r != g.hca_ratio)
        {
            let expected = format!("each entry is 0, {} (CSA) or {} (HCA)", g.csa_ratio, g.hca_ratio);
            return Err(CoreError::config("compress_ratios", bad, expected));
        }
        let with = |ratio: u32| -> Vec<u16> {
            (0u16..).zip(&g.compress_ratios).filter(|&(_, &r)| r == ratio).map(|(l, _)| l).collect()
        };
        let (csa, hca) = (with(g.csa_ratio), with(g.hca_ratio));
        let all = (0..g.compress_ratios.len() as u16).collect();
        let c = |name: &str, kind, layers: &Vec<u16>, (row_bytes, format): (u32, &str)| Component {
            name: name.to_owned(),
            kind,
            layers: layers.clone(),
            row_bytes,
            format: format.to_owned(),
        };
        let (row, index) = ((g.row.0, g.row.1.as_str()), (g.index_row.0, g.index_row.1.as_str()));
        let pool = |dim: u32| (2 * dim * 4, "float32"); // value and lse per channel
        let two = Kind::Pool { rows: 2, saved: 1 };
        let mut components = vec![
            c("csa", Kind::Stride { ratio: g.csa_ratio }, &csa, row),
            c("csa_index", Kind::Stride { ratio: g.csa_ratio }, &csa, index),
            c("hca", Kind::Stride { ratio: g.hca_ratio }, &hca, row),
            c("window", Kind::Window { tokens: g.window, slack: g.draft_slack }, &all, row),
            c("csa_pool", two, &csa, pool(g.head_dim)),
            c("csa_index_pool", two, &csa, pool(g.index_head_dim)),
            c("hca_pool", Kind::Pool { rows: 1, saved: 0 }, &hca, pool(g.head_dim)),
        ];
        components.retain(|x| !x.layers.is_empty());
        let spec = LayoutSpec {
            block_tokens: g.block_tokens,
            window: g.window,
            layers: all.len() as u32,
            components,
        };
        spec.validate()?;
        Ok(spec)
    }

    /// Reads what [`to_json`](Self::to_json) writes.
    pub fn from_json(text: &str) -> Result<Self, CoreError> {
        let spec: LayoutSpec =
            serde_json::from_str(text).map_err(|e| CoreError::config("layout", "no valid JSON", e))?;
        spec.validate()?;
        Ok(spec)
    }

    /// The whole spec as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a layout has no map keys or floats")
    }

    fn validate(&self) -> Result<(), CoreError> {
        for (field, value) in
            [("block_tokens", self.block_tokens), ("window", self.window), ("layers", self.layers)]
        {
            if value == 0 {
                return Err(CoreError::config(field, 0, "it must be at least 1"));
            }
        }
        for x in &self.components {
            if let Kind::Stride { ratio } = x.kind
                && (ratio == 0 || !self.block_tokens.is_multiple_of(ratio))
            {
                let expected = format!("it must be a multiple of the ratio {ratio} of component {}", x.name);
                return Err(CoreError::config("block_tokens", self.block_tokens, expected));
            }
            if x.row_bytes == 0 {
                return Err(CoreError::config(
                    "row_bytes",
                    format!("0 for component {}", x.name),
                    "it must be at least 1",
                ));
            }
        }
        if !self.components.iter().any(Component::is_history) {
            return Err(CoreError::config(
                "components",
                "without history",
                "at least one must be of kind Stride",
            ));
        }
        let most = f64::from(u32::MAX - PAGE_ALIGN);
        let (page, slab) = (self.rough_bytes(true), self.rough_bytes(false));
        if page > most {
            let ratios = self.components.iter().filter_map(|x| match x.kind {
                Kind::Stride { ratio } => Some(ratio),
                _ => None,
            });
            let (step, fits) = (ratios.max().unwrap_or(1), f64::from(self.block_tokens) * most / page);
            let expected =
                format!("a page of that many is over 4 GiB, the most is {}", fits as u32 / step * step);
            return Err(CoreError::config("block_tokens", self.block_tokens, expected));
        }
        if slab > most {
            return Err(CoreError::config(
                "components",
                format!("of {slab:.0} B of state"),
                "the most is 4 GiB",
            ));
        }
        Ok(())
    }

    /// At least the bytes of a page or of a slab, whatever the numbers are.
    fn rough_bytes(&self, history: bool) -> f64 {
        let of = |x: &Component| {
            let rows = match x.kind {
                Kind::Stride { ratio } => f64::from(self.block_tokens) / f64::from(ratio),
                _ => f64::from(x.rows(self.block_tokens)),
            };
            x.layers.len() as f64 * (rows * f64::from(x.row_bytes) + f64::from(REGION_ALIGN))
        };
        self.components.iter().filter(|x| x.is_history() == history).map(of).sum()
    }

    /// Where each component lies, in the order of `components`.
    pub fn placements(&self) -> Vec<Placement> {
        let (mut page, mut slab, mut snapshot) = (0, 0, 0);
        self.components
            .iter()
            .map(|x| {
                let n = x.layers.len() as u32;
                let layer_stride = align(x.rows(self.block_tokens) * x.row_bytes, REGION_ALIGN);
                let snapshot_layer_stride = align(x.saved_rows() * x.row_bytes, REGION_ALIGN);
                let end = if x.is_history() { &mut page } else { &mut slab };
                let p = Placement {
                    offset: *end,
                    layer_stride,
                    snapshot_offset: snapshot,
                    snapshot_layer_stride,
                };
                *end += n * layer_stride;
                snapshot += n * snapshot_layer_stride;
                p
            })
            .collect()
    }

    fn region_sum(&self, history: bool) -> u32 {
        let regions =
            self.components.iter().zip(self.placements()).filter(|(x, _)| x.is_history() == history);
        regions.map(|(x, p)| x.layers.len() as u32 * p.layer_stride).sum()
    }

    /// Bytes of a page, padding included.
    pub fn page_bytes(&self) -> u32 {
        align(self.region_sum(true), PAGE_ALIGN)
    }

    /// Bytes of a slab, padding included.
    pub fn slab_bytes(&self) -> u32 {
        align(self.region_sum(false), PAGE_ALIGN)
    }

    /// Bytes of a snapshot.
    pub fn snapshot_bytes(&self) -> u32 {
        let saved = self.components.iter().zip(self.placements());
        saved.map(|(x, p)| x.layers.len() as u32 * p.snapshot_layer_stride).sum()
    }

    /// Pages that a snapshot takes.
    pub fn snapshot_pages(&self) -> u32 {
        self.snapshot_bytes().div_ceil(self.page_bytes())
    }

    /// Pages that a whole slab takes: the state at a position that is no block boundary.
    pub fn slab_pages(&self) -> u32 {
        self.slab_bytes().div_ceil(self.page_bytes())
    }

    /// Pages of the larger of the two kinds of saved state: what a row of a plan's copy lists has room for.
    pub fn copy_pages(&self) -> u32 {
        self.snapshot_pages().max(self.slab_pages())
    }

    /// Bytes of history per token, without any padding.
    pub fn history_bytes_per_token(&self) -> f64 {
        let per_token = |x: &Component| match x.kind {
            Kind::Stride { ratio } => x.layers.len() as f64 * f64::from(x.row_bytes) / f64::from(ratio),
            _ => 0.0,
        };
        self.components.iter().map(per_token).sum()
    }

    /// Tokens before a position that, run again against cached history, rebuild its state exactly (spec 8.5).
    pub fn replay_tokens(&self) -> u32 {
        (self.window - 1) * self.layers
    }

    /// Pages that fit into `bytes`.
    pub fn pages_for(&self, bytes: u64) -> u32 {
        u32::try_from(bytes / u64::from(self.page_bytes())).unwrap_or(u32::MAX)
    }

    /// A stable number of the whole spec, part of every prefix's identity (FNV-1a of the JSON).
    pub fn fingerprint(&self) -> u64 {
        self.to_json()
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flash_and_pro_have_the_published_bytes() {
        let (flash, pro) = (presets::flash(), presets::pro());
        assert_eq!(flash.history_bytes_per_token(), 3514.25);
        assert_eq!(pro.history_bytes_per_token(), 5031.4375);
        assert_eq!((flash.page_bytes(), flash.replay_tokens()), (899_840, 5461));
        assert_eq!((pro.page_bytes(), pro.replay_tokens()), (1_288_192, 7747));
        assert_eq!((flash.snapshot_bytes(), flash.snapshot_pages()), (3_321_856, 4));
        assert_eq!((pro.snapshot_bytes(), pro.snapshot_pages()), (4_713_472, 4));
        assert_eq!((flash.slab_pages(), pro.slab_pages()), (4, 4));
        for spec in [flash, pro] {
            let waste = f64::from(spec.page_bytes()) / (spec.history_bytes_per_token() * 256.0) - 1.0;
            assert!((0.0..0.01).contains(&waste), "{waste}");
        }
    }

    #[test]
    fn regions_do_not_overlap_and_fill_page_and_slab() {
        for spec in [presets::flash(), presets::pro(), presets::toy(4, 6, 3)] {
            let mut ends = [0, 0, 0];
            for (x, p) in spec.components.iter().zip(spec.placements()) {
                let home = usize::from(!x.is_history());
                assert_eq!((p.offset, p.snapshot_offset), (ends[home], ends[2]), "{}", x.name);
                assert!(p.layer_stride >= x.rows(spec.block_tokens) * x.row_bytes);
                ends[home] += p.layer_stride * x.layers.len() as u32;
                ends[2] += p.snapshot_layer_stride * x.layers.len() as u32;
            }
            assert!(ends[0] <= spec.page_bytes() && ends[1] <= spec.slab_bytes());
            assert_eq!(ends[2], spec.snapshot_bytes());
        }
    }

    #[test]
    fn json_round_trips_and_the_fingerprint_tells_specs_apart() {
        let spec = presets::flash();
        assert_eq!(LayoutSpec::from_json(&spec.to_json()).unwrap(), spec);
        assert_ne!(spec.fingerprint(), presets::pro().fingerprint());
        let mut other = spec.clone();
        other.components[0].row_bytes += 1;
        assert_ne!(spec.fingerprint(), other.fingerprint());
    }

    #[test]
    fn bad_specs_are_refused_with_field_value_and_remedy() {
        let mut g = presets::flash_geometry();
        g.block_tokens = 192;
        assert_eq!(
            LayoutSpec::v4(&g).unwrap_err().to_string(),
            "block_tokens is 192; it must be a multiple of the ratio 128 of component hca"
        );
        let mut g = presets::flash_geometry();
        g.block_tokens = 1 << 30;
        let said = LayoutSpec::v4(&g).unwrap_err().to_string();
        let most = said.rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(
            said,
            format!("block_tokens is 1073741824; a page of that many is over 4 GiB, the most is {most}")
        );
        g.block_tokens = most;
        assert!(LayoutSpec::v4(&g).unwrap().page_bytes() > 1 << 31);
        g.block_tokens += 128;
        assert!(LayoutSpec::v4(&g).is_err());
        let mut g = presets::flash_geometry();
        g.compress_ratios[5] = 7;
        assert_eq!(
            LayoutSpec::v4(&g).unwrap_err().to_string(),
            "compress_ratios is 7; each entry is 0, 4 (CSA) or 128 (HCA)"
        );
    }
}

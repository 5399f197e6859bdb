//! Geometry as data: what of a token's past is stored, where, and in how many bytes.
//!
//! ```text
//!   page  (block_tokens tokens of every layer)          slab  (live state of one request)
//!   | csa l2 | csa l4 | … | csa_index l2 | … | hca l3 | … |    | window l0 | window l1 | … | csa_pool l2 | … | hca_pool l3 | … |
//!   ^ offset, one region per layer, layer_stride apart        ^ the same, for the other kinds
//! ```
//!
//! A [`LayoutSpec`] lists components. Every byte count, stride and offset follows from it and from nowhere else.
//! With `ranks` R row j of a page lies on rank j mod R: a page, here, is one rank's part of a block, and a saved state is cut
//! into R equal runs of bytes. Slabs are whole on every rank.

pub mod presets;

use serde::{Deserialize, Serialize};

use crate::error::CoreError;

/// Regions start at multiples of this, so that rows can be loaded 16 bytes at a time.
const REGION_ALIGN: u32 = 16;
/// Pages and slabs are padded to a multiple of this.
const PAGE_ALIGN: u32 = 256;

/// How a component persists.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
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
#[serde(deny_unknown_fields)]
pub struct Component {
    /// `csa`, `csa_index`, `hca`, `window`, `csa_pool`, `csa_index_pool`, `hca_pool` in V4 (`model/layout.py`).
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
    /// Rows of one layer: in a rank's page for `Stride`, in a slab otherwise.
    pub fn rows(&self, block_tokens: u32, ranks: u32) -> u32 {
        match self.kind {
            Kind::Stride { ratio } => block_tokens / ratio / ranks,
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

/// What an attention layer reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Tokens before a position, run again in this layer, that rebuild its state there.
    pub reach: u32,
    /// The layer whose history it reads, itself or an earlier one; `None`: no history.
    pub history_of: Option<u16>,
}

/// The cache of a model, as data.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayoutSpec {
    /// Tokens of a page; a multiple of every ratio times `ranks`.
    pub block_tokens: u32,
    /// Ranks that hold a page together, each as many rows of it.
    #[serde(default = "one")]
    pub ranks: u32,
    /// Sliding window in tokens, the query included.
    pub window: u32,
    /// Attention layers.
    pub layers: Vec<Layer>,
    /// Components in the order in which they lie in memory.
    pub components: Vec<Component>,
}

fn one() -> u32 {
    1
}

fn align(n: u32, to: u32) -> u32 {
    n.div_ceil(to) * to
}

impl LayoutSpec {
    /// The whole spec as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a layout has no map keys or floats")
    }

    /// Refuses what cannot work, by name.
    pub fn validate(&self) -> Result<(), CoreError> {
        let layers = self.layers.len() as u32;
        let (block, ranks) = (self.block_tokens, self.ranks);
        for (field, value) in
            [("block_tokens", block), ("ranks", ranks), ("window", self.window), ("layers", layers)]
        {
            if value == 0 {
                return Err(CoreError::config(field, 0, "it must be at least 1"));
            }
        }
        for x in &self.components {
            if let Kind::Stride { ratio } = x.kind
                && ratio.checked_mul(ranks).is_none_or(|step| step == 0 || !block.is_multiple_of(step))
            {
                let among = if ranks == 1 { String::new() } else { format!(" times {ranks} ranks") };
                let expected =
                    format!("it must be a multiple of the ratio {ratio} of component {}{among}", x.name);
                return Err(CoreError::config("block_tokens", block, expected));
            }
            if x.row_bytes == 0 {
                return Err(CoreError::config(
                    "row_bytes",
                    format!("0 for component {}", x.name),
                    "it must be at least 1",
                ));
            }
        }
        self.validate_layers()?;
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
                Kind::Stride { ratio } => Some(ratio * ranks),
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

    /// Every component belongs to known layers, each once, and every history that is read to the layer that writes it.
    fn validate_layers(&self) -> Result<(), CoreError> {
        let mut writers = vec![false; self.layers.len()];
        for (i, x) in self.components.iter().enumerate() {
            if self.components[..i].iter().any(|other| other.name == x.name) {
                return Err(CoreError::config("components", &x.name, "a name may be there once"));
            }
            let field = format!("layers of component {}", x.name);
            let last = x.layers.last().map_or(0, |&l| usize::from(l));
            if x.layers.is_empty() || !x.layers.is_sorted_by(|a, b| a < b) || last >= writers.len() {
                let expected = format!("they must ascend, from 0 to {} at most", writers.len() - 1);
                return Err(CoreError::config(&field, format!("{:?}", x.layers), expected));
            }
            if x.is_history() {
                x.layers.iter().for_each(|&l| writers[usize::from(l)] = true);
            }
        }
        for (l, layer) in self.layers.iter().enumerate() {
            let fits = match layer.history_of {
                None => !writers[l],
                Some(of) if usize::from(of) == l => writers[l],
                Some(of) => !writers[l] && usize::from(of) < l && writers[usize::from(of)],
            };
            if !fits {
                let known: Vec<usize> = (0..=l).filter(|&l| writers[l]).collect();
                let (field, value) = (format!("layers[{l}].history_of"), format!("{:?}", layer.history_of));
                let expected = format!(
                    "layers that store history up to it are {known:?}, and it is itself of one that does"
                );
                return Err(CoreError::config(&field, value, expected));
            }
        }
        Ok(())
    }

    /// At least the bytes of a page or of a slab, whatever the numbers are.
    fn rough_bytes(&self, history: bool) -> f64 {
        let of = |x: &Component| {
            let rows = match x.kind {
                Kind::Stride { ratio } => {
                    f64::from(self.block_tokens) / f64::from(ratio) / f64::from(self.ranks)
                }
                _ => f64::from(x.rows(self.block_tokens, self.ranks)),
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
                let layer_stride = align(x.rows(self.block_tokens, self.ranks) * x.row_bytes, REGION_ALIGN);
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

    /// Bytes of a rank's page, padding included.
    pub fn page_bytes(&self) -> u32 {
        align(self.region_sum(true), PAGE_ALIGN)
    }

    /// Bytes of a slab, whole on every rank, padding included.
    pub fn slab_bytes(&self) -> u32 {
        align(self.region_sum(false), PAGE_ALIGN)
    }

    /// Bytes of a snapshot, all ranks' runs of it together.
    pub fn snapshot_bytes(&self) -> u32 {
        let saved = self.components.iter().zip(self.placements());
        saved.map(|(x, p)| x.layers.len() as u32 * p.snapshot_layer_stride).sum()
    }

    /// Pages that a snapshot takes, on each rank its run.
    pub fn snapshot_pages(&self) -> u32 {
        self.run(self.snapshot_bytes()).div_ceil(self.page_bytes())
    }

    /// Bytes of a saved state of so many that each rank keeps.
    fn run(&self, state: u32) -> u32 {
        state.div_ceil(self.ranks)
    }

    /// Pages that a whole slab takes: the state at a position that is no block boundary.
    pub fn slab_pages(&self) -> u32 {
        self.run(self.slab_bytes()).div_ceil(self.page_bytes())
    }

    /// Pages of the larger of the two kinds of saved state: what a row of a plan's copy lists has room for.
    pub fn copy_pages(&self) -> u32 {
        self.snapshot_pages().max(self.slab_pages())
    }

    /// Bytes of history per token on each rank, without any padding.
    pub fn history_bytes_per_token(&self) -> f64 {
        let per_token = |x: &Component| match x.kind {
            Kind::Stride { ratio } => x.layers.len() as f64 * f64::from(x.row_bytes) / f64::from(ratio),
            _ => 0.0,
        };
        self.components.iter().map(per_token).sum::<f64>() / f64::from(self.ranks)
    }

    /// Tokens before a position that, run again against cached history, rebuild its state exactly (spec 8.5).
    pub fn replay_tokens(&self) -> u32 {
        self.layers.iter().map(|l| l.reach).sum()
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
    fn ranks_divide_a_page_and_a_saved_state_but_no_slab() {
        for (ranks, one) in [(2, presets::flash()), (8, presets::pro())] {
            let spec = LayoutSpec { ranks, block_tokens: 128 * ranks, ..one.clone() };
            spec.validate().unwrap();
            let half = LayoutSpec { block_tokens: 128, ..one.clone() };
            assert_eq!(spec.page_bytes(), half.page_bytes()); // R times the tokens, 1 / R of the rows
            assert_eq!(spec.history_bytes_per_token() * f64::from(ranks), one.history_bytes_per_token());
            assert_eq!((spec.slab_bytes(), spec.snapshot_bytes()), (one.slab_bytes(), one.snapshot_bytes()));
            assert_eq!(
                spec.snapshot_pages(),
                one.snapshot_bytes().div_ceil(ranks).div_ceil(spec.page_bytes())
            );
            assert_ne!(spec.fingerprint(), LayoutSpec { ranks: 1, ..spec.clone() }.fingerprint());
        }
        assert_eq!(
            refused(|s| s.ranks = 4),
            "block_tokens is 256; it must be a multiple of the ratio 128 of component hca times 4 ranks"
        );
        assert!(refused(|s| s.ranks = 0).contains("ranks is 0; it must be at least 1"));
        assert!(refused(|s| s.ranks = u32::MAX).contains("component csa times 4294967295 ranks"));
    }

    #[test]
    fn regions_do_not_overlap_and_fill_page_and_slab() {
        let sharded = LayoutSpec { ranks: 2, ..presets::flash() };
        for spec in [presets::flash(), sharded, presets::pro(), presets::toy(4, 6, 3)] {
            let mut ends = [0, 0, 0];
            for (x, p) in spec.components.iter().zip(spec.placements()) {
                let home = usize::from(!x.is_history());
                assert_eq!((p.offset, p.snapshot_offset), (ends[home], ends[2]), "{}", x.name);
                assert!(p.layer_stride >= x.rows(spec.block_tokens, spec.ranks) * x.row_bytes);
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
        assert_eq!(serde_json::from_str::<LayoutSpec>(&spec.to_json()).unwrap(), spec);
        assert_ne!(spec.fingerprint(), presets::pro().fingerprint());
        let mut other = spec.clone();
        other.components[0].row_bytes += 1;
        assert_ne!(spec.fingerprint(), other.fingerprint());
    }

    fn refused(change: impl FnOnce(&mut LayoutSpec)) -> String {
        let mut spec = presets::flash();
        change(&mut spec);
        spec.validate().unwrap_err().to_string()
    }

    #[test]
    fn bad_specs_are_refused_with_field_value_and_remedy() {
        assert_eq!(
            refused(|s| s.block_tokens = 192),
            "block_tokens is 192; it must be a multiple of the ratio 128 of component hca"
        );
        let said = refused(|s| s.block_tokens = 1 << 30);
        let most = said.rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(
            said,
            format!("block_tokens is 1073741824; a page of that many is over 4 GiB, the most is {most}")
        );
        let mut spec = LayoutSpec { block_tokens: most, ..presets::flash() };
        assert!(spec.validate().is_ok() && spec.page_bytes() > 1 << 31);
        spec.block_tokens += 128;
        assert!(spec.validate().is_err());
        assert!(refused(|s| s.components[1].name = "csa".to_owned()).contains("components is csa"));
        assert_eq!(
            refused(|s| s.components[0].layers = vec![2, 43]),
            "layers of component csa is [2, 43]; they must ascend, from 0 to 42 at most"
        );
    }

    fn without_history(spec: &mut LayoutSpec, layer: u16) {
        spec.components.iter_mut().filter(|x| x.is_history()).for_each(|x| x.layers.retain(|&l| l != layer));
    }

    #[test]
    fn a_layer_reads_the_history_of_itself_or_of_an_earlier_one_that_has_some() {
        let told = "layers[4].history_of is ";
        assert!(refused(|s| s.layers[4].history_of = None).starts_with(told)); // it has its own
        assert!(refused(|s| s.layers[4].history_of = Some(2)).starts_with(told));
        for bad in [0, 1, 7, 43] {
            let said = refused(|s| {
                without_history(s, 4);
                s.layers[4].history_of = Some(bad);
            });
            assert!(said.starts_with(told) && said.contains("[2, 3]"), "{said}");
        }
        let mut spec = presets::flash();
        without_history(&mut spec, 4);
        spec.layers[4].history_of = Some(2);
        spec.validate().unwrap();
    }

    #[test]
    fn a_replay_is_as_long_as_the_reaches_of_all_layers_together() {
        let mut spec = presets::flash();
        assert_eq!(spec.replay_tokens(), 43 * 127);
        spec.layers[3].reach = 0;
        spec.layers[5].reach = 200;
        assert_eq!(spec.replay_tokens(), 41 * 127 + 200);
    }
}

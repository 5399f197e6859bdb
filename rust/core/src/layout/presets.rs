//! Layouts with names: the released models with the trained row formats, and a toy for tests.

use super::{Component, Kind, LayoutSpec, V4Geometry};

fn geometry(compress_ratios: Vec<u32>) -> V4Geometry {
    V4Geometry {
        compress_ratios,
        csa_ratio: 4,
        hca_ratio: 128,
        head_dim: 512,
        index_head_dim: 128,
        window: 128,
        row: (584, "fp8_ds_mla".to_owned()),
        index_row: (68, "mxfp4".to_owned()),
        block_tokens: 256,
        draft_slack: 0,
    }
}

/// `[a, a] + [4, 128] * pairs + [4]`, the schedule of both releases.
fn schedule(first: u32, pairs: usize) -> Vec<u32> {
    let mut ratios = vec![first, first];
    ratios.extend([4, 128].repeat(pairs));
    ratios.push(4);
    ratios
}

/// V4-Flash: 2 window-only, 21 CSA, 20 HCA layers.
pub fn flash_geometry() -> V4Geometry {
    geometry(schedule(0, 20))
}

/// V4-Pro: 30 CSA, 31 HCA layers.
pub fn pro_geometry() -> V4Geometry {
    geometry(schedule(128, 29))
}

/// V4-Flash with 584-byte rows and the FP4 index.
pub fn flash() -> LayoutSpec {
    LayoutSpec::v4(&flash_geometry()).expect("the preset is valid")
}

/// V4-Pro with 584-byte rows and the FP4 index.
pub fn pro() -> LayoutSpec {
    LayoutSpec::v4(&pro_geometry()).expect("the preset is valid")
}

/// A tiny V4 for tests: blocks of 4 tokens, a window of 3, a window, a CSA and an HCA layer. A replay takes 6 tokens, a
/// snapshot one page.
pub fn toy_geometry() -> V4Geometry {
    V4Geometry {
        compress_ratios: vec![0, 2, 4],
        csa_ratio: 2,
        hca_ratio: 4,
        head_dim: 2,
        index_head_dim: 2,
        window: 3,
        row: (64, "toy".to_owned()),
        index_row: (640, "toy".to_owned()),
        block_tokens: 4,
        draft_slack: 0,
    }
}

/// The layout of [`toy_geometry`].
pub fn toy_v4() -> LayoutSpec {
    LayoutSpec::v4(&toy_geometry()).expect("the preset is valid")
}

/// A tiny layout for tests that are not about V4: one history row per token, window and one saved pool row in every layer.
pub fn toy(block_tokens: u32, window: u32, layers: u16) -> LayoutSpec {
    let all: Vec<u16> = (0..layers).collect();
    let c = |name: &str, kind, row_bytes| Component {
        name: name.to_owned(),
        kind,
        layers: all.clone(),
        row_bytes,
        format: "toy".to_owned(),
    };
    let components = vec![
        c("history", Kind::Stride { ratio: 1 }, 256),
        c("window", Kind::Window { tokens: window, slack: 0 }, 256),
        c("pool", Kind::Pool { rows: 2, saved: 1 }, 64),
    ];
    LayoutSpec { block_tokens, window, layers: u32::from(layers), components }
}

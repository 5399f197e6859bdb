//! Layouts with names: the released models with the trained row formats, as `python/dsv4/model/layout.py` lists them, and
//! toys for tests.

use super::{Component, Kind, Layer, LayoutSpec};

fn read(text: &str) -> LayoutSpec {
    let spec: LayoutSpec = serde_json::from_str(text).expect("the preset is a layout");
    spec.validate().expect("the preset is valid");
    spec
}

/// V4-Flash with 584-byte rows and the FP4 index: 2 window-only, 21 CSA, 20 HCA layers.
pub fn flash() -> LayoutSpec {
    read(include_str!("flash.json"))
}

/// V4-Pro with 584-byte rows and the FP4 index: 30 CSA, 31 HCA layers.
pub fn pro() -> LayoutSpec {
    read(include_str!("pro.json"))
}

/// The history that a layer of a toy reads besides its window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Past {
    /// None.
    None,
    /// Its own, with entries of this many tokens that also see the block before, and an index.
    Overlap(u32),
    /// Its own, with entries of this many tokens.
    Plain(u32),
    /// That of an earlier layer.
    Of(u16),
}

/// A tiny model for tests. `index_bytes`: of an index row, which says how many pages a snapshot takes.
pub fn toy_model(layers: &[Past], window: u32, block_tokens: u32, index_bytes: u32) -> LayoutSpec {
    const ROW: u32 = 64;
    const POOL: u32 = 16;
    let numbered = || (0u16..).zip(layers);
    let mut kinds: Vec<Past> = layers.to_vec();
    kinds.retain(|p| matches!(p, Past::Overlap(_) | Past::Plain(_)));
    kinds.sort_by_key(|p| if let Past::Overlap(m) = *p { (0, m) } else { (1, ratio(*p)) });
    kinds.dedup();
    let (mut pages, mut slabs) = (Vec::new(), Vec::new());
    let mut add = |name: String, kind, of: &dyn Fn(Past) -> bool, row_bytes| {
        let layers = numbered().filter(|&(_, &p)| of(p)).map(|(l, _)| l).collect();
        let all = if matches!(kind, Kind::Stride { .. }) { &mut pages } else { &mut slabs };
        all.push(Component { name, kind, layers, row_bytes, format: "toy".to_owned() });
    };
    add("window".to_owned(), Kind::Window { tokens: window, slack: 0 }, &|_| true, ROW);
    for past in kinds {
        let m = ratio(past);
        let own = |p| p == past;
        if let Past::Overlap(_) = past {
            let two = Kind::Pool { rows: 2, saved: 1 };
            add(format!("csa_{m}"), Kind::Stride { ratio: m }, &own, ROW);
            add(format!("csa_{m}_index"), Kind::Stride { ratio: m }, &own, index_bytes);
            add(format!("csa_{m}_pool"), two, &own, POOL);
            add(format!("csa_{m}_index_pool"), two, &own, POOL);
        } else {
            add(format!("hca_{m}"), Kind::Stride { ratio: m }, &own, ROW);
            add(format!("hca_{m}_pool"), Kind::Pool { rows: 1, saved: 0 }, &own, POOL);
        }
    }
    pages.append(&mut slabs);
    let layer = |(l, &past): (u16, &Past)| match past {
        Past::None => Layer { reach: window - 1, history_of: None },
        Past::Overlap(m) => Layer { reach: m.max(window - 1), history_of: Some(l) },
        Past::Plain(_) => Layer { reach: window - 1, history_of: Some(l) },
        Past::Of(of) => Layer { reach: window - 1, history_of: Some(of) },
    };
    let spec = LayoutSpec {
        block_tokens,
        ranks: 1,
        window,
        layers: numbered().map(layer).collect(),
        components: pages,
    };
    spec.validate().expect("a toy is valid");
    spec
}

fn ratio(past: Past) -> u32 {
    if let Past::Overlap(m) | Past::Plain(m) = past { m } else { 0 }
}

/// A tiny V4 for tests: blocks of 4 tokens, a window of 3, a window, a CSA and an HCA layer. A replay takes 6 tokens, a
/// snapshot one page.
pub fn toy_v4() -> LayoutSpec {
    toy_model(&[Past::None, Past::Overlap(2), Past::Plain(4)], 3, 4, 640)
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
    let layers = all.iter().map(|&l| Layer { reach: window - 1, history_of: Some(l) }).collect();
    LayoutSpec { block_tokens, ranks: 1, window, layers, components }
}

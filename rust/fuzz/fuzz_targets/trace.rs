//! Any bytes as a trace: a trace, or an error of one line; and whatever is a trace can be replayed.
//!
//!     RUSTC_BOOTSTRAP=1 cargo fuzz run trace --fuzz-dir rust/fuzz
#![no_main]

use std::sync::Arc;

use arbitrary::Arbitrary;
use dsv4_core::Options;
use dsv4_core::layout::presets;
use dsv4_sim::replay::best::Blocks;
use dsv4_sim::replay::run::{Replay, Settings};
use dsv4_sim::replay::trace::Trace;
use libfuzzer_sys::fuzz_target;

/// Tokens of a trace that is replayed; longer ones are only read.
const MOST: u64 = 1 << 14;

/// Bytes as they are, or lines that are nearly right.
#[derive(Arbitrary, Debug)]
enum Input {
    Bytes(Vec<u8>),
    Lines(Vec<Line>),
}

#[derive(Arbitrary, Debug)]
struct Line {
    ms: i16,
    input: u8,
    output: u8,
    ids: u8,
    /// Ids more or fewer than there must be.
    extra: Option<i8>,
    known_output: bool,
    session: Option<u8>,
    delay: Option<u8>,
    /// Text in place of a value.
    spoiled: Option<(u8, String)>,
}

impl Line {
    fn json(&self) -> String {
        let (input, output) = (u32::from(self.input), u32::from(self.output % 32));
        let blocks = input.div_ceil(8);
        let id = |i: u32| u32::from(self.ids >> (i % 8)) & 1 | i << 1;
        let count = blocks.saturating_add_signed(self.extra.map_or(0, i32::from));
        let mut fields = vec![
            ("timestamp", self.ms.to_string()),
            ("input_length", input.to_string()),
            ("output_length", output.to_string()),
            ("hash_ids", format!("{:?}", (0..count).map(id).collect::<Vec<_>>())),
        ];
        if self.known_output && output > 0 {
            let ids: Vec<u32> = (input / 8..(input + output).div_ceil(8)).map(id).collect();
            fields.push(("output_hash_ids", format!("{ids:?}")));
        }
        fields.extend(self.session.map(|s| ("session", (s % 3).to_string())));
        fields.extend(self.delay.map(|d| ("delay", d.to_string())));
        if let Some((which, text)) = &self.spoiled {
            let at = usize::from(*which) % fields.len();
            fields[at].1.clone_from(text);
        }
        let inside: Vec<String> = fields.iter().map(|(name, value)| format!("\"{name}\": {value}")).collect();
        format!("{{{}}}\n", inside.join(", "))
    }
}

fuzz_target!(|input: Input| {
    let data = match input {
        Input::Bytes(bytes) => bytes,
        Input::Lines(lines) => lines.iter().map(Line::json).collect::<String>().into_bytes(),
    };
    let mut trace = Trace::new(8).expect("the block size is valid");
    if let Err(e) = trace.read("fuzz", data.as_slice()) {
        assert!(!e.to_string().contains('\n'), "{e}");
        return;
    }
    let tokens: u64 = trace.requests().iter().map(|r| u64::from(r.input) + u64::from(r.output)).sum();
    if tokens > MOST {
        return;
    }
    for r in trace.requests() {
        assert_eq!(trace.prompt(r).len(), r.input as usize);
        let known = trace.pieces(r, 0, r.input).map(|(_, _, n)| n).sum::<u32>();
        assert_eq!(known, r.input);
    }
    let options = Options { pages: 64, slabs: 2, max_step_tokens: 1 << 15, ..Options::default() };
    let layout = presets::toy(4, 6, 3);
    let total = trace.requests().len() as u64;
    let trace = Arc::new(trace);
    let mut replay = Replay::new(trace.clone(), &layout, Settings { options, model: None }).expect("valid");
    while replay.run(1000).expect("no step is refused").done < total {}
    replay.check().expect("the core is sound");
    let report = replay.report(&Blocks::new(&trace, layout.block_tokens));
    assert_eq!(report.finished + report.refused, total);
    assert!(report.hits.matched <= report.hits.best_for_pool.unwrap_or(1.0) + 1e-9);
});

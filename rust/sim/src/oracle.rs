//! The cold run: one sequence, plain vectors, no pages, no slabs.

use crate::fake::{EMPTY, Geometry, Memory, embed, forward, sample};

/// What a request must produce.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Prompt and output.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Output of the last layer at each position that may be computed.
    pub outputs: Vec<u64>,
    /// The output ends with a stop token.
    pub stops: bool,
}

struct Plain {
    window: Vec<Vec<u64>>,
    history: Vec<Vec<u64>>,
    pools: Vec<[u64; 2]>,
}

impl Memory for Plain {
    fn window(&self, layer: usize, pos: u32) -> u64 {
        self.window[layer][pos as usize]
    }

    fn set_window(&mut self, layer: usize, _: u32, value: u64) {
        self.window[layer].push(value);
    }

    fn history(&self, layer: usize, entry: u32) -> u64 {
        self.history[layer][entry as usize]
    }

    fn set_history(&mut self, layer: usize, _: u32, value: u64) {
        self.history[layer].push(value);
    }

    fn pools(&mut self, layer: usize) -> &mut [u64; 2] {
        &mut self.pools[layer]
    }
}

/// Runs a prompt and up to `max_new` greedy tokens from nothing.
pub fn cold_run(
    g: &Geometry,
    prompt: &[u32],
    salt: &[u8],
    max_new: u32,
    stop: &[u32],
    vocabulary: u32,
) -> Expected {
    let layers = g.layers.len();
    let mut memory = Plain {
        window: vec![Vec::new(); layers],
        history: vec![Vec::new(); layers],
        pools: vec![[EMPTY; 2]; layers],
    };
    let (mut tokens, mut outputs) = (prompt.to_vec(), Vec::new());
    let mut stops = false;
    while outputs.len() < tokens.len() {
        let pos = outputs.len();
        let output = forward(g, &mut memory, embed(tokens[pos], salt), pos as u32, 0);
        outputs.push(output);
        let sampled = tokens.len() - prompt.len();
        if pos + 1 == tokens.len() && sampled < max_new as usize && !stops {
            let token = sample(output, vocabulary);
            stops = stop.contains(&token);
            tokens.push(token);
        }
    }
    Expected { tokens, prompt: prompt.len() as u32, outputs, stops }
}

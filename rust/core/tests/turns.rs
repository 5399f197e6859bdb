//! Which state of a turn goes first, learned from what prompts go on from.

#![allow(clippy::unwrap_used)]

use dsv4_core::cache::retention::Hint;
use dsv4_core::cache::turns::End;
use dsv4_core::cache::{CacheOptions, Eviction, KvCache, Sequence};
use dsv4_core::cost::CostModel;
use dsv4_core::ids::Step;
use dsv4_core::layout::presets;

const BLOCK: u32 = 4;

fn cache_of(pages: u32, eviction: Eviction) -> KvCache {
    let cost = CostModel { restore_us: 0.0, ..CostModel::default() };
    let options = CacheOptions {
        pages,
        eviction,
        snapshot_budget: 1.0,
        admit_by_value: true,
        cost,
        replay_tokens: 32,
        ..CacheOptions::default()
    };
    KvCache::new(&presets::toy(BLOCK, 6, 3), &options).unwrap()
}

/// Blocks of tokens that nothing else has.
struct Fresh(u32);

impl Fresh {
    fn blocks(&mut self, n: u32) -> Vec<u32> {
        self.0 += n * BLOCK;
        (self.0 - n * BLOCK..self.0).collect()
    }
}

fn save(cache: &mut KvCache, seq: &mut Sequence, pos: u32) {
    if let Some(pages) = cache.reserve_snapshot(seq, pos, true) {
        cache.publish_snapshot(seq, pos, pages).unwrap();
    }
}

/// A request of `tenant` for `prompt`, which is answered by `output`; both are whole blocks. With `states` those at both ends are saved.
fn turn(cache: &mut KvCache, tenant: u32, prompt: &[u32], output: &[u32], states: bool) {
    let whole = [prompt, output].concat();
    let found = cache.lookup(b"", prompt, prompt.len() as u32 - 1);
    let hint = Hint { tenant, ..Hint::default() };
    let mut seq = cache.attach(b"", prompt, found.history, hint);
    seq.asks((prompt.len() as u32 - 1) / BLOCK);
    if let Some(&(_, state)) = found.snapshots.last() {
        cache.lease_snapshot(state, Step(0));
    }
    cache.extend(&mut seq, whole.len() as u32).unwrap();
    cache.publish(&mut seq, &whole, Step(0));
    if states {
        save(cache, &mut seq, (prompt.len() as u32 - 1) / BLOCK * BLOCK);
        save(cache, &mut seq, whole.len() as u32);
    }
    cache.end_turn(&seq);
    cache.release(seq, Step(0));
}

/// A conversation of some turns; with `rewrites` a prompt never has the output before it. Returns the last turn.
fn converse(
    cache: &mut KvCache,
    fresh: &mut Fresh,
    tenant: u32,
    turns: u32,
    rewrites: bool,
    states: bool,
) -> (Vec<u32>, Vec<u32>) {
    let mut prompt = fresh.blocks(40);
    let mut output = Vec::new();
    for _ in 0..turns {
        let said = if rewrites { fresh.blocks(4) } else { output };
        // One token more than whole blocks, so that the boundary inside the prompt is the last one.
        prompt.truncate(prompt.len() / BLOCK as usize * BLOCK as usize);
        prompt.extend(said);
        prompt.extend(fresh.blocks(3));
        output = fresh.blocks(4);
        turn(cache, tenant, &prompt, &output, states);
    }
    (prompt, output)
}

/// Positions of the saved states on the way to the end of a turn, from its prompt's end on.
fn ends(cache: &KvCache, (prompt, output): &(Vec<u32>, Vec<u32>)) -> [bool; 2] {
    let whole = [prompt.clone(), output.clone()].concat();
    let found = cache.lookup(b"", &whole, whole.len() as u32);
    let at = [(prompt.len() as u32 - 1) / BLOCK * BLOCK, whole.len() as u32];
    at.map(|pos| found.snapshots.iter().any(|s| s.0 == pos))
}

#[test]
fn the_end_that_is_not_gone_on_from_goes_first() {
    for eviction in [Eviction::VALUE, Eviction::LRU] {
        for rewrites in [false, true] {
            let mut cache = cache_of(4096, eviction);
            let last = converse(&mut cache, &mut Fresh(0), 0, 12, rewrites, true);
            assert_eq!(ends(&cache, &last), [true, true], "{eviction:?}, rewrites {rewrites}");
            while ends(&cache, &last) == [true, true] {
                assert_eq!(cache.evict_snapshots(1), 1);
            }
            assert_eq!(ends(&cache, &last), [rewrites, !rewrites], "{eviction:?}, rewrites {rewrites}");
            cache.check(std::iter::empty(), std::iter::empty()).unwrap();
        }
    }
}

#[test]
fn conversations_keep_to_their_own_way_beside_each_other() {
    let (mut cache, mut fresh) = (cache_of(8192, Eviction::VALUE), Fresh(0));
    let keeps = converse(&mut cache, &mut fresh, 1, 12, false, true);
    let drops = converse(&mut cache, &mut fresh, 1, 12, true, true);
    while ends(&cache, &keeps) == [true, true] || ends(&cache, &drops) == [true, true] {
        assert_eq!(cache.evict_snapshots(1), 1);
    }
    let left = [ends(&cache, &keeps), ends(&cache, &drops)];
    // Neither has lost the one it needs before the other one.
    assert_eq!((left[0][1], left[1][0]), (true, true), "{left:?}");
}

#[test]
fn a_new_conversation_begins_with_what_its_tenant_does() {
    let (mut cache, mut fresh) = (cache_of(16384, Eviction::VALUE), Fresh(0));
    for _ in 0..4 {
        converse(&mut cache, &mut fresh, 1, 8, false, true);
        converse(&mut cache, &mut fresh, 2, 8, true, true);
    }
    for (tenant, rewrites) in [(1, false), (2, true)] {
        let first = converse(&mut cache, &mut fresh, tenant, 1, rewrites, true);
        while ends(&cache, &first) == [true, true] {
            assert_eq!(cache.evict_snapshots(1), 1);
        }
        assert_eq!(ends(&cache, &first), [rewrites, !rewrites], "tenant {tenant}");
    }
}

#[test]
fn what_was_never_saved_is_learned_from_as_well_and_a_dump_keeps_it() {
    let (mut cache, mut fresh) = (cache_of(8192, Eviction::VALUE), Fresh(0));
    converse(&mut cache, &mut fresh, 0, 12, true, false);
    assert_eq!(cache.snapshots(), 0);
    let first = converse(&mut cache, &mut fresh, 0, 1, true, true);
    let image = cache.image();
    let mut loaded = cache_of(8192, Eviction::VALUE);
    loaded.fill(&image).unwrap();
    for cache in [&mut cache, &mut loaded] {
        while ends(cache, &first) == [true, true] {
            assert_eq!(cache.evict_snapshots(1), 1);
        }
        assert_eq!(ends(cache, &first), [true, false]);
    }
    let images = [&cache, &loaded].map(|c| serde_json::to_string(&c.image()).unwrap().len());
    assert_eq!(images[0], images[1]);
}

#[test]
fn an_output_that_was_rewritten_goes_before_other_history() {
    let (mut cache, mut fresh) = (cache_of(8192, Eviction::VALUE), Fresh(0));
    converse(&mut cache, &mut fresh, 0, 8, true, true);
    let (prompt, output) = converse(&mut cache, &mut fresh, 0, 6, true, true);
    let next = [prompt.clone(), fresh.blocks(6)].concat();
    turn(&mut cache, 0, &next, &fresh.blocks(2), true);
    let old = [prompt.clone(), output].concat();
    let known = |cache: &KvCache, tokens: &[u32]| cache.lookup(b"", tokens, tokens.len() as u32).history;
    assert_eq!(known(&cache, &old), old.len() as u32);
    // The rewritten outputs of both conversations: 12 of them are known to be over.
    cache.evict_history(4 * 13);
    assert_eq!(known(&cache, &old), prompt.len() as u32, "its output has gone");
    assert_eq!(known(&cache, &next), next.len() as u32, "and nothing else of the conversation");
}

#[test]
fn the_deepest_end_of_a_turn_is_named() {
    let (mut cache, mut fresh) = (cache_of(1024, Eviction::VALUE), Fresh(0));
    let (prompt, output) = converse(&mut cache, &mut fresh, 0, 1, false, true);
    let whole = [prompt.clone(), output.clone()].concat();
    let turn = |tokens: &[u32]| cache.lookup(b"", tokens, tokens.len() as u32).turn;
    let asked = (prompt.len() as u32 - 1) / BLOCK * BLOCK;
    assert_eq!(turn(&whole), Some((whole.len() as u32, End::Output)));
    assert_eq!(turn(&whole[..whole.len() - 1]), Some((asked, End::Prompt)));
    assert_eq!(turn(&prompt[..prompt.len() - 8]), None);
}

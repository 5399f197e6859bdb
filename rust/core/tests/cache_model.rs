//! The cache against a naive oracle: sets of whole prefixes, no sharing tricks, the same order of eviction written down
//! plainly.
//!
//! Tiny worlds (vocabulary 2, blocks of 4, a few pages) make equal prefixes, adoption and exhaustion common. After every
//! operation: `check()`, the same prefixes and snapshots cached, and every page that a sequence names holds what it should.
//! Every policy of `Eviction::ALL` is drawn. Those whose order is in [`AGES`] must evict exactly what the oracle says, with
//! quotas, times to live, priorities and pins; of others, such as `value`, whose rates are learned, it is checked that what
//! goes may go. At the end the cache is dumped, loaded, and emptied again in the same order.

#![allow(clippy::unwrap_used)]

mod common;
mod mirror;
mod victim;

use std::collections::{BTreeMap, BTreeSet};

use common::{Rng, for_seeds};
use dsv4_core::cache::retention::{Hint, Retention};
use dsv4_core::cache::{CacheOptions, Eviction, KvCache, Lost, Sequence};
use dsv4_core::fence::Tickets;
use dsv4_core::ids::{PageId, PinId, Step, Ticket};
use dsv4_core::layout::{LayoutSpec, presets};
use mirror::Mirror;
use victim::{AGES, Age};

const BLOCK: usize = 4;
const QUOTAS: [(u32, u32); 2] = [(1, 4), (2, 7)];
type Prefix = (u8, Vec<u32>);

#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    born: u64,
    used: u64,
    expiry: u64,
    level: i8,
    tenant: u32,
    uses: u32,
    superseded: bool,
}

struct Live {
    seq: Sequence,
    salt: u8,
    tokens: Vec<u32>,
    computed: usize,
    hint: Hint,
}

struct World {
    rng: Rng,
    layout: LayoutSpec,
    options: CacheOptions,
    /// What decides who goes first, where the oracle knows it.
    age: Option<Age>,
    cache: KvCache,
    mirror: Mirror,
    blocks: BTreeMap<Prefix, Facts>,
    states: BTreeMap<Prefix, Facts>,
    live: Vec<Live>,
    leaving: Vec<(u64, Live)>,
    tickets: Tickets,
    copies: Vec<Ticket>,
    /// What copies that have not ended read.
    leased: Vec<(Ticket, Vec<PageId>)>,
    /// What each pin keeps: a prefix, and the states that were saved on it.
    pins: BTreeMap<PinId, (Prefix, Vec<Prefix>)>,
    /// What the device would hold: the prefix whose last block a page stores.
    content: Vec<Option<Prefix>>,
    now: u64,
    now_us: u64,
    step: u64,
    done: u64,
}

fn blocks_of(tokens: &[u32]) -> impl Iterator<Item = Vec<u32>> + '_ {
    (1..=tokens.len() / BLOCK).map(|b| tokens[..b * BLOCK].to_vec())
}

fn use_again(f: &mut Facts, hint: &Hint, now: u64, now_us: u64) {
    let level = hint.retention.priority as i8;
    f.level = if f.expiry <= now_us { level } else { f.level.max(level) };
    f.expiry = f.expiry.max(expiry(hint, now_us));
    f.used = now;
}

fn expiry(hint: &Hint, now_us: u64) -> u64 {
    hint.retention.ttl_us.map_or(0, |ttl| now_us + ttl)
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::new(seed);
        let layout = presets::toy(BLOCK as u32, 6, 3);
        let pages = 8 + rng.below(33) as u32;
        let eviction = Eviction::ALL[rng.below(Eviction::ALL.len() as u64) as usize];
        let age = AGES.iter().find(|(of, _)| *of == eviction).map(|(_, age)| *age);
        let options = CacheOptions {
            pages,
            eviction,
            snapshot_budget: [0.0, 0.2, 0.5, 1.0][rng.below(4) as usize],
            admit_by_value: age.is_none() && rng.below(2) == 0,
            changes: true,
            quotas: if rng.below(2) == 0 { QUOTAS.to_vec() } else { Vec::new() },
            ..CacheOptions::default()
        };
        World {
            cache: KvCache::new(&layout, &options).unwrap(),
            mirror: Mirror::default(),
            content: vec![None; pages as usize],
            rng,
            layout,
            options,
            age,
            blocks: BTreeMap::new(),
            states: BTreeMap::new(),
            live: Vec::new(),
            leaving: Vec::new(),
            tickets: Tickets::default(),
            copies: Vec::new(),
            leased: Vec::new(),
            pins: BTreeMap::new(),
            now: 0,
            now_us: 0,
            step: 0,
            done: 0,
        }
    }

    fn hint(&mut self) -> Hint {
        let ttl = 1 + self.rng.below(40) * 1000 + self.now;
        Hint {
            tenant: self.rng.below(4) as u32,
            retention: Retention {
                // Which blocks are a session's alone depends on edges, which the oracle does not have.
                session: (self.age.is_none() && self.rng.below(2) == 0).then(|| self.rng.below(4)),
                ttl_us: (self.rng.below(5) == 0).then_some(ttl),
                priority: self.rng.below(3) as i32 - 1,
            },
        }
    }

    fn running(&self) -> impl Iterator<Item = &Live> {
        self.live.iter().chain(self.leaving.iter().map(|(_, l)| l))
    }

    fn held(&self, prefix: &Prefix) -> bool {
        self.pins.values().any(|(p, _)| p.0 == prefix.0 && p.1.starts_with(&prefix.1))
    }

    fn keeps_state(&self, prefix: &Prefix) -> bool {
        self.pins.values().any(|(_, states)| states.contains(prefix))
    }

    fn pinned(&self, prefix: &Prefix) -> bool {
        self.held(prefix)
            || self.running().any(|l| {
                l.salt == prefix.0
                    && l.seq.published_blocks() as usize * BLOCK >= prefix.1.len()
                    && l.tokens.starts_with(&prefix.1)
            })
    }

    fn children<'a>(&'a self, p: &'a Prefix) -> impl Iterator<Item = &'a Prefix> {
        self.blocks.keys().filter(|q| q.0 == p.0 && q.1.len() == p.1.len() + BLOCK && q.1.starts_with(&p.1))
    }

    fn state_pages(&self) -> usize {
        self.layout.snapshot_pages() as usize
    }

    fn cached(&self) -> (BTreeSet<Prefix>, BTreeSet<Prefix>) {
        let (mut blocks, mut states) = (BTreeSet::new(), BTreeSet::new());
        for (salt, tokens, state) in self.cache.prefixes() {
            blocks.extend(blocks_of(&tokens).map(|b| (salt[0], b)));
            states.extend(state.then(|| (salt[0], tokens)));
        }
        (blocks, states)
    }

    fn begin(&mut self) {
        let salt = self.rng.below(2) as u8;
        let n = 1 + self.rng.below(30) as usize;
        let tokens: Vec<u32> = (0..n).map(|_| u32::from(self.rng.below(4) == 0)).collect();
        let found = self.cache.lookup(&[salt], &tokens, n as u32 - 1);
        let known =
            blocks_of(&tokens[..n - 1]).take_while(|b| self.blocks.contains_key(&(salt, b.clone()))).count();
        assert_eq!(found.history as usize, known * BLOCK, "history of {tokens:?}");
        let saved = blocks_of(&tokens[..found.history as usize])
            .filter(|b| self.states.contains_key(&(salt, b.clone())))
            .map(|b| b.len() as u32);
        assert_eq!(found.snapshots.iter().map(|s| s.0).collect::<Vec<_>>(), saved.collect::<Vec<_>>());
        self.check_loss(salt, &tokens, found.lost, known);
        let hint = self.hint();
        self.now += 1;
        let seq = self.cache.attach_found(&[salt], &tokens, found.history, hint, &found);
        for b in blocks_of(&tokens[..found.history as usize]) {
            use_again(self.blocks.get_mut(&(salt, b)).unwrap(), &hint, self.now, self.now_us);
        }
        if let Some(&(pos, id)) = found.snapshots.last() {
            self.now += 1;
            if self.rng.below(2) == 0 {
                self.cache.lease_snapshot(id, Step(self.step));
            } else {
                let ticket = self.tickets.open(&mut self.copies);
                self.leased.push((ticket, self.cache.lease_snapshot(id, ticket)));
            }
            let at = (salt, tokens[..pos as usize].to_vec());
            let (block, state) = (self.blocks[&at], self.states.get_mut(&at).unwrap());
            state.level =
                if state.expiry <= self.now_us { block.level } else { state.level.max(block.level) };
            state.expiry = state.expiry.max(block.expiry);
            (state.used, state.uses, state.superseded) = (self.now, state.uses + 1, false);
        }
        self.live.push(Live { seq, salt, tokens, computed: found.history as usize, hint });
    }

    fn check_loss(&self, salt: u8, tokens: &[u32], lost: Lost, known: usize) {
        let limit = (tokens.len() - 1) / BLOCK;
        assert_eq!(lost == Lost::BelowBlock, limit == 0);
        assert_eq!(lost == Lost::Nothing, limit > 0 && known == limit);
        let elsewhere = limit > 0 && self.blocks.contains_key(&(1 - salt, tokens[..BLOCK].to_vec()));
        if lost == Lost::Salt {
            assert!(elsewhere && known == 0, "{tokens:?} is not known under another salt");
        }
        if lost == Lost::NeverStored {
            assert!(!(elsewhere && known == 0), "{tokens:?} is known under another salt");
        }
    }

    fn compute(&mut self, i: usize) {
        let n = 1 + self.rng.below(9) as usize;
        let upto = (self.live[i].computed + n).min(self.live[i].tokens.len());
        let mut live = self.live.swap_remove(i);
        let need = upto.div_ceil(BLOCK) - live.seq.pages().len().min(upto.div_ceil(BLOCK));
        // The sequence pins its path also while it is out of `live`.
        self.leaving.push((u64::MAX, live));
        let (available, free) = (self.cache.available(), self.cache.free_pages());
        let ok = self.follow(None, |w| {
            let (_, live) = w.leaving.last_mut().unwrap();
            w.cache.extend(&mut live.seq, upto as u32).is_ok()
        });
        live = self.leaving.pop().unwrap().1;
        assert!(
            ok || need as u32 > available || self.cache.leaving_pages() > 0,
            "{need} of {available} refused"
        );
        if ok {
            // No more goes than is needed; a state's pages go together.
            let most = if need as u32 > free { self.layout.snapshot_pages() - 1 } else { free - need as u32 };
            assert!(self.cache.free_pages() <= most, "{need} pages were needed, {free} free");
            for block in live.computed / BLOCK..upto / BLOCK {
                let page = live.seq.pages()[block].0 as usize;
                self.content[page] = Some((live.salt, live.tokens[..(block + 1) * BLOCK].to_vec()));
            }
            live.computed = upto;
            self.publish(&mut live, upto);
        }
        self.live.push(live);
    }

    fn publish(&mut self, live: &mut Live, upto: usize) {
        let before = live.seq.published_blocks() as usize * BLOCK;
        self.now += u64::from(upto / BLOCK * BLOCK > before);
        self.cache.publish(&mut live.seq, &live.tokens[..upto], Step(self.step));
        for b in blocks_of(&live.tokens[..upto]).filter(|b| b.len() > before) {
            let fresh = Facts {
                born: self.now,
                used: self.now,
                expiry: expiry(&live.hint, self.now_us),
                level: live.hint.retention.priority as i8,
                tenant: live.hint.tenant,
                ..Facts::default()
            };
            let (now, now_us) = (self.now, self.now_us);
            let known = self.blocks.entry((live.salt, b));
            known.and_modify(|f| use_again(f, &live.hint, now, now_us)).or_insert(fresh);
        }
    }

    /// The state before the new one, if nothing branches off between them, is superseded unless others used it.
    fn supersede(&mut self, at: &Prefix) {
        for n in (1..at.1.len() / BLOCK).rev() {
            let before: Prefix = (at.0, at.1[..n * BLOCK].to_vec());
            if self.children(&before).count() != 1 {
                return;
            }
            if let Some(state) = self.states.get_mut(&before) {
                state.superseded |= state.uses < 2;
                return;
            }
        }
    }

    fn save(&mut self, i: usize) {
        let evict = self.rng.below(2) == 0;
        let pos = self.rng.below(self.live[i].tokens.len() as u64 / BLOCK as u64 + 2) as usize * BLOCK;
        let reserved = self.follow(None, |w| w.cache.reserve_snapshot(&w.live[i].seq, pos as u32, evict));
        let Some(pages) = reserved else { return };
        pages.pages().iter().for_each(|p| self.content[p.0 as usize] = None);
        // With `admit_by_value` the second state back goes at once.
        let published =
            self.follow(None, |w| w.cache.publish_snapshot(&mut w.live[i].seq, pos as u32, pages));
        let live = &self.live[i];
        match published {
            Ok(_) => {
                self.now += 1;
                let (at, hint) = ((live.salt, live.tokens[..pos].to_vec()), live.hint);
                assert!(pos <= live.seq.published_blocks() as usize * BLOCK);
                let facts = Facts {
                    born: self.now,
                    used: self.now,
                    expiry: expiry(&hint, self.now_us),
                    level: hint.retention.priority as i8,
                    tenant: hint.tenant,
                    ..Facts::default()
                };
                self.supersede(&at);
                assert!(self.states.insert(at, facts).is_none());
            }
            Err(pages) => self.cache.drop_snapshot(pages, Step(self.step)),
        }
    }

    fn release(&mut self, i: usize) {
        let live = self.live.swap_remove(i);
        if self.step <= self.done {
            let Live { seq, salt, tokens, hint, .. } = live;
            self.let_go(salt, &tokens[..seq.published_blocks() as usize * BLOCK], &hint);
            self.cache.release(seq, Step(self.step));
        } else {
            // The cache owns the sequence from here; the oracle keeps a stand-in that pins the same prefix.
            self.now += 1;
            let upto = live.seq.published_blocks() * BLOCK as u32;
            let twin = self.cache.attach(&[live.salt], &live.tokens, upto, live.hint);
            for b in blocks_of(&live.tokens[..upto as usize]) {
                use_again(self.blocks.get_mut(&(live.salt, b)).unwrap(), &live.hint, self.now, self.now_us);
            }
            let (salt, tokens, hint) = (live.salt, live.tokens.clone(), live.hint);
            self.leaving.push((self.step, Live { seq: twin, salt, tokens, computed: 0, hint }));
            self.cache.release(live.seq, Step(self.step));
        }
    }

    fn let_go(&mut self, salt: u8, published: &[u32], hint: &Hint) {
        self.now += 1;
        for b in blocks_of(published) {
            let f = self.blocks.get_mut(&(salt, b)).unwrap();
            (f.used, f.expiry) = (self.now, f.expiry.max(expiry(hint, self.now_us)));
        }
    }

    fn retire(&mut self) {
        self.done = self.step;
        self.cache.retire(Step(self.done), &[]);
        for (_, live) in &self.leaving {
            let published = live.seq.published_blocks() as usize * BLOCK;
            self.now += 1;
            for b in blocks_of(&live.tokens[..published]) {
                let f = self.blocks.get_mut(&(live.salt, b)).unwrap();
                (f.used, f.expiry) = (self.now, f.expiry.max(expiry(&live.hint, self.now_us)));
            }
        }
        for (_, live) in std::mem::take(&mut self.leaving) {
            let published = live.seq.published_blocks() as usize * BLOCK;
            self.cache.release(live.seq, Step(self.done));
            self.let_go(live.salt, &live.tokens[..published], &live.hint);
        }
    }

    /// A copy ends, whichever it is.
    fn end_copy(&mut self) {
        if !self.copies.is_empty() {
            let i = self.rng.below(self.copies.len() as u64) as usize;
            let ended = [self.copies.swap_remove(i)];
            self.tickets.end(&ended);
            self.leased.retain(|(ticket, _)| self.tickets.is_open(*ticket));
            self.cache.retire(Step(self.done), &ended);
        }
    }

    fn pin(&mut self) {
        let salt = self.rng.below(2) as u8;
        let tokens: Vec<u32> = (0..self.rng.below(14)).map(|_| u32::from(self.rng.below(4) == 0)).collect();
        let (pin, kept) = self.cache.pin(&[salt], &tokens);
        self.now += 1;
        let known = blocks_of(&tokens).take_while(|b| self.blocks.contains_key(&(salt, b.clone()))).count();
        assert_eq!(kept as usize, known * BLOCK);
        let on_it = |p: &&Prefix| p.0 == salt && tokens[..kept as usize].starts_with(&p.1);
        let states = self.states.keys().filter(on_it).cloned().collect();
        self.pins.insert(pin, ((salt, tokens[..kept as usize].to_vec()), states));
        self.check_pinned();
    }

    /// What several pins keep counts once.
    fn check_pinned(&self) {
        let blocks = self.blocks.keys().filter(|p| self.held(p)).count() as u32;
        let states = self.states.keys().filter(|p| self.keeps_state(p)).count() as u32;
        assert_eq!(self.cache.pinned_pages(), blocks + states * self.layout.snapshot_pages());
    }

    fn unpin(&mut self) {
        let pin = self.pins.keys().copied().next().unwrap_or(PinId(u64::MAX));
        assert_eq!(self.cache.unpin(pin), self.pins.remove(&pin).is_some());
        assert!(!self.cache.unpin(pin));
        self.check_pinned();
    }

    fn evict(&mut self) {
        let (n, states) = (self.rng.below(3) as u32, self.rng.below(2) == 0);
        self.follow(Some(states), |w| match states {
            true => w.cache.evict_snapshots(n),
            false => w.cache.evict_history(n),
        });
    }

    fn operate(&mut self) {
        let i = if self.live.is_empty() { 0 } else { self.rng.below(self.live.len() as u64) as usize };
        match self.rng.below(if self.live.is_empty() { 9 } else { 20 }) {
            0 | 1 if self.live.len() < 5 => self.begin(),
            2 if self.rng.below(3) == 0 => self.end_copy(),
            2 => self.step += 1,
            3 => self.retire(),
            4 => self.evict(),
            5 if self.rng.below(3) == 0 && self.pins.len() < 2 => self.pin(),
            6 if self.rng.below(2) == 0 => self.unpin(),
            7 => {
                self.now_us += self.rng.below(9000);
                self.cache.set_time(self.now_us);
                self.cache.set_time(self.now_us / 2);
            }
            8 => drop(self.cache.end_session(self.rng.below(4))),
            9..=14 if !self.live.is_empty() => self.compute(i),
            15..=17 if !self.live.is_empty() => self.save(i),
            18 | 19 if !self.live.is_empty() => self.release(i),
            _ => {}
        }
    }

    fn check(&mut self) {
        self.cache.check(self.running().map(|l| &l.seq), std::iter::empty()).unwrap();
        let (blocks, states) = self.cached();
        self.check_mirror(&blocks);
        self.compare("blocks", &blocks, &self.blocks);
        self.compare("states", &states, &self.states);
        let own = self.live.iter().flat_map(|l| &l.seq.pages()[l.seq.published_blocks() as usize..]);
        let own: BTreeSet<PageId> = own.copied().collect();
        for (ticket, pages) in &self.leased {
            assert!(
                pages.iter().all(|p| !own.contains(p)),
                "{ticket:?} reads {pages:?}, which were given away"
            );
        }
        for l in &self.live {
            for (b, &PageId(page)) in l.seq.pages().iter().enumerate().take(l.computed / BLOCK) {
                let should = Some((l.salt, l.tokens[..(b + 1) * BLOCK].to_vec()));
                assert_eq!(self.content[page as usize], should, "block {b} of a running sequence");
            }
        }
    }

    /// Who follows the changes knows what is cached, also who starts anew at any time.
    fn check_mirror(&mut self, blocks: &BTreeSet<Prefix>) {
        let changes = self.cache.take_changes();
        if self.rng.below(16) == 0 {
            self.mirror = Mirror::default();
            self.mirror.follow(self.cache.picture(), BLOCK);
        } else {
            self.mirror.follow(changes, BLOCK);
        }
        assert_eq!(&self.mirror.prefixes(), blocks);
    }

    fn compare(&self, what: &str, is: &BTreeSet<Prefix>, should: &BTreeMap<Prefix, Facts>) {
        let extra: Vec<&Prefix> = is.iter().filter(|p| !should.contains_key(*p)).collect();
        let missing: Vec<_> = should.iter().filter(|(p, _)| !is.contains(*p)).collect();
        let (eviction, now, now_us) = (self.options.eviction, self.now, self.now_us);
        assert!(
            extra.is_empty() && missing.is_empty(),
            "{eviction:?} at {now} ({now_us} us): {what} {extra:?} should have gone, {missing:?} should be there"
        );
    }

    /// Two caches loaded from a dump go on alike. If nothing was running, they evict in the oracle's order.
    fn dump_and_load(&mut self) {
        if self.rng.below(2) == 0 {
            self.retire();
            (0..self.live.len()).for_each(|_| self.release(0));
        }
        let text = serde_json::to_string(&self.cache.image()).unwrap();
        let image = serde_json::from_str(&text).unwrap();
        let load = || {
            let mut cache = KvCache::new(&self.layout, &self.options).unwrap();
            cache.fill(&image).unwrap();
            cache.check(std::iter::empty(), std::iter::empty()).unwrap();
            cache
        };
        let mut twin = load();
        self.cache = load();
        let exact = self.live.is_empty();
        self.live.clear();
        self.leaving.clear();
        self.leased.clear();
        self.copies.clear();
        self.mirror = Mirror::default();
        self.mirror.follow(self.cache.picture(), BLOCK);
        self.check();
        loop {
            let evict = |w: &mut Self| w.cache.evict_history(1);
            let gone = if exact { self.follow(Some(false), evict) } else { evict(self) };
            assert_eq!(gone, twin.evict_history(gone.max(1)));
            assert_eq!(self.cache.prefixes(), twin.prefixes());
            self.check_mirror(&self.cached().0);
            if gone == 0 {
                return;
            }
            self.cache.check(std::iter::empty(), std::iter::empty()).unwrap();
        }
    }
}

#[test]
fn behaves_like_the_oracle() {
    for_seeds(1500, |seed| {
        let mut world = World::new(seed);
        for _ in 0..150 {
            world.operate();
            world.check();
        }
        world.dump_and_load();
    });
}

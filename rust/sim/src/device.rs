//! The fake device: page pool, slabs, page tables. Runs plans in order and says what is wrong with them.

use std::collections::HashMap;
use std::rc::Rc;

use dsv4_core::plan::{ALL_LOGITS, CopyKind, DECODE, Field, Plan, REPLAY, RESET};

use crate::fake::{EMPTY, Geometry, Memory, embed, forward, sample};
use crate::oracle::Expected;

/// What uninitialised memory holds.
const GARBAGE: u64 = 0xdead_dead_dead_dead;

/// A state copied out of a slab; its parts lie in pages. At a block boundary it is a snapshot, which leaves out the open
/// entries that are empty there.
#[derive(Debug, PartialEq)]
struct Saved {
    pos: u32,
    window: Vec<Vec<u64>>,
    pools: Vec<[u64; 2]>,
}

#[derive(Clone, Debug)]
struct Page {
    rows: Vec<u64>,
    part: Option<(Rc<Saved>, usize)>,
}

#[derive(Clone, Debug)]
struct Slab {
    /// Position whose state this is.
    pos: u32,
    window: Vec<Vec<u64>>,
    pools: Vec<[u64; 2]>,
}

/// What a step touches: for the check that nothing is handed out again while the step is in flight.
#[derive(Debug)]
struct Footprint {
    step: u64,
    /// Page to the slab that reads or writes it.
    pages: HashMap<u32, u32>,
    slabs: Vec<u32>,
}

/// A request as the device's host side knows it.
#[derive(Debug)]
pub struct Known {
    /// What it must give.
    pub expected: Expected,
    /// Whose prefixes it shares.
    pub salt: Vec<u8>,
    /// It asked for all logits.
    pub all_logits: bool,
    /// It has ended; its rows may still be in flight, their results mean nothing.
    pub over: bool,
}

/// One row of a plan, decoded.
#[derive(Clone, Copy, Debug)]
struct Row {
    request: u64,
    slab: u32,
    start: u32,
    end: u32,
    flags: i32,
    replay_end: u32,
    offset: usize,
}

/// The device.
#[derive(Debug)]
pub struct Device {
    geometry: Geometry,
    vocabulary: u32,
    pages: Vec<Page>,
    slabs: Vec<Slab>,
    tables: Vec<HashMap<u32, u32>>,
    flying: Vec<Footprint>,
    sampled: Vec<u32>,
}

/// A running row's view of the memory.
struct View<'a> {
    geometry: &'a Geometry,
    pages: &'a mut [Page],
    slab: &'a mut Slab,
    table: &'a HashMap<u32, u32>,
}

impl View<'_> {
    fn place(&self, layer: usize, entry: u32) -> Option<(usize, usize)> {
        let g = self.geometry;
        let per_page = g.block / g.layers[layer].ratio;
        let page = *self.table.get(&(entry / per_page))?;
        Some((page as usize, (g.first_row[layer] + entry % per_page) as usize))
    }
}

impl Memory for View<'_> {
    fn window(&self, layer: usize, pos: u32) -> u64 {
        let ring = &self.slab.window[layer];
        ring[pos as usize % ring.len()]
    }

    fn set_window(&mut self, layer: usize, pos: u32, value: u64) {
        let ring = &mut self.slab.window[layer];
        let slot = pos as usize % ring.len();
        ring[slot] = value;
    }

    fn history(&self, layer: usize, entry: u32) -> u64 {
        self.place(layer, entry).map_or(GARBAGE, |(page, row)| self.pages[page].rows[row])
    }

    fn set_history(&mut self, layer: usize, entry: u32, value: u64) {
        if let Some((page, row)) = self.place(layer, entry) {
            self.pages[page].rows[row] = value;
            self.pages[page].part = None;
        }
    }

    fn pools(&mut self, layer: usize) -> &mut [u64; 2] {
        &mut self.slab.pools[layer]
    }
}

impl Device {
    /// A device full of garbage.
    pub fn new(geometry: Geometry, pages: u32, slabs: u32, vocabulary: u32) -> Self {
        let layers = geometry.layers.len();
        let page = Page { rows: vec![GARBAGE; geometry.first_row[layers] as usize], part: None };
        let window = vec![vec![GARBAGE; geometry.window as usize]; layers];
        let slab = Slab { pos: 0, window, pools: vec![[GARBAGE; 2]; layers] };
        Device {
            geometry,
            vocabulary,
            pages: vec![page; pages as usize],
            slabs: vec![slab; slabs as usize],
            tables: vec![HashMap::new(); slabs as usize],
            flying: Vec::new(),
            sampled: Vec::new(),
        }
    }

    /// Runs a step and returns its samples. The error says what the plan got wrong.
    pub fn run(&mut self, plan: &Plan, known: &HashMap<u64, Known>) -> Result<Vec<u32>, String> {
        self.apply_deltas(plan);
        let rows = rows_of(plan);
        self.check_conflicts(plan, &rows)?;
        self.fork(plan)?;
        self.restore(plan)?;
        let mut sampled = Vec::new();
        for (r, row) in rows.iter().enumerate() {
            let output = self.run_row(row, plan, known)?;
            match plan[Field::row_samples][r] {
                0 => {}
                1 => sampled.push(output.map_or(0, |x| sample(x, self.vocabulary))),
                n => return Err(format!("row {r} samples {n} tokens; the core plans one at most")),
            }
        }
        if sampled.len() != plan.header().samples as usize {
            return Err(format!("{} rows sample, the header says {}", sampled.len(), plan.header().samples));
        }
        self.save(plan)?;
        self.sampled.clone_from(&sampled);
        Ok(sampled)
    }

    /// A step that fails on the way: its page-table changes are there or not, what it would have written is garbage.
    pub fn crash(&mut self, plan: &Plan, with_deltas: bool) -> Result<(), String> {
        if with_deltas {
            self.apply_deltas(plan);
        }
        let rows = rows_of(plan);
        for row in &rows {
            let slab = &mut self.slabs[row.slab as usize];
            slab.window.iter_mut().flatten().for_each(|x| *x = GARBAGE);
            slab.pools = vec![[GARBAGE; 2]; slab.pools.len()];
            for block in
                (with_deltas && row.flags & REPLAY == 0).then(|| self.blocks(row)).into_iter().flatten()
            {
                if let Some(&page) = self.tables[row.slab as usize].get(&block) {
                    self.pages[page as usize].part = None;
                    let first = row.start.saturating_sub(block * self.geometry.block);
                    self.spoil(page, first);
                }
            }
        }
        for save in plan.copies(CopyKind::Save) {
            for &page in save.pages {
                self.pages[page as usize].part = None;
            }
        }
        for fork in plan.copies(CopyKind::Fork) {
            self.slabs[fork.to as usize].pools.fill([GARBAGE; 2]);
        }
        self.flying.push(self.footprint(plan, &rows));
        Ok(())
    }

    /// Garbage into the rows of a page that close at or after `offset` tokens into its block.
    fn spoil(&mut self, page: u32, offset: u32) {
        let g = &self.geometry;
        for layer in 0..g.layers.len() {
            let ratio = g.own_ratio(layer);
            let rows = g.block.checked_div(ratio).unwrap_or(0);
            for row in (0..rows).filter(|row| (row + 1) * ratio > offset) {
                self.pages[page as usize].rows[(g.first_row[layer] + row) as usize] = GARBAGE;
            }
        }
    }

    /// Steps up to `done` are over.
    pub fn retire(&mut self, done: u64) {
        self.flying.retain(|f| f.step > done);
    }

    /// Steps from `step` on will not come back.
    pub fn drop_from(&mut self, step: u64) {
        self.flying.retain(|f| f.step < step);
    }

    fn apply_deltas(&mut self, plan: &Plan) {
        for delta in plan.used(Field::page_deltas) {
            self.tables[delta[0] as usize].insert(delta[1] as u32, delta[2] as u32);
        }
    }

    /// Blocks that a row writes history into.
    fn blocks(&self, row: &Row) -> std::ops::Range<u32> {
        row.start / self.geometry.block..row.end.div_ceil(self.geometry.block)
    }

    fn footprint(&self, plan: &Plan, rows: &[Row]) -> Footprint {
        let mut pages = HashMap::new();
        for row in rows {
            let table = &self.tables[row.slab as usize];
            let covered = (0..row.end.div_ceil(self.geometry.block)).filter_map(|b| table.get(&b));
            pages.extend(covered.map(|&p| (p, row.slab)));
        }
        let (saves, forks) = (|| plan.copies(CopyKind::Save), plan.copies(CopyKind::Fork));
        let owned = saves().map(|c| (c.from, c.pages));
        for (slab, held) in owned.chain(plan.copies(CopyKind::Restore).map(|c| (c.to, c.pages))) {
            pages.extend(held.iter().map(|&p| (p as u32, slab as u32)));
        }
        let touched = forks.flat_map(|f| [f.from, f.to]).chain(saves().map(|c| c.from)).map(|s| s as u32);
        Footprint {
            step: plan.header().step,
            pages,
            slabs: rows.iter().map(|r| r.slab).chain(touched).collect(),
        }
    }

    /// Nothing that this step writes may be in use by another row or by a step in flight of another request.
    fn check_conflicts(&mut self, plan: &Plan, rows: &[Row]) -> Result<(), String> {
        let mut writes: HashMap<u32, u32> = HashMap::new();
        for row in rows.iter().filter(|r| r.flags & REPLAY == 0) {
            for block in self.blocks(row) {
                let table = &self.tables[row.slab as usize];
                let page =
                    *table.get(&block).ok_or_else(|| format!("{row:?} has no page for block {block}"))?;
                if let Some(other) = writes.insert(page, row.slab) {
                    return Err(format!("page {page} is written by slabs {other} and {}", row.slab));
                }
            }
        }
        for &page in plan.copies(CopyKind::Save).flat_map(|save| save.pages) {
            if let Some(other) = writes.insert(page as u32, u32::MAX) {
                return Err(format!("page {page} takes a snapshot and is written by slab {other}"));
            }
        }
        for fork in plan.copies(CopyKind::Fork) {
            let &[_, page] = fork.pages else { continue };
            // The copy's owner writes on in the same page.
            if writes.insert(page as u32, fork.to as u32).is_some_and(|other| other != fork.to as u32) {
                return Err(format!("page {page} is a copy and is written by another"));
            }
        }
        let own = self.footprint(plan, rows);
        for (page, &writer) in &writes {
            let clash = own.pages.get(page).filter(|&&user| writer != user && writer != u32::MAX);
            if let Some(user) = clash {
                return Err(format!("page {page} is written by slab {writer} and used by slab {user}"));
            }
            for f in &self.flying {
                if let Some(user) = f.pages.get(page).filter(|&&user| writer != user && writer != u32::MAX) {
                    return Err(format!(
                        "page {page} is written by slab {writer}; step {} in slab {user} uses it",
                        f.step
                    ));
                }
            }
        }
        let begun = plan.copies(CopyKind::Restore).chain(plan.copies(CopyKind::Fork)).map(|c| c.to as u32);
        let begun: Vec<u32> = begun.collect();
        let begins = |r: &&Row| r.flags & RESET != 0 || begun.contains(&r.slab);
        for row in rows.iter().filter(begins) {
            if let Some(f) = self.flying.iter().find(|f| f.slabs.contains(&row.slab)) {
                return Err(format!("slab {} is taken anew; step {} uses it", row.slab, f.step));
            }
        }
        self.flying.push(own);
        Ok(())
    }

    /// Slabs and open pages copied from another.
    fn fork(&mut self, plan: &Plan) -> Result<(), String> {
        for fork in plan.copies(CopyKind::Fork) {
            self.slabs[fork.to as usize] = self.slabs[fork.from as usize].clone();
            match *fork.pages {
                [from, to] => self.pages[to as usize] = self.pages[from as usize].clone(),
                [] => {}
                _ => return Err(format!("{fork:?} has other than two pages")),
            }
            if self.slabs[fork.to as usize].pos != fork.position {
                return Err(format!("{fork:?} is of a slab that is elsewhere"));
            }
        }
        Ok(())
    }

    fn restore(&mut self, plan: &Plan) -> Result<(), String> {
        for copy in plan.copies(CopyKind::Restore) {
            let (slab, pos) = (copy.to as usize, copy.position);
            let mut whole: Option<Rc<Saved>> = None;
            for (i, &page) in copy.pages.iter().enumerate() {
                let Some((saved, part)) = &self.pages[page as usize].part else {
                    return Err(format!("page {page} holds no snapshot"));
                };
                if *part != i || saved.pos != pos || whole.as_ref().is_some_and(|w| !Rc::ptr_eq(w, saved)) {
                    return Err(format!(
                        "page {page} holds part {part} of position {}, not {i} of {pos}",
                        saved.pos
                    ));
                }
                whole = Some(saved.clone());
            }
            let saved = whole.ok_or("a restore without pages")?;
            let to = &mut self.slabs[slab];
            to.pos = pos;
            for (layer, rows) in saved.window.iter().enumerate() {
                let len = to.window[layer].len();
                for (p, &row) in (pos.saturating_sub(len as u32)..pos).zip(rows) {
                    to.window[layer][p as usize % len] = row;
                }
                to.pools[layer] = saved.pools[layer];
            }
        }
        Ok(())
    }

    fn save(&mut self, plan: &Plan) -> Result<(), String> {
        for copy in plan.copies(CopyKind::Save) {
            let (slab, pos) = (&self.slabs[copy.from as usize], copy.position);
            let boundary = pos.is_multiple_of(self.geometry.block);
            let whole = if boundary { self.geometry.snapshot_pages } else { self.geometry.slab_pages };
            if slab.pos != pos || copy.pages.len() != whole as usize {
                return Err(format!("the slab is at {}: {copy:?} for {whole} pages", slab.pos));
            }
            for (layer, pools) in slab.pools.iter().enumerate() {
                let unsaved = if self.geometry.layers[layer].overlap { pools[1] } else { pools[0] };
                if boundary && self.geometry.own_ratio(layer) > 0 && unsaved != EMPTY {
                    return Err(format!(
                        "layer {layer} has an open entry at {pos}, which a snapshot does not keep"
                    ));
                }
            }
            let ring = |w: &Vec<u64>| -> Vec<u64> {
                (pos.saturating_sub(w.len() as u32)..pos).map(|p| w[p as usize % w.len()]).collect()
            };
            let window = slab.window.iter().map(ring).collect();
            let pools = slab.pools.iter().map(|p| if boundary { [p[0], EMPTY] } else { *p }).collect();
            let saved = Rc::new(Saved { pos, window, pools });
            for (i, &page) in copy.pages.iter().enumerate() {
                let page = &mut self.pages[page as usize];
                page.rows.fill(GARBAGE);
                page.part = Some((saved.clone(), i));
            }
        }
        Ok(())
    }

    fn run_row(
        &mut self,
        row: &Row,
        plan: &Plan,
        known: &HashMap<u64, Known>,
    ) -> Result<Option<u64>, String> {
        let request = known.get(&row.request).ok_or_else(|| format!("{row:?} is of nobody"))?;
        let g = &self.geometry;
        let slab = &mut self.slabs[row.slab as usize];
        if row.flags & RESET != 0 {
            slab.pos = row.start;
            slab.pools = vec![[EMPTY; 2]; g.layers.len()];
        }
        if slab.pos != row.start {
            return Err(format!("{row:?}: the slab is at {}", slab.pos));
        }
        let wants_all = request.all_logits && row.start < request.expected.prompt;
        if wants_all != (row.flags & ALL_LOGITS != 0) || (wants_all && row.replay_end > 0) {
            return Err(format!("{row:?}: all logits were asked for: {}", request.all_logits));
        }
        if row.flags & DECODE != 0 && row.end - row.start != 1 {
            return Err(format!("{row:?} is in decode and has more than one token"));
        }
        let mut view =
            View { geometry: g, pages: &mut self.pages, slab, table: &self.tables[row.slab as usize] };
        let mut last = None;
        for pos in row.start..row.end {
            let at = row.offset + (pos - row.start) as usize;
            let id = plan[Field::token_ids][at];
            let token = if id < 0 { self.sampled[(-1 - id) as usize] } else { id as u32 };
            if plan[Field::positions][at] != pos as i32 {
                return Err(format!("{row:?}: position {} at {pos}", plan[Field::positions][at]));
            }
            let output = forward(g, &mut view, embed(token, &request.salt), pos, row.replay_end);
            if !request.over && pos >= row.replay_end {
                agree(&request.expected, pos, token, output).map_err(|e| format!("{row:?}: {e}"))?;
            }
            last = Some(output);
        }
        view.slab.pos = row.end;
        Ok(last)
    }
}

/// Compares a computed position with the cold run.
fn agree(expected: &Expected, pos: u32, token: u32, output: u64) -> Result<(), String> {
    match (expected.tokens.get(pos as usize), expected.outputs.get(pos as usize)) {
        (Some(&t), _) if t != token => Err(format!("token {token} at {pos}, the cold run has {t}")),
        (_, Some(&o)) if o != output => Err(format!("the output at {pos} is not that of the cold run")),
        // Beyond the end of the cold run: a row planned before its request was known to end.
        _ => Ok(()),
    }
}

fn rows_of(plan: &Plan) -> Vec<Row> {
    let mut offset = 0;
    (0..plan.header().rows as usize)
        .map(|r| {
            let (start, len) = (plan[Field::row_start][r] as u32, plan[Field::row_len][r] as u32);
            offset += len as usize;
            Row {
                request: plan.long(Field::row_req, r),
                slab: plan[Field::row_slab][r] as u32,
                start,
                end: start + len,
                flags: plan[Field::row_flags][r],
                replay_end: plan[Field::row_replay_end][r] as u32,
                offset: offset - len as usize,
            }
        })
        .collect()
}

//! The arrays of a step. They belong to the caller; the core writes into them and keeps nothing.

use crate::error::CoreError;
use crate::ids::{PageId, RequestId, SlabId, Step};
use crate::mutant::{self, Mutant};

/// The state starts empty: clear the slab's pools before the row runs.
pub const RESET: i32 = 1;
/// The row's last token is sampled.
pub const SAMPLE: i32 = 2;
/// Logits of every token of the row are wanted.
pub const ALL_LOGITS: i32 = 4;
/// The row rebuilds state and writes no history.
pub const REPLAY: i32 = 8;
/// One token after the prompt.
pub const DECODE: i32 = 16;

/// Borrowed arrays of one step. R = slabs, T = step tokens, S = pages of a state.
#[derive(Debug)]
pub struct PlanBuffers<'a> {
    /// \[T\] input ids; `-(1 + i)` stands for sample `i` of the step before.
    pub token_ids: &'a mut [i32],
    /// \[T\] positions.
    pub positions: &'a mut [i32],
    /// \[R\] the request of each row.
    pub row_req: &'a mut [i64],
    /// \[R\] its slab.
    pub row_slab: &'a mut [i32],
    /// \[R\] its first position.
    pub row_start: &'a mut [i32],
    /// \[R\] its tokens.
    pub row_len: &'a mut [i32],
    /// \[R\] bits, see the constants of this module.
    pub row_flags: &'a mut [i32],
    /// \[R\] end of the replay, 0 without one.
    pub row_replay_end: &'a mut [i32],
    /// \[R\] rows that are sampled, in the order of `commit`'s tokens.
    pub sample_rows: &'a mut [i32],
    /// \[D, 3\] page table changes (slab, block, page), applied in order before the forward.
    pub page_deltas: &'a mut [i32],
    /// \[R, 2 + S\] copies out of slabs after the forward (slab, position, pages…, -1…). The state at a block boundary is a
    /// snapshot; at any other position it is the whole slab.
    pub saves: &'a mut [i32],
    /// \[R, 2 + S\] copies into slabs before the forward (slab, position, pages…, -1…).
    pub restores: &'a mut [i32],
    /// \[R, 4\] copies of one slab and the page that is not full yet (from slab, to slab, from page, to page; pages -1
    /// where there is none), before restores and the forward.
    pub forks: &'a mut [i32],
}

/// Least lengths of the arrays.
#[derive(Clone, Copy, Debug)]
pub struct PlanShape {
    /// Rows: slabs.
    pub rows: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Page table changes of a step: one request of the greatest length, and four per slab.
    pub deltas: usize,
    /// Pages of the larger kind of saved state.
    pub copy_pages: usize,
}

impl PlanBuffers<'_> {
    /// Refuses arrays that are too short, by name.
    pub fn check(&self, shape: &PlanShape) -> Result<(), CoreError> {
        let (rows, copies) = (shape.rows, shape.rows * (2 + shape.copy_pages));
        let lengths = [
            ("token_ids", self.token_ids.len(), shape.tokens),
            ("positions", self.positions.len(), shape.tokens),
            ("row_req", self.row_req.len(), rows),
            ("row_slab", self.row_slab.len(), rows),
            ("row_start", self.row_start.len(), rows),
            ("row_len", self.row_len.len(), rows),
            ("row_flags", self.row_flags.len(), rows),
            ("row_replay_end", self.row_replay_end.len(), rows),
            ("sample_rows", self.sample_rows.len(), rows),
            ("page_deltas", self.page_deltas.len(), 3 * shape.deltas),
            ("saves", self.saves.len(), copies),
            ("restores", self.restores.len(), copies),
            ("forks", self.forks.len(), 4 * rows),
        ];
        match lengths.into_iter().find(|(_, len, least)| len < least) {
            Some((name, len, least)) => {
                Err(CoreError::config(name, format!("{len} elements"), format!("it needs at least {least}")))
            }
            None => Ok(()),
        }
    }
}

/// The scalars of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StepHeader {
    /// Its number.
    pub step: u64,
    /// Rows.
    pub rows: u32,
    /// Tokens of all rows.
    pub tokens: u32,
    /// Rows that are sampled.
    pub samples: u32,
    /// Page table changes.
    pub deltas: u32,
    /// States to save.
    pub saves: u32,
    /// States to restore.
    pub restores: u32,
    /// Slabs copied from another.
    pub forks: u32,
    /// Rows in decode; they come first.
    pub decode_rows: u32,
    /// Tokens that are replayed.
    pub replay_tokens: u32,
}

/// A row as the scheduler decides it.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Whose.
    pub request: RequestId,
    /// Where its state lives.
    pub slab: SlabId,
    /// First position.
    pub start: u32,
    /// One past the last position.
    pub end: u32,
    /// Bits.
    pub flags: i32,
    /// End of the replay, 0 without one.
    pub replay_end: u32,
}

/// Fills the arrays of one step.
#[derive(Debug)]
pub struct PlanWriter<'a, 'b> {
    out: &'a mut PlanBuffers<'b>,
    shape: PlanShape,
    header: StepHeader,
}

impl<'a, 'b> PlanWriter<'a, 'b> {
    /// An empty step. The arrays must have passed [`PlanBuffers::check`].
    pub fn new(out: &'a mut PlanBuffers<'b>, shape: PlanShape, step: Step) -> Self {
        PlanWriter { out, shape, header: StepHeader { step: step.0, ..StepHeader::default() } }
    }

    /// What is in it so far.
    pub fn header(&self) -> StepHeader {
        self.header
    }

    /// Tokens that still fit; none when all rows are taken.
    pub fn room(&self) -> u32 {
        if self.header.rows as usize == self.shape.rows {
            0
        } else {
            self.shape.tokens as u32 - self.header.tokens
        }
    }

    /// Page table changes that still fit.
    pub fn delta_room(&self) -> u32 {
        (self.out.page_deltas.len() / 3) as u32 - self.header.deltas
    }

    /// A page table change.
    pub fn delta(&mut self, slab: SlabId, block: u32, page: PageId) {
        let at = 3 * self.header.deltas as usize;
        self.out.page_deltas[at..at + 3].copy_from_slice(&[slab.0 as i32, block as i32, page.0 as i32]);
        self.header.deltas += 1;
    }

    /// A state to save after the forward.
    pub fn save(&mut self, slab: SlabId, pos: u32, pages: &[PageId]) {
        write_copy(self.out.saves, self.header.saves, self.shape.copy_pages, slab, pos, pages);
        self.header.saves += 1;
    }

    /// A state to restore before the forward.
    pub fn restore(&mut self, slab: SlabId, pos: u32, pages: &[PageId]) {
        if mutant::on(Mutant::HitWithoutState) {
            return;
        }
        write_copy(self.out.restores, self.header.restores, self.shape.copy_pages, slab, pos, pages);
        self.header.restores += 1;
    }

    /// Whether one more slab can be copied.
    pub fn fork_room(&self) -> bool {
        (self.header.forks as usize) < self.shape.rows
    }

    /// A slab to copy from another before the forward, and a page with it.
    pub fn fork(&mut self, from: SlabId, to: SlabId, pages: Option<(PageId, PageId)>) {
        let at = 4 * self.header.forks as usize;
        let (from_page, to_page) = pages.map_or((-1, -1), |(a, b)| (a.0 as i32, b.0 as i32));
        self.out.forks[at..at + 4].copy_from_slice(&[from.0 as i32, to.0 as i32, from_page, to_page]);
        self.header.forks += 1;
    }

    /// A row of known tokens, which are `tokens`. Returns its index among the samples when it is sampled.
    pub fn row(&mut self, row: Row, tokens: &[u32]) -> u32 {
        let at = self.header.tokens as usize;
        for (to, &token) in self.out.token_ids[at..].iter_mut().zip(tokens) {
            *to = token as i32;
        }
        self.put(row)
    }

    /// A row in decode: one token, which is sampled. `token` is its id, or `-1 - i` for sample `i` of the step before.
    pub fn decode_row(&mut self, row: Row, token: i32) -> u32 {
        let (out, h) = (&mut *self.out, &mut self.header);
        let (r, at, sample) = (h.rows as usize, h.tokens as usize, h.samples as usize);
        (out.token_ids[at], out.positions[at]) = (token, row.start as i32);
        out.row_req[r] = row.request.0 as i64;
        out.row_slab[r] = row.slab.0 as i32;
        out.row_start[r] = row.start as i32;
        out.row_len[r] = 1;
        out.row_flags[r] = row.flags;
        out.row_replay_end[r] = 0;
        out.sample_rows[sample] = r as i32;
        h.rows += 1;
        h.tokens += 1;
        h.decode_rows += 1;
        h.samples += 1;
        sample as u32
    }

    fn put(&mut self, row: Row) -> u32 {
        let h = &mut self.header;
        let (r, at, len) = (h.rows as usize, h.tokens as usize, row.end - row.start);
        for (to, pos) in self.out.positions[at..at + len as usize].iter_mut().zip(row.start as i32..) {
            *to = pos;
        }
        self.out.row_req[r] = row.request.0 as i64;
        self.out.row_slab[r] = row.slab.0 as i32;
        self.out.row_start[r] = row.start as i32;
        self.out.row_len[r] = len as i32;
        self.out.row_flags[r] = row.flags;
        self.out.row_replay_end[r] = row.replay_end as i32;
        h.rows += 1;
        h.tokens += len;
        h.decode_rows += u32::from(row.flags & DECODE != 0);
        h.replay_tokens += if row.flags & REPLAY != 0 { len } else { 0 };
        let sample = h.samples;
        if row.flags & SAMPLE != 0 {
            self.out.sample_rows[sample as usize] = r as i32;
            h.samples += 1;
        }
        sample
    }
}

fn write_copy(list: &mut [i32], index: u32, most: usize, slab: SlabId, pos: u32, pages: &[PageId]) {
    let width = 2 + most;
    let row = &mut list[index as usize * width..][..width];
    (row[0], row[1]) = (slab.0 as i32, pos as i32);
    row[2..].fill(-1);
    row[2..].iter_mut().zip(pages).for_each(|(to, page)| *to = page.0 as i32);
}

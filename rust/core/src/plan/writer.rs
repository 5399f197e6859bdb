//! Fills a buffer with one step.

use super::buffer::Views;
use super::schema::{Field, Limits, Schema, StepHeader, in_words};
use super::{CopyKind, DECODE, REPLAY};
use crate::error::CoreError;
use crate::ids::{PageId, RequestId, SlabId, Step, Ticket};

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
    /// Tokens to sample.
    pub samples: u32,
}

/// Fills the buffer of one step.
#[derive(Debug)]
pub struct PlanWriter<'a> {
    out: Views<'a>,
    limits: Limits,
    header: StepHeader,
}

impl<'a> PlanWriter<'a> {
    /// An empty step. Refuses a buffer that is too short.
    pub fn new(schema: &Schema, words: &'a mut [i32], step: Step) -> Result<Self, CoreError> {
        let header = StepHeader { step: step.0, ..StepHeader::default() };
        Ok(PlanWriter { out: Views::new(schema, words)?, limits: *schema.limits(), header })
    }

    /// Writes the header: the plan is complete.
    pub fn finish(self) -> StepHeader {
        self.header.write(self.out.header);
        self.header
    }

    /// What is in it so far.
    pub fn header(&self) -> StepHeader {
        self.header
    }

    /// Tokens that still fit; none when all rows are taken.
    pub fn room(&self) -> u32 {
        if self.header.rows as usize == self.limits.rows {
            0
        } else {
            self.limits.tokens as u32 - self.header.tokens
        }
    }

    /// Page table changes that still fit.
    pub fn delta_room(&self) -> u32 {
        self.limits.deltas as u32 - self.header.deltas
    }

    /// A page table change.
    pub fn delta(&mut self, slab: SlabId, block: u32, page: PageId) {
        let at = 3 * self.header.deltas as usize;
        self.out[Field::page_deltas][at..at + 3].copy_from_slice(&[
            slab.0 as i32,
            block as i32,
            page.0 as i32,
        ]);
        self.header.deltas += 1;
    }

    /// A state to save after the forward.
    pub fn save(&mut self, slab: SlabId, pos: u32, pages: &[PageId], ticket: Ticket) {
        self.copy(CopyKind::Save, [Some(slab), None], pos, pages, ticket);
    }

    /// A state to restore before the forward.
    pub fn restore(&mut self, slab: SlabId, pos: u32, pages: &[PageId], ticket: Ticket) {
        self.copy(CopyKind::Restore, [None, Some(slab)], pos, pages, ticket);
    }

    /// A slab to copy from another before the forward, at this position, and a page with it: from one, to the other.
    pub fn fork(&mut self, from: SlabId, to: SlabId, pos: u32, pages: &[PageId], ticket: Ticket) {
        self.copy(CopyKind::Fork, [Some(from), Some(to)], pos, pages, ticket);
    }

    fn copy(
        &mut self,
        kind: CopyKind,
        slabs: [Option<SlabId>; 2],
        pos: u32,
        pages: &[PageId],
        ticket: Ticket,
    ) {
        let (out, at) = (&mut self.out, self.header.copies as usize);
        let [from, to] = slabs.map(|slab| slab.map_or(-1, |s| s.0 as i32));
        out[Field::copy_ticket].as_chunks_mut().0[at] = in_words(ticket.0);
        out[Field::copy_kind][at] = kind as i32;
        out[Field::copy_from][at] = from;
        out[Field::copy_to][at] = to;
        out[Field::copy_position][at] = pos as i32;
        let most = self.limits.copy_pages;
        let list = &mut out[Field::copy_pages][at * most..][..most];
        list.fill(-1);
        list.iter_mut().zip(pages).for_each(|(to, page)| *to = page.0 as i32);
        self.header.copies += 1;
    }

    /// A row of known tokens, which are `tokens`. Returns its index among the samples when it is sampled.
    pub fn row(&mut self, row: Row, tokens: &[u32]) -> u32 {
        let at = self.header.tokens as usize;
        for (to, &token) in self.out[Field::token_ids][at..].iter_mut().zip(tokens) {
            *to = token as i32;
        }
        self.put(row)
    }

    /// A row in decode: one token, which is sampled. `token` is its id, or `-1 - i` for sample `i` of the step before.
    #[inline]
    pub fn decode_row(&mut self, row: Row, token: i32) -> u32 {
        let (out, h) = (&mut self.out, &mut self.header);
        let (r, at, sample) = (h.rows as usize, h.tokens as usize, h.samples);
        out[Field::token_ids][at] = token;
        out[Field::positions][at] = row.start as i32;
        out[Field::row_req].as_chunks_mut().0[r] = in_words(row.request.0);
        out[Field::row_slab][r] = row.slab.0 as i32;
        out[Field::row_start][r] = row.start as i32;
        out[Field::row_len][r] = 1;
        out[Field::row_flags][r] = row.flags;
        out[Field::row_replay_end][r] = 0;
        out[Field::row_samples][r] = 1;
        h.rows += 1;
        h.tokens += 1;
        h.decode_rows += 1;
        h.samples += 1;
        h.sampled_rows += 1;
        sample
    }

    fn put(&mut self, row: Row) -> u32 {
        let h = &mut self.header;
        let (r, at, len) = (h.rows as usize, h.tokens as usize, row.end - row.start);
        for (to, pos) in self.out[Field::positions][at..at + len as usize].iter_mut().zip(row.start as i32..)
        {
            *to = pos;
        }
        self.out[Field::row_req].as_chunks_mut().0[r] = in_words(row.request.0);
        self.out[Field::row_slab][r] = row.slab.0 as i32;
        self.out[Field::row_start][r] = row.start as i32;
        self.out[Field::row_len][r] = len as i32;
        self.out[Field::row_flags][r] = row.flags;
        self.out[Field::row_samples][r] = row.samples as i32;
        self.out[Field::row_replay_end][r] = row.replay_end as i32;
        h.rows += 1;
        h.tokens += len;
        h.decode_rows += u32::from(row.flags & DECODE != 0);
        h.replay_tokens += if row.flags & REPLAY != 0 { len } else { 0 };
        let sample = h.samples;
        h.samples += row.samples;
        h.sampled_rows += u32::from(row.samples > 0);
        sample
    }
}

//! The plan's arrays, as Python would allocate them.

use dsv4_core::plan::{PlanBuffers, PlanShape};

/// Owned arrays of one step.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "named and described in dsv4_core::plan::PlanBuffers")]
pub struct Arrays {
    pub token_ids: Vec<i32>,
    pub positions: Vec<i32>,
    pub row_req: Vec<i64>,
    pub row_slab: Vec<i32>,
    pub row_start: Vec<i32>,
    pub row_len: Vec<i32>,
    pub row_flags: Vec<i32>,
    pub row_replay_end: Vec<i32>,
    pub sample_rows: Vec<i32>,
    pub page_deltas: Vec<i32>,
    pub saves: Vec<i32>,
    pub restores: Vec<i32>,
    pub forks: Vec<i32>,
    /// Elements of a row of `saves` and `restores`.
    pub copy_width: usize,
}

impl Arrays {
    /// The smallest arrays that do.
    pub fn new(shape: &PlanShape) -> Self {
        let (rows, tokens, copy_width) = (shape.rows, shape.tokens, 2 + shape.copy_pages);
        Arrays {
            token_ids: vec![0; tokens],
            positions: vec![0; tokens],
            row_req: vec![0; rows],
            row_slab: vec![0; rows],
            row_start: vec![0; rows],
            row_len: vec![0; rows],
            row_flags: vec![0; rows],
            row_replay_end: vec![0; rows],
            sample_rows: vec![0; rows],
            page_deltas: vec![0; 3 * shape.deltas],
            saves: vec![0; rows * copy_width],
            restores: vec![0; rows * copy_width],
            forks: vec![0; rows * 4],
            copy_width,
        }
    }

    /// Borrowed for `Core::plan`.
    pub fn buffers(&mut self) -> PlanBuffers<'_> {
        PlanBuffers {
            token_ids: &mut self.token_ids,
            positions: &mut self.positions,
            row_req: &mut self.row_req,
            row_slab: &mut self.row_slab,
            row_start: &mut self.row_start,
            row_len: &mut self.row_len,
            row_flags: &mut self.row_flags,
            row_replay_end: &mut self.row_replay_end,
            sample_rows: &mut self.sample_rows,
            page_deltas: &mut self.page_deltas,
            saves: &mut self.saves,
            restores: &mut self.restores,
            forks: &mut self.forks,
        }
    }
}

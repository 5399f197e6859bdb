//! A buffer seen by field.

use std::ops::{Index, IndexMut};

use super::schema::{Field, Schema, StepHeader, of_words};
use crate::error::CoreError;

/// A buffer cut into its fields, for writing.
#[derive(Debug)]
pub struct Views<'a> {
    /// The header's words.
    pub header: &'a mut [i32],
    fields: [&'a mut [i32]; Field::COUNT],
}

impl<'a> Views<'a> {
    /// Cuts a buffer. Refuses one that is too short.
    pub fn new(schema: &Schema, words: &'a mut [i32]) -> Result<Self, CoreError> {
        let least = schema.words();
        if words.len() < least {
            let (is, needs) = (format!("{} words", words.len()), format!("it needs at least {least}"));
            return Err(CoreError::config("plan", is, needs));
        }
        let (header, mut rest) = words.split_at_mut(schema.offset(Field::ALL[0]));
        let mut at = header.len();
        let fields = std::array::from_fn(|i| {
            let field = Field::ALL[i];
            let (_, from) = std::mem::take(&mut rest).split_at_mut(schema.offset(field) - at);
            let (own, behind) = from.split_at_mut(schema.len(field));
            (at, rest) = (schema.offset(field) + own.len(), behind);
            own
        });
        Ok(Views { header, fields })
    }
}

impl Index<Field> for Views<'_> {
    type Output = [i32];

    #[inline]
    fn index(&self, field: Field) -> &[i32] {
        self.fields[field as usize]
    }
}

impl IndexMut<Field> for Views<'_> {
    #[inline]
    fn index_mut(&mut self, field: Field) -> &mut [i32] {
        self.fields[field as usize]
    }
}

/// A buffer of its own with its schema: for callers in Rust. Indexed by field it gives the whole column, unused elements
/// included; their number is in the header.
#[derive(Clone, Debug)]
pub struct Plan {
    schema: Schema,
    words: Vec<i32>,
}

impl Plan {
    /// A buffer of zeros.
    pub fn new(schema: &Schema) -> Self {
        Plan { schema: schema.clone(), words: vec![0; schema.words()] }
    }

    /// For `Core::plan`.
    pub fn words(&mut self) -> &mut [i32] {
        &mut self.words
    }

    /// The scalars of the step.
    pub fn header(&self) -> StepHeader {
        StepHeader::read(&self.words)
    }

    /// A number of two words.
    pub fn long(&self, field: Field, at: usize) -> u64 {
        of_words(self[field].as_chunks().0[at])
    }

    /// The elements of a field that the step uses, each a slice of its words.
    pub fn used(&self, field: Field) -> impl Iterator<Item = &[i32]> {
        let used = self.header().used(field) as usize;
        self[field].chunks_exact(self.schema.element_words(field)).take(used)
    }
}

/// One copy of a plan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StateCopy<'a> {
    /// One of [`CopyKind`](super::CopyKind).
    pub kind: i32,
    /// The slab that is copied, or -1.
    pub from: i32,
    /// The slab that is written, or -1.
    pub to: i32,
    /// Its name.
    pub ticket: u64,
    /// Position of the state.
    pub position: u32,
    /// Without the padding.
    pub pages: &'a [i32],
}

impl Plan {
    /// The copies of one kind, in order.
    pub fn copies(&self, kind: super::CopyKind) -> impl Iterator<Item = StateCopy<'_>> {
        let all = self.used(Field::copy_pages).enumerate().map(|(i, pages)| StateCopy {
            kind: self[Field::copy_kind][i],
            from: self[Field::copy_from][i],
            to: self[Field::copy_to][i],
            ticket: self.long(Field::copy_ticket, i),
            position: self[Field::copy_position][i] as u32,
            pages: &pages[..pages.iter().position(|&p| p < 0).unwrap_or(pages.len())],
        });
        all.filter(move |copy| copy.kind == kind as i32)
    }
}

impl Index<Field> for Plan {
    type Output = [i32];

    fn index(&self, field: Field) -> &[i32] {
        &self.words[self.schema.offset(field)..][..self.schema.len(field)]
    }
}

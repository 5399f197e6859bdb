//! Every field of a plan, declared once.
//!
//! A new field is a line here, the line of `writer.rs` that sets it, and whoever reads it: Rust by `plan[Field::name]`,
//! Python by `plan.name`, the planner counts its bytes by itself.

use serde::Serialize;

use crate::layout::LayoutSpec;
use crate::options::Options;

/// Each field starts at a multiple of so many words: a cache line, and whatever a device likes to load at once.
const ALIGN: usize = 16;

/// A part of a plan. All its fields have as many elements, of which the header's number of the same name is used.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Section {
    /// Numbers, one each.
    Header,
    /// By row: a request's tokens of the step.
    Rows,
    /// By token of all rows.
    Tokens,
    /// By change of a page table.
    Deltas,
    /// By copy between slabs and pages.
    Copies,
}

/// What bounds the sections.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Rows: slabs.
    pub rows: usize,
    /// Tokens of a step.
    pub tokens: usize,
    /// Page table changes of a step: one request of the greatest length, and four per slab.
    pub deltas: usize,
    /// Copies of a step: each slab is forked or restored and saved at most once.
    pub copies: usize,
    /// Pages of a copy: those of the larger kind of saved state, or the two of a fork.
    pub copy_pages: usize,
}

impl Limits {
    /// Those of a core. Only `slabs`, `max_step_tokens` and `max_len` count.
    pub fn new(layout: &LayoutSpec, options: &Options) -> Self {
        let (slabs, blocks) = (options.slabs as usize, options.max_len.div_ceil(layout.block_tokens));
        Limits {
            rows: slabs,
            tokens: options.max_step_tokens as usize,
            deltas: blocks as usize + 4 * slabs,
            copies: 2 * slabs,
            copy_pages: layout.copy_pages().max(2) as usize,
        }
    }

    fn elements(&self, section: Section) -> usize {
        match section {
            Section::Header => 1,
            Section::Tokens => self.tokens,
            Section::Deltas => self.deltas,
            Section::Copies => self.copies,
            Section::Rows => self.rows,
        }
    }
}

/// Numbers of an element.
#[derive(Clone, Copy)]
enum Width {
    Fixed(usize),
    CopyPages,
}

/// An element's numbers in 32-bit words.
trait Number: Sized {
    const DTYPE: &str;
    const WORDS: usize;
    fn read(words: &[i32]) -> Self;
    fn write(self, words: &mut [i32]);
}

impl Number for i32 {
    const DTYPE: &str = "int32";
    const WORDS: usize = 1;

    fn read(words: &[i32]) -> Self {
        words[0]
    }

    fn write(self, words: &mut [i32]) {
        words[0] = self;
    }
}

impl Number for u32 {
    const DTYPE: &str = "int32";
    const WORDS: usize = 1;

    fn read(words: &[i32]) -> Self {
        words[0] as u32
    }

    fn write(self, words: &mut [i32]) {
        words[0] = self as i32;
    }
}

impl Number for u64 {
    const DTYPE: &str = "int64";
    const WORDS: usize = 2;

    fn read(words: &[i32]) -> Self {
        of_words([words[0], words[1]])
    }

    fn write(self, words: &mut [i32]) {
        [words[0], words[1]] = in_words(self);
    }
}

/// A number as two words.
pub(super) fn in_words(value: u64) -> [i32; 2] {
    [value as i32, (value >> 32) as i32]
}

/// The number of two words.
pub(super) fn of_words([low, high]: [i32; 2]) -> u64 {
    u64::from(low as u32) | u64::from(high as u32) << 32
}

macro_rules! plan {
    (
        header { $($(#[$head_doc:meta])* $head:ident: $head_type:ty,)* }
        $($(#[$doc:meta])* $field:ident: $section:ident, $type:ty, $width:expr;)*
    ) => {
        /// The scalars of a step, as the header holds them.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct StepHeader {
            $($(#[$head_doc])* pub $head: $head_type,)*
        }

        impl StepHeader {
            /// Names, dtypes and words.
            const NUMBERS: &[(&str, &str, usize)] =
                &[$((stringify!($head), <$head_type as Number>::DTYPE, <$head_type as Number>::WORDS),)*];

            /// Takes it from the start of a buffer.
            pub fn read(words: &[i32]) -> Self {
                let mut at = 0;
                $(
                    at = at_next(at, <$head_type as Number>::WORDS);
                    let $head = Number::read(&words[at..]);
                    at += <$head_type as Number>::WORDS;
                )*
                debug_assert!(at <= words.len());
                StepHeader { $($head),* }
            }

            /// Puts it at the start of a buffer.
            pub fn write(&self, words: &mut [i32]) {
                let mut at = 0;
                $(
                    at = at_next(at, <$head_type as Number>::WORDS);
                    self.$head.write(&mut words[at..]);
                    at += <$head_type as Number>::WORDS;
                )*
                debug_assert!(at <= words.len());
            }
        }

        /// A column of a section. Its name is what Python calls it, too.
        #[expect(non_camel_case_types, reason = "one name in both languages")]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        pub enum Field {
            $($(#[$doc])* $field,)*
        }

        impl Field {
            /// All of them, in the order in which they lie in a buffer.
            pub const ALL: &[Field] = &[$(Field::$field),*];
            pub(super) const COUNT: usize = Self::ALL.len();

            const fn told(self) -> (&'static str, Section, &'static str, usize, Width) {
                match self {
                    $(Field::$field => (
                        stringify!($field),
                        Section::$section,
                        <$type as Number>::DTYPE,
                        <$type as Number>::WORDS,
                        $width,
                    ),)*
                }
            }
        }
    };
}

plan! {
    header {
        /// Its number, from 1.
        step: u64,
        /// Rows; those in decode come first. A step may have none and only copy states.
        rows: u32,
        /// Tokens of all rows.
        tokens: u32,
        /// Rows that sample: `commit` wants as many counts of accepted tokens.
        sampled_rows: u32,
        /// Tokens that they sample: `commit` wants as many.
        samples: u32,
        /// Page table changes.
        deltas: u32,
        /// Copies between slabs and pages.
        copies: u32,
        /// Rows in decode: one token after the prompt.
        decode_rows: u32,
        /// Tokens that only rebuild state.
        replay_tokens: u32,
    }
    /// The request of each row.
    row_req: Rows, u64, Width::Fixed(1);
    /// Its slab.
    row_slab: Rows, i32, Width::Fixed(1);
    /// Its first position.
    row_start: Rows, i32, Width::Fixed(1);
    /// Its tokens.
    row_len: Rows, i32, Width::Fixed(1);
    /// Bits, see the constants of [`crate::plan`].
    row_flags: Rows, i32, Width::Fixed(1);
    /// Tokens to sample at its end, in the order of rows: the last one of them after its last token. None or one.
    row_samples: Rows, i32, Width::Fixed(1);
    /// End of the replay, 0 without one. Positions below write no history.
    row_replay_end: Rows, i32, Width::Fixed(1);
    /// Input ids; `-(1 + i)` stands for sample `i` of the step before.
    token_ids: Tokens, i32, Width::Fixed(1);
    /// Positions.
    positions: Tokens, i32, Width::Fixed(1);
    /// Slab, block, page: applied in order before the forward.
    page_deltas: Deltas, i32, Width::Fixed(3);
    /// The copy's name. Until it has ended nothing that it touches is given to others; today it ends with its step.
    copy_ticket: Copies, u64, Width::Fixed(1);
    /// What is copied, see [`CopyKind`](super::CopyKind). Forks and restores come before the forward, saves after it.
    copy_kind: Copies, i32, Width::Fixed(1);
    /// The slab that is copied, -1 in a restore.
    copy_from: Copies, i32, Width::Fixed(1);
    /// The slab that is written, -1 in a save.
    copy_to: Copies, i32, Width::Fixed(1);
    /// Position of the state. At a block boundary a saved state is a snapshot; anywhere else it is the whole slab.
    copy_position: Copies, i32, Width::Fixed(1);
    /// The pages that a state is saved to or restored from, in order, then -1. Of a fork: the page that is not full yet and the
    /// one that it is copied to, or -1 where there is none.
    copy_pages: Copies, i32, Width::CopyPages;
}

impl StepHeader {
    /// Elements of a field that the step uses.
    pub fn used(&self, field: Field) -> u32 {
        match field.told().1 {
            Section::Header => 1,
            Section::Rows => self.rows,
            Section::Tokens => self.tokens,
            Section::Deltas => self.deltas,
            Section::Copies => self.copies,
        }
    }
}

/// The first word from `at` on where a number of so many words is aligned.
fn at_next(at: usize, words: usize) -> usize {
    at.next_multiple_of(words)
}

/// Where a field lies: for whoever reads a plan elsewhere.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct FieldPlace {
    /// Its name.
    pub name: &'static str,
    /// Its section.
    pub section: Section,
    /// `int32`, or `int64`: two words, the low one first.
    pub dtype: &'static str,
    /// Its first word.
    pub offset: usize,
    /// Of the whole column in numbers; none for a number of the header.
    pub shape: Vec<usize>,
}

/// The fields' places in a buffer, for some limits.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Schema {
    limits: Limits,
    /// First word of each field.
    offsets: [usize; Field::COUNT],
    words: usize,
}

impl Schema {
    /// Lays the fields out one after the other.
    pub fn new(limits: Limits) -> Self {
        let header = StepHeader::NUMBERS.iter().fold(0, |at, &(_, _, words)| at_next(at, words) + words);
        let mut schema = Schema { limits, offsets: [0; Field::COUNT], words: header };
        for &field in Field::ALL {
            schema.offsets[field as usize] = schema.words.next_multiple_of(ALIGN);
            schema.words = schema.offsets[field as usize] + schema.len(field);
        }
        schema
    }

    /// Words of a buffer.
    pub fn words(&self) -> usize {
        self.words
    }

    /// What bounds the sections.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Words of an element of a field.
    pub(super) fn element_words(&self, field: Field) -> usize {
        self.width(field) * field.told().3
    }

    /// Numbers of an element of a field.
    fn width(&self, field: Field) -> usize {
        match field.told().4 {
            Width::Fixed(n) => n,
            Width::CopyPages => self.limits.copy_pages,
        }
    }

    /// First word of a field.
    pub(super) fn offset(&self, field: Field) -> usize {
        self.offsets[field as usize]
    }

    /// Words of a field.
    pub(super) fn len(&self, field: Field) -> usize {
        self.limits.elements(field.told().1) * self.element_words(field)
    }

    /// Every field's place, those of the header first.
    pub fn fields(&self) -> Vec<FieldPlace> {
        let mut at = 0;
        let header = StepHeader::NUMBERS.iter().map(|&(name, dtype, words)| {
            let offset = at_next(at, words);
            at = offset + words;
            FieldPlace { name, section: Section::Header, dtype, offset, shape: Vec::new() }
        });
        let columns = Field::ALL.iter().map(|&field| {
            let (name, section, dtype, ..) = field.told();
            let (elements, width) = (self.limits.elements(section), self.width(field));
            let shape = if width == 1 { vec![elements] } else { vec![elements, width] };
            FieldPlace { name, section, dtype, offset: self.offset(field), shape }
        });
        header.chain(columns).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits { rows: 3, tokens: 50, deltas: 20, copies: 6, copy_pages: 2 };

    #[test]
    fn a_header_comes_back_from_its_words_where_the_schema_says() {
        let header =
            StepHeader { step: 5 << 32 | 7, rows: 3, replay_tokens: u32::MAX, ..StepHeader::default() };
        let mut words = vec![-1; 32];
        header.write(&mut words);
        assert_eq!(StepHeader::read(&words), header);
        let places = Schema::new(LIMITS).fields();
        let at = |name: &str| places.iter().find(|p| p.name == name).expect("it is a field");
        assert_eq!((words[at("step").offset], words[at("step").offset + 1]), (7, 5));
        assert_eq!((at("step").dtype, at("rows").dtype), ("int64", "int32"));
        assert_eq!((words[at("rows").offset], words[at("replay_tokens").offset]), (3, -1));
    }

    #[test]
    fn names_are_unique_and_sections_are_counted_in_the_header() {
        let places = Schema::new(LIMITS).fields();
        let names: std::collections::HashSet<&str> = places.iter().map(|p| p.name).collect();
        assert_eq!(names.len(), places.len());
        for place in places.iter().filter(|p| p.section != Section::Header) {
            let counts = serde_json::to_value(place.section).unwrap();
            let count = places.iter().find(|p| Some(p.name) == counts.as_str());
            assert!(count.is_some_and(|c| c.section == Section::Header), "{place:?}");
        }
    }

    #[test]
    fn fields_are_aligned_and_share_no_word() {
        let schema = Schema::new(LIMITS);
        let mut used = vec![false; schema.words()];
        for place in schema.fields() {
            let size = if place.dtype == "int64" { 2 } else { 1 };
            let aligned = if place.section == Section::Header { size } else { ALIGN };
            assert_eq!(place.offset % aligned, 0, "{place:?}");
            for word in &mut used[place.offset..][..size * place.shape.iter().product::<usize>()] {
                assert!(!std::mem::replace(word, true), "{place:?}");
            }
        }
        assert!(used[schema.words() - 1]);
    }
}

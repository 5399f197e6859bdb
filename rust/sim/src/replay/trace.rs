//! Request traces: JSON lines in Mooncake's format, and the tokens that they stand for.
//!
//! | field | |
//! | --- | --- |
//! | `timestamp` | arrival, in ms unless [`TimeUnit`] says otherwise |
//! | `input_length`, `output_length` | tokens |
//! | `hash_ids` | one per block of the prompt; in one file equal ids are blocks of equal tokens |
//! | `session`, `tenant`, `priority` | optional; text or number, text or number, whole number |
//! | `delay` | time between the end of the request before it in its session and its arrival; in place of `timestamp`, or beside it |
//! | `output_hash_ids` | optional: the same for the blocks that the output touches, the one it begins in first. Without it an output equals nothing else |
//!
//! Other fields are skipped, and their names kept for the caller to tell. Whole numbers may be written as 600.0. Empty lines and
//! those that begin with `#` are passed over. A file may be packed with gzip and begin with a byte order mark.

mod file;
mod parser;

use std::collections::BTreeSet;
use std::io::BufRead;
use std::ops::Range;

use thiserror::Error;

use self::parser::Parser;
use crate::rng::scramble;

/// Tokens of a prompt or an output at most.
pub const MAX_TOKENS: u64 = 1 << 24;
/// Tokens of a hash id at most.
pub const MAX_BLOCK: u32 = 1 << 16;
/// Bytes of a line at most.
const MAX_LINE: u64 = 1 << 26;
/// Latest arrival in ms: a hundred years.
const MAX_MS: f64 = 3.2e12;
/// Names of skipped fields that are kept.
const MAX_SKIPPED: usize = 16;
/// Set in tokens of outputs that equal nothing.
const FRESH: u32 = 1 << 30;

/// What is wrong with a trace: one line with file, line, field, value and limit.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TraceError {
    /// A field that cannot be used.
    #[error("{file}, line {line}: {field} is {value}; {expected}")]
    Field {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: u64,
        /// The field.
        field: String,
        /// What it holds.
        value: String,
        /// What it can hold.
        expected: String,
    },
    /// A line that is no request.
    #[error("{file}, line {line}: {what}")]
    Line {
        /// The file.
        file: String,
        /// Its line, from 1.
        line: u64,
        /// What is wrong.
        what: String,
    },
    /// A file that cannot be read or holds nothing.
    #[error("trace {file}: {what}")]
    File {
        /// The file.
        file: String,
        /// What is wrong.
        what: String,
    },
}

/// What times in a trace are given in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TimeUnit {
    /// Milliseconds, as Mooncake's.
    #[default]
    Milliseconds,
    /// Seconds.
    Seconds,
}

impl TimeUnit {
    /// By its name: `ms` or `s`.
    pub fn of(name: &str) -> Option<Self> {
        [TimeUnit::Milliseconds, TimeUnit::Seconds].into_iter().find(|unit| unit.name() == name)
    }

    /// `ms` or `s`.
    pub fn name(self) -> &'static str {
        match self {
            TimeUnit::Milliseconds => "ms",
            TimeUnit::Seconds => "s",
        }
    }

    fn us(self) -> f64 {
        match self {
            TimeUnit::Milliseconds => 1e3,
            TimeUnit::Seconds => 1e6,
        }
    }
}

/// One request of a trace.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrival {
    /// When it comes, in us.
    pub at_us: f64,
    /// Prompt tokens.
    pub input: u32,
    /// Output tokens.
    pub output: u32,
    /// Requests of one session follow each other.
    pub session: Option<u64>,
    /// Index into [`Trace::tenants`].
    pub tenant: u32,
    /// It comes so long after the request before it in its session has ended, in us.
    pub delay_us: Option<f64>,
    /// Higher goes first.
    pub priority: i32,
    ids: Range<usize>,
    output_ids: Range<usize>,
    serial: u64,
}

/// Requests in order of arrival.
#[derive(Debug, Clone)]
pub struct Trace {
    requests: Vec<Arrival>,
    ids: Vec<u64>,
    block: u32,
    unit: TimeUnit,
    tenants: Vec<String>,
    skipped: BTreeSet<String>,
    files: u64,
    sessions: u64,
}

impl Trace {
    /// An empty trace whose hash ids stand for `block` tokens each.
    pub fn new(block: u32) -> Result<Self, TraceError> {
        if block == 0 || block > MAX_BLOCK {
            let what = format!("hash_block is {block}; it must be 1 to {MAX_BLOCK}");
            return Err(TraceError::File { file: "settings".to_owned(), what });
        }
        Ok(Trace {
            requests: Vec::new(),
            ids: Vec::new(),
            block,
            unit: TimeUnit::default(),
            tenants: vec!["default".to_owned()],
            skipped: BTreeSet::new(),
            files: 0,
            sessions: 0,
        })
    }

    /// Requests that a core has already: (prompt tokens, output tokens, tenant, priority), all at `at_us`. Of their tokens
    /// nothing is known.
    pub(crate) fn of_live(at_us: f64, live: impl Iterator<Item = (u32, u32, u32, i32)>) -> Self {
        let mut trace = Trace::new(1).expect("the block size is valid");
        for (input, output, tenant, priority) in live {
            while trace.tenants.len() as u32 <= tenant {
                trace.tenants.push(format!("tenant {}", trace.tenants.len()));
            }
            let serial = trace.requests.len() as u64;
            let (ids, output_ids, session, delay_us) = (0..0, 0..0, None, None);
            trace.requests.push(Arrival {
                at_us,
                input,
                output,
                session,
                tenant,
                delay_us,
                priority,
                ids,
                output_ids,
                serial,
            });
        }
        trace
    }

    /// Whether the trace says what prompts are.
    pub fn prompts_known(&self) -> bool {
        !self.ids.is_empty()
    }

    /// The same with times in another unit.
    pub fn with_times_in(self, unit: TimeUnit) -> Self {
        Trace { unit, ..self }
    }

    /// Adds the requests of a file. Its ids and sessions are its own: they equal none of another file.
    pub fn read(&mut self, file: &str, reader: impl BufRead) -> Result<(), TraceError> {
        let before = self.requests.len();
        Parser::new(self, file).all(reader)?;
        if self.requests.len() == before {
            return Err(TraceError::File { file: file.to_owned(), what: "it holds no request".to_owned() });
        }
        self.files += 1;
        self.requests.sort_by(|a, b| a.at_us.total_cmp(&b.at_us));
        Ok(())
    }

    /// Requests in order of arrival; those of equal time in the order in which they were read.
    pub fn requests(&self) -> &[Arrival] {
        &self.requests
    }

    /// From the first arrival to the last, in s.
    pub fn seconds(&self) -> f64 {
        let at = |r: Option<&Arrival>| r.map_or(0.0, |r| r.at_us / 1e6);
        at(self.requests.last()) - at(self.requests.first())
    }

    /// Names of tenants; number 0 is `default`, whose requests name none.
    pub fn tenants(&self) -> &[String] {
        &self.tenants
    }

    /// Fields that were not read.
    pub fn skipped(&self) -> impl Iterator<Item = &str> {
        self.skipped.iter().map(String::as_str)
    }

    /// Tokens of a hash id.
    pub fn block(&self) -> u32 {
        self.block
    }

    /// Keeps the first `n` requests.
    pub fn truncate(&mut self, n: usize) {
        self.requests.truncate(n);
    }

    /// Makes arrivals come `factor` times as fast.
    pub fn speed_up(&mut self, factor: f64) {
        self.requests.iter_mut().for_each(|r| r.at_us /= factor);
    }

    /// The prompt of a request.
    pub fn prompt(&self, r: &Arrival) -> Vec<u32> {
        let mut tokens = Vec::with_capacity(r.input as usize);
        for &id in &self.ids[r.ids.clone()] {
            let n = (r.input as usize - tokens.len()).min(self.block as usize) as u64;
            tokens.extend((0..n).map(|i| token(id, i)));
        }
        tokens
    }

    /// The token at a position of the output, which starts at `input`.
    pub fn output_token(&self, r: &Arrival, pos: u32) -> u32 {
        let first = r.input / self.block;
        match self.ids[r.output_ids.clone()].get((pos / self.block - first) as usize) {
            Some(&id) => token(id, u64::from(pos % self.block)),
            None => FRESH | (scramble(scramble(r.serial) ^ u64::from(pos)) >> 34) as u32,
        }
    }

    /// Whether the trace says what the output is.
    pub fn output_known(&self, r: &Arrival) -> bool {
        !r.output_ids.is_empty()
    }

    /// What tokens `from..to` of prompt and output are: pieces (id, first token of it, tokens). Equal pieces are equal
    /// tokens. Stops at the end of what is known.
    pub fn pieces(&self, r: &Arrival, from: u32, to: u32) -> impl Iterator<Item = (u64, u32, u32)> {
        let (ids, out) = (&self.ids[r.ids.clone()], &self.ids[r.output_ids.clone()]);
        let (block, first) = (self.block, (r.input / self.block) as usize);
        let to = to.min(if out.is_empty() { r.input } else { r.input + r.output });
        let mut at = from;
        std::iter::from_fn(move || {
            let end = ((at / block + 1) * block).min(to);
            let i = (at / block) as usize;
            let id = if i < ids.len() { ids.get(i) } else { out.get(i - first) };
            let piece = id.filter(|_| at < end).map(|&id| (id, at % block, end - at));
            at = end;
            piece
        })
    }
}

/// Token `i` of a hash id, below [`FRESH`].
fn token(id: u64, i: u64) -> u32 {
    (scramble(id.wrapping_add(i << 44)) >> 34) as u32
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn trace(text: &str) -> Result<Trace, TraceError> {
        let mut trace = Trace::new(4)?;
        trace.read("t.jsonl", text.as_bytes())?;
        Ok(trace)
    }

    #[test]
    fn equal_ids_at_equal_places_are_equal_tokens_and_nothing_else_is() {
        let t = trace(
            r#"{"timestamp": 5, "input_length": 6, "output_length": 3, "hash_ids": [1, 2]}
               {"timestamp": 1.5, "input_length": 8, "output_length": 0, "hash_ids": [1, 3], "tenant": "b", "session": 7}
               {"timestamp": 6, "input_length": 6, "output_length": 3, "hash_ids": [1, 2], "output_hash_ids": [2, 9]}"#,
        )
        .unwrap();
        let [b, a, c] = t.requests() else { panic!("three requests") };
        assert_eq!((a.at_us, b.at_us, b.session, b.tenant, a.session), (5000.0, 1500.0, Some(0), 1, None));
        let (pa, pb) = (t.prompt(a), t.prompt(b));
        assert_eq!((pa.len(), pb.len()), (6, 8));
        assert!(pa[..4] == pb[..4] && pa[4] != pb[4] && pa.iter().all(|&x| x < FRESH));
        let distinct: BTreeSet<u32> = pa.iter().copied().collect();
        assert_eq!(distinct.len(), 6);
        let out = |r| (6..9).map(|p| t.output_token(r, p)).collect::<Vec<_>>();
        assert!(out(a).iter().all(|&x| x >= FRESH) && !t.output_known(a));
        // The third one says what its output is: positions 6 and 7 finish block 2, position 8 is the first of block 9.
        let of_id = |id: u64, n: u64| scramble(id ^ scramble(0)).wrapping_add(n << 44);
        let expected = [of_id(2, 2), of_id(2, 3), of_id(9, 0)].map(|x| (scramble(x) >> 34) as u32);
        assert_eq!(out(c), expected);
    }

    #[test]
    fn pieces_name_tokens() {
        let t = trace(r#"{"timestamp": 0, "input_length": 6, "output_length": 4, "hash_ids": [1, 2], "output_hash_ids": [2, 3]}"#)
            .unwrap();
        let r = &t.requests()[0];
        let id = |n: u64| scramble(n ^ scramble(0));
        let pieces = |from, to| t.pieces(r, from, to).collect::<Vec<_>>();
        assert_eq!(pieces(2, 6), [(id(1), 2, 2), (id(2), 0, 2)]);
        assert_eq!(pieces(4, 10), [(id(2), 0, 4), (id(3), 0, 2)]);
        let mut known = t.prompt(r);
        known.extend((6..10).map(|p| t.output_token(r, p)));
        let spelled: Vec<u32> = pieces(0, 10)
            .into_iter()
            .flat_map(|(id, first, n)| (first..first + n).map(move |i| token(id, u64::from(i))))
            .collect();
        assert_eq!(spelled, known);
    }

    #[test]
    fn files_do_not_share_ids_sessions_or_outputs() {
        let line = r#"{"timestamp": 0, "input_length": 4, "output_length": 1, "hash_ids": [1], "session": "a", "tenant": "x"}"#;
        let mut t = Trace::new(4).unwrap();
        t.read("a", line.as_bytes()).unwrap();
        t.read("b", line.as_bytes()).unwrap();
        let [a, b] = t.requests() else { panic!("two requests") };
        assert_ne!(t.prompt(a), t.prompt(b));
        assert_ne!(t.output_token(a, 4), t.output_token(b, 4));
        assert_eq!((a.session, b.session, a.tenant, b.tenant), (Some(0), Some(1), 1, 1));
    }

    #[test]
    fn what_is_wrong_is_told_in_one_line() {
        let good = r#"{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}"#;
        let cases = [
            ("{", "t.jsonl, line 2: it is no JSON, column 1: EOF while parsing an object"),
            (
                "[]",
                "t.jsonl, line 2: it must be a JSON object with timestamp, input_length, output_length, hash_ids",
            ),
            (r#"{"timestamp": 0}"#, "t.jsonl, line 2: input_length is missing; every request has one"),
            (
                r#"{"timestamp": 0, "input_length": -5, "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: input_length is -5; it must be a whole number of 1 to 16777216",
            ),
            (
                r#"{"input_length": 5, "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: timestamp is missing; every request has one, or a session and a delay",
            ),
            (
                r#"{"delay": 3, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: timestamp is missing; every request has one, or a session and a delay",
            ),
            (
                r#"{"timestamp": 0, "input_length": 5, "input_tokens": 5, "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: input_length is there twice, once as input_tokens",
            ),
            (
                r#"{"timestamp": 0, "input_length": 600.5, "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: input_length is 600.5; it must be a whole number of 1 to 16777216",
            ),
            (
                r#"{"timestamp": 0, "input_length": "5", "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: input_length is \"5\"; it must be a whole number of 1 to 16777216",
            ),
            (
                r#"{"timestamp": 0, "input_length": 1e30, "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: input_length is 1e+30; it must be a whole number of 1 to 16777216",
            ),
            (
                r#"[{"timestamp": 0}]"#,
                "t.jsonl, line 2: it must be a JSON object with timestamp, input_length, output_length, hash_ids, one a line and in no list",
            ),
            (
                r#"{"timestamp": "now", "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: timestamp is \"now\"; it must be a time in ms of 0 to 3.2e12",
            ),
            (
                r#"{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}"#,
                "t.jsonl, line 2: hash_ids is a list of 1 ids; input_length 5 needs 2, one per 4 tokens",
            ),
            (
                r#"{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, -2]}"#,
                "t.jsonl, line 2: hash_ids[1] is -2; ids are whole numbers of 0 to 18446744073709551615, or text",
            ),
            (
                r#"{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2], "output_hash_ids": [3]}"#,
                "t.jsonl, line 2: output_hash_ids is [3]; its first id must be the last one of hash_ids, as prompt and output share that block",
            ),
            (
                r#"{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, 2], "priority": 0.5}"#,
                "t.jsonl, line 2: priority is 0.5; it must be a whole number of -2147483648 to 2147483647",
            ),
        ];
        for (line, message) in cases {
            assert_eq!(trace(&format!("{good}\n{line}\n")).unwrap_err().to_string(), message);
        }
        let t = Trace::new(4).unwrap().with_times_in(TimeUnit::Seconds).read(
            "t.jsonl",
            &br#"{"timestamp": -1, "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}"#[..],
        );
        let message = "t.jsonl, line 1: timestamp is -1; it must be a time in s of 0 to 3.2e9";
        assert_eq!(t.unwrap_err().to_string(), message);
        assert_eq!(trace("\n\n").unwrap_err().to_string(), "trace t.jsonl: it holds no request");
        let t = trace(&good.replace('}', r#", "type": "chat"}"#)).unwrap();
        assert_eq!(t.skipped().collect::<Vec<_>>(), ["type"]);
    }

    /// Lines of 4 tokens each: (time field, value) and what else is in them.
    fn lines(rest: &[&str]) -> String {
        rest.iter()
            .map(|more| {
                format!(r#"{{"input_length": 4, "output_length": 1, "hash_ids": [1], {more}}}"#) + "\n"
            })
            .collect()
    }

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(bytes).unwrap();
        packer.finish().unwrap()
    }

    #[test]
    fn files_may_be_packed_marked_and_have_any_line_ends() {
        let text = lines(&[r#""timestamp": 0"#, r#""timestamp": 7"#]);
        let dressed = format!("\u{feff}\r\n# by hand\r\n{}\r\n\r\n", text.replace('\n', "\r\n"));
        let twice = [packed(text.as_bytes()), packed(text.as_bytes())].concat();
        for bytes in [dressed.clone().into_bytes(), packed(text.as_bytes()), packed(dressed.as_bytes())] {
            let mut t = Trace::new(4).unwrap();
            t.read("t", bytes.as_slice()).unwrap();
            assert_eq!(t.requests().iter().map(|r| r.at_us).collect::<Vec<_>>(), [0.0, 7000.0]);
            // A pipe may give single bytes.
            let mut t = Trace::new(4).unwrap();
            t.read("t", std::io::BufReader::with_capacity(1, bytes.as_slice())).unwrap();
            assert_eq!(t.requests().len(), 2);
        }
        let mut t = Trace::new(4).unwrap();
        t.read("t", twice.as_slice()).unwrap();
        assert_eq!(t.requests().len(), 4);
    }

    #[test]
    fn files_that_are_no_text_are_named() {
        let good = packed(lines(&[r#""timestamp": 0"#; 9]).as_bytes());
        let cases: [(&[u8], &str); 9] = [
            (b"\xff\xfe{\0", "it is UTF-16 text; write it as UTF-8"),
            (b"\xfe\xff\0{", "it is UTF-16 text; write it as UTF-8"),
            (b"\x28\xb5\x2f\xfd....", "it is compressed with zstd; unpack it, or use gzip"),
            (b"BZh9....", "it is compressed with bzip2; unpack it, or use gzip"),
            (b"PK\x03\x04....", "it is a zip archive; unpack it"),
            (b"PAR1....", "it is a Parquet file; write it as JSON lines"),
            (&packed(&good), "it is compressed twice; unpack it once"),
            (&good[..good.len() - 12], "it cannot be read"),
            (b"\x1f\x8bgarbage", "it cannot be read"),
        ];
        for (bytes, what) in cases {
            let e = Trace::new(4).unwrap().read("t", bytes).unwrap_err().to_string();
            assert!(e.starts_with(&format!("trace t: {what}")) && !e.contains('\n'), "{e}");
        }
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats() {
        let t = trace(
            r#"{"timestamp": 1.5e3, "input_length": 8.0, "output_length": 1e0, "hash_ids": [1.0, 2], "priority": -1.0, "session": 7.0}
               {"timestamp": 1501, "input_length": 8, "output_length": 1, "hash_ids": [1, 2.0], "priority": -1, "session": "7"}"#,
        )
        .unwrap();
        let [a, b] = t.requests() else { panic!("two requests") };
        assert_eq!((a.at_us, a.input, a.output, a.priority), (1.5e6, 8, 1, -1));
        assert_eq!((t.prompt(a), a.session, a.priority), (t.prompt(b), b.session, b.priority));
        let large = r#"{"timestamp": 0, "input_length": 4, "output_length": 0, "hash_ids": [1e19]}"#;
        assert!(trace(large).unwrap_err().to_string().contains("hash_ids[0] is 1e+19"));
        assert!(trace(&large.replace("1e19", "18446744073709551615")).is_ok());
    }

    #[test]
    fn ids_may_be_text_and_fields_have_the_names_of_other_tools() {
        let t = trace(
            r#"{"timestamp": 0, "input_tokens": 8, "output_tokens": 1, "hash_ids": ["a3f09c2e11d7b684", "b"], "session_id": "x"}
               {"timestamp": 1, "input_length": 8, "output_length": 1, "hash_ids": ["a3f09c2e11d7b684", "c"], "session": "x"}"#,
        )
        .unwrap();
        let [a, b] = t.requests() else { panic!("two requests") };
        let (pa, pb) = (t.prompt(a), t.prompt(b));
        assert!(pa[..4] == pb[..4] && pa[4] != pb[4] && a.session == b.session && a.session.is_some());
        assert_eq!(t.skipped().count(), 0);
    }

    #[test]
    fn times_may_be_in_seconds() {
        let mut t = Trace::new(4).unwrap().with_times_in(TimeUnit::Seconds);
        let text = lines(&[r#""timestamp": 0.25, "session": 1"#, r#""delay": 1.5, "session": 1"#]);
        t.read("t", text.as_bytes()).unwrap();
        let [a, b] = t.requests() else { panic!("two requests") };
        assert_eq!((a.at_us, b.at_us, b.delay_us), (250_000.0, 1_750_000.0, Some(1_500_000.0)));
        assert_eq!((TimeUnit::of("s"), TimeUnit::of("min")), (Some(TimeUnit::Seconds), None));
    }

    #[test]
    fn a_delay_stands_in_place_of_a_timestamp() {
        let text = lines(&[
            r#""timestamp": 100, "session": "a""#,
            r#""session": "a", "delay": 1000"#,
            r#""session": "b", "delay": 50"#,
            r#""session": "a", "delay": 10, "timestamp": null"#,
            r#""timestamp": 120, "delay": 9"#,
        ]);
        let t = trace(&text).unwrap();
        let told: Vec<_> = t.requests().iter().map(|r| (r.at_us / 1e3, r.session, r.delay_us)).collect();
        assert_eq!(
            told,
            [
                (100.0, Some(0), None),
                (120.0, None, None),
                // Nothing is before it in its session: it counts from the file's first request.
                (150.0, Some(1), Some(50e3)),
                (1100.0, Some(0), Some(1000e3)),
                (1110.0, Some(0), Some(10e3)),
            ]
        );
        assert_eq!(t.skipped().collect::<Vec<_>>(), ["delay without session"]);
        // A trace of nothing else begins by itself.
        let alone = r#"{"session":"a","delay":1000,"input_length":7,"output_length":5,"hash_ids":[0,1]}"#;
        assert_eq!(trace(alone).unwrap().requests()[0].at_us, 1e6);
    }
}

//! Request traces: JSON lines in Mooncake's format, and the tokens that they stand for.
//!
//! | field | |
//! | --- | --- |
//! | `timestamp` | arrival in ms |
//! | `input_length`, `output_length` | tokens |
//! | `hash_ids` | one per block of the prompt; in one file equal ids are blocks of equal tokens |
//! | `session`, `tenant`, `priority` | optional; text or number, text or number, whole number |
//! | `delay` | optional: ms between the end of the request before it in its session and its arrival |
//! | `output_hash_ids` | optional: the same for the blocks that the output touches, the one it begins in first. Without it an output equals nothing else |
//!
//! Other fields are skipped, and their names kept for the caller to tell.

use std::collections::{BTreeSet, HashMap};
use std::io::{BufRead, Read};
use std::ops::Range;

use serde_json::{Map, Value};
use thiserror::Error;

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

    /// Adds the requests of a file. Its ids and sessions are its own: they equal none of another file.
    pub fn read(&mut self, file: &str, reader: impl BufRead) -> Result<(), TraceError> {
        let before = self.requests.len();
        let names = Names { tenants: HashMap::new(), sessions: HashMap::new() };
        let mut parser = Parser { trace: self, file, line: 0, names };
        parser.all(reader)?;
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

struct Names {
    tenants: HashMap<String, u32>,
    sessions: HashMap<String, u64>,
}

struct Parser<'a> {
    trace: &'a mut Trace,
    file: &'a str,
    line: u64,
    names: Names,
}

impl Parser<'_> {
    fn all(&mut self, mut reader: impl BufRead) -> Result<(), TraceError> {
        for (i, name) in self.trace.tenants.iter().enumerate() {
            self.names.tenants.insert(name.clone(), i as u32);
        }
        let mut text = Vec::new();
        loop {
            text.clear();
            let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut text);
            let bytes =
                read.map_err(|e| TraceError::File { file: self.file.to_owned(), what: e.to_string() })?;
            if bytes == 0 {
                return Ok(());
            }
            self.line += 1;
            if bytes as u64 == MAX_LINE && text.last() != Some(&b'\n') {
                return Err(self.bad_line(format!("it is longer than {MAX_LINE} bytes")));
            }
            if !text.iter().all(u8::is_ascii_whitespace) {
                self.request(&text)?;
            }
        }
    }

    fn request(&mut self, text: &[u8]) -> Result<(), TraceError> {
        let value: Value = serde_json::from_slice(text.trim_ascii()).map_err(|e| {
            let what = e.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            self.bad_line(format!("it is no JSON, column {}: {what}", e.column()))
        })?;
        let Value::Object(fields) = value else {
            return Err(self.bad_line(
                "it must be a JSON object with timestamp, input_length, output_length, hash_ids".to_owned(),
            ));
        };
        let at_us = self.time(&fields, "timestamp")?.ok_or_else(|| self.missing("timestamp"))?;
        let delay_us = self.time(&fields, "delay")?;
        let input = self.whole(&fields, "input_length", 1)?;
        let output = self.whole(&fields, "output_length", 0)?;
        let block = self.trace.block;
        let ids = self.id_list(&fields, "hash_ids", input.div_ceil(block), "input_length", input)?;
        let ids = ids.ok_or_else(|| self.missing("hash_ids"))?;
        let touched = (input + output).div_ceil(block) - input / block;
        let output_ids = match output {
            0 => None,
            _ => self.id_list(&fields, "output_hash_ids", touched, "output_length", output)?,
        };
        let output_ids = output_ids.unwrap_or(0..0);
        let (last, first) = (self.trace.ids[ids.end - 1], self.trace.ids.get(output_ids.start).copied());
        if !output_ids.is_empty() && !input.is_multiple_of(block) && first != Some(last) {
            let expected =
                "its first id must be the last one of hash_ids, as prompt and output share that block";
            return Err(self.bad("output_hash_ids", fields.get("output_hash_ids"), expected.to_owned()));
        }
        let session = self.session(&fields)?;
        let tenant = self.tenant(&fields)?;
        let priority = self.priority(&fields)?;
        let known = [
            "timestamp",
            "input_length",
            "output_length",
            "hash_ids",
            "output_hash_ids",
            "session",
            "tenant",
            "priority",
            "delay",
        ];
        let skipped = &mut self.trace.skipped;
        for name in fields.keys().filter(|k| !known.contains(&k.as_str())) {
            if skipped.len() < MAX_SKIPPED {
                skipped.insert(shown(name));
            }
        }
        let serial = self.trace.requests.len() as u64;
        self.trace.requests.push(Arrival {
            at_us,
            input,
            output,
            session,
            tenant,
            priority,
            delay_us,
            ids,
            output_ids,
            serial,
        });
        Ok(())
    }

    /// A time in us; `None` without the field.
    fn time(&self, fields: &Map<String, Value>, name: &str) -> Result<Option<f64>, TraceError> {
        let Some(value) = fields.get(name).filter(|v| !v.is_null()) else { return Ok(None) };
        match value.as_f64().filter(|ms| (0.0..=MAX_MS).contains(ms)) {
            // Without the sign of -0.0, whose bits are above all others.
            Some(ms) => Ok(Some(ms.abs() * 1000.0)),
            None => Err(self.bad(name, Some(value), format!("it must be a time in ms of 0 to {MAX_MS:e}"))),
        }
    }

    fn whole(&self, fields: &Map<String, Value>, name: &str, least: u64) -> Result<u32, TraceError> {
        let value = fields.get(name).ok_or_else(|| self.missing(name))?;
        match value.as_u64().filter(|n| (least..=MAX_TOKENS).contains(n)) {
            Some(n) => Ok(n as u32),
            None => {
                let expected = format!("it must be a whole number of {least} to {MAX_TOKENS}");
                Err(self.bad(name, Some(value), expected))
            }
        }
    }

    /// The ids of a list, which must be `count`; `None` without the field.
    fn id_list(
        &mut self,
        fields: &Map<String, Value>,
        name: &str,
        count: u32,
        of: &str,
        tokens: u32,
    ) -> Result<Option<Range<usize>>, TraceError> {
        let Some(value) = fields.get(name).filter(|v| !v.is_null()) else { return Ok(None) };
        let list = value.as_array().filter(|l| l.len() == count as usize);
        let Some(list) = list else {
            let has = value
                .as_array()
                .map_or_else(|| shown(&value.to_string()), |l| format!("a list of {} ids", l.len()));
            let expected = format!("{of} {tokens} needs {count}, one per {} tokens", self.trace.block);
            return Err(self.field(name, has, expected));
        };
        let start = self.trace.ids.len();
        for (i, id) in list.iter().enumerate() {
            let Some(id) = id.as_u64() else {
                let (name, expected) =
                    (format!("{name}[{i}]"), format!("ids are whole numbers of 0 to {}", u64::MAX));
                return Err(self.bad(&name, Some(id), expected));
            };
            self.trace.ids.push(scramble(id ^ scramble(self.trace.files)));
        }
        Ok(Some(start..self.trace.ids.len()))
    }

    fn session(&mut self, fields: &Map<String, Value>) -> Result<Option<u64>, TraceError> {
        let Some(name) = self.name(fields, "session")? else { return Ok(None) };
        let next = self.trace.sessions;
        let id = *self.names.sessions.entry(name).or_insert(next);
        self.trace.sessions = next.max(id + 1);
        Ok(Some(id))
    }

    fn tenant(&mut self, fields: &Map<String, Value>) -> Result<u32, TraceError> {
        let Some(name) = self.name(fields, "tenant")? else { return Ok(0) };
        if let Some(&id) = self.names.tenants.get(&name) {
            return Ok(id);
        }
        let id = self.trace.tenants.len() as u32;
        self.trace.tenants.push(name.clone());
        self.names.tenants.insert(name, id);
        Ok(id)
    }

    fn name(&self, fields: &Map<String, Value>, name: &str) -> Result<Option<String>, TraceError> {
        match fields.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.len() <= 256 => Ok(Some(text.clone())),
            Some(Value::Number(n)) if n.is_u64() => Ok(Some(n.to_string())),
            value => Err(self.bad(
                name,
                value,
                "it must be a text of at most 256 bytes or a whole number".to_owned(),
            )),
        }
    }

    fn priority(&self, fields: &Map<String, Value>) -> Result<i32, TraceError> {
        match fields.get("priority") {
            None | Some(Value::Null) => Ok(0),
            value => match value.and_then(Value::as_i64).and_then(|n| i32::try_from(n).ok()) {
                Some(n) => Ok(n),
                None => {
                    let expected = format!("it must be a whole number of {} to {}", i32::MIN, i32::MAX);
                    Err(self.bad("priority", value, expected))
                }
            },
        }
    }

    fn bad(&self, field: &str, value: Option<&Value>, expected: String) -> TraceError {
        self.field(field, shown(&value.map_or_else(|| "missing".to_owned(), Value::to_string)), expected)
    }

    fn missing(&self, field: &str) -> TraceError {
        self.field(field, "missing".to_owned(), "every request has one".to_owned())
    }

    fn field(&self, field: &str, value: String, expected: String) -> TraceError {
        TraceError::Field {
            file: self.file.to_owned(),
            line: self.line,
            field: field.to_owned(),
            value,
            expected,
        }
    }

    fn bad_line(&self, what: String) -> TraceError {
        TraceError::Line { file: self.file.to_owned(), line: self.line, what }
    }
}

/// A value as it fits into a line.
fn shown(text: &str) -> String {
    const MOST: usize = 60;
    if text.chars().count() <= MOST {
        text.to_owned()
    } else {
        text.chars().take(MOST).chain("…".chars()).collect()
    }
}

#[cfg(test)]
mod tests {
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
                r#"{"timestamp": "now", "input_length": 5, "output_length": 1, "hash_ids": [1, 2]}"#,
                "t.jsonl, line 2: timestamp is \"now\"; it must be a time in ms of 0 to 3.2e12",
            ),
            (
                r#"{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1]}"#,
                "t.jsonl, line 2: hash_ids is a list of 1 ids; input_length 5 needs 2, one per 4 tokens",
            ),
            (
                r#"{"timestamp": 0, "input_length": 5, "output_length": 1, "hash_ids": [1, -2]}"#,
                "t.jsonl, line 2: hash_ids[1] is -2; ids are whole numbers of 0 to 18446744073709551615",
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
        assert_eq!(trace("\n\n").unwrap_err().to_string(), "trace t.jsonl: it holds no request");
        let t = trace(&good.replace('}', r#", "type": "chat"}"#)).unwrap();
        assert_eq!(t.skipped().collect::<Vec<_>>(), ["type"]);
    }
}

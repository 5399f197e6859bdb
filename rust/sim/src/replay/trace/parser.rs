//! Lines of a trace, and what is wrong with them.

use std::collections::HashMap;
use std::io::{BufRead, Read};
use std::ops::Range;

use serde_json::{Map, Value};

use super::{Arrival, MAX_LINE, MAX_MS, MAX_SKIPPED, MAX_TOKENS, Trace, TraceError, file};
use crate::rng::scramble;

/// Fields, with further names that other tools write for them.
const FIELDS: [(&str, &[&str]); 9] = [
    ("timestamp", &[]),
    ("input_length", &["input_tokens"]),
    ("output_length", &["output_tokens"]),
    ("hash_ids", &[]),
    ("output_hash_ids", &[]),
    ("session", &["session_id"]),
    ("tenant", &[]),
    ("priority", &[]),
    ("delay", &[]),
];
/// Whole numbers up to here are the same as floats.
const EXACT: f64 = 9_007_199_254_740_992.0;
/// Bytes of a name at most.
const MAX_NAME: usize = 256;

/// A session: its number, and when its last request came, in us, as far as the trace says.
struct Session {
    id: u64,
    last_us: f64,
}

pub(super) struct Parser<'a> {
    trace: &'a mut Trace,
    file: &'a str,
    line: u64,
    tenants: HashMap<String, u32>,
    sessions: HashMap<String, Session>,
    /// When the first request of the file came.
    begin_us: Option<f64>,
}

impl<'a> Parser<'a> {
    pub(super) fn new(trace: &'a mut Trace, file: &'a str) -> Self {
        let tenants = (0u32..).zip(&trace.tenants).map(|(id, name)| (name.clone(), id)).collect();
        Parser { trace, file, line: 0, tenants, sessions: HashMap::new(), begin_us: None }
    }

    pub(super) fn all(&mut self, reader: impl BufRead) -> Result<(), TraceError> {
        let mut reader = match file::text(reader) {
            Ok(Ok(reader)) => reader,
            Ok(Err(what)) => return Err(self.bad_file(format!("it is {what}"))),
            Err(e) => return Err(self.unreadable(&e)),
        };
        let mut text = Vec::new();
        loop {
            text.clear();
            let read = reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut text);
            let bytes = read.map_err(|e| self.unreadable(&e))?;
            if bytes == 0 {
                return Ok(());
            }
            self.line += 1;
            if bytes as u64 == MAX_LINE && text.last() != Some(&b'\n') {
                return Err(self.bad_line(format!("it is longer than {MAX_LINE} bytes")));
            }
            let line = text.trim_ascii();
            if !line.is_empty() && line[0] != b'#' {
                self.request(line)?;
            }
        }
    }

    fn request(&mut self, text: &[u8]) -> Result<(), TraceError> {
        let fields = self.fields(text)?;
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
        let tenant = self.tenant(&fields)?;
        let priority = self.priority(&fields)?;
        let (session, at_us, delay_us) = self.when(&fields)?;
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

    /// The object of a line under our names of its fields.
    fn fields(&mut self, text: &[u8]) -> Result<Map<String, Value>, TraceError> {
        let value: Value = serde_json::from_slice(text).map_err(|e| {
            let what = e.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            self.bad_line(format!("it is no JSON, column {}: {what}", e.column()))
        })?;
        let Value::Object(given) = value else {
            let hint = match value {
                Value::Array(list) if list.iter().any(Value::is_object) => ", one a line and in no list",
                _ => "",
            };
            return Err(self.bad_line(format!(
                "it must be a JSON object with timestamp, input_length, output_length, hash_ids{hint}"
            )));
        };
        let mut fields = Map::new();
        for (name, value) in given {
            let known = FIELDS.iter().find(|(ours, others)| *ours == name || others.contains(&name.as_str()));
            let Some((ours, _)) = known else {
                self.skip(&shown(&name));
                continue;
            };
            if fields.insert((*ours).to_owned(), value).is_some() {
                return Err(self.bad_line(format!("{ours} is there twice, once as {}", shown(&name))));
            }
        }
        Ok(fields)
    }

    fn skip(&mut self, what: &str) {
        if self.trace.skipped.len() < MAX_SKIPPED {
            self.trace.skipped.insert(what.to_owned());
        }
    }

    /// The session of a request, when it comes, and so long after the answer before it in its session. Without a timestamp
    /// it comes, as far as can be said before it runs, `delay` after the request before it, or after the file's first one.
    fn when(&mut self, fields: &Map<String, Value>) -> Result<(Option<u64>, f64, Option<f64>), TraceError> {
        let timestamp = self.time(fields, "timestamp")?;
        let delay = self.time(fields, "delay")?;
        let name = self.name(fields, "session")?;
        if timestamp.is_none() && (delay.is_none() || name.is_none()) {
            let expected = "every request has one, or a session and a delay";
            return Err(self.field("timestamp", "missing".to_owned(), expected.to_owned()));
        }
        let before = name.as_ref().and_then(|name| self.sessions.get(name)).map(|s| s.last_us);
        let after = before.or(self.begin_us).unwrap_or(0.0);
        let at_us = timestamp.unwrap_or(after + delay.unwrap_or(0.0));
        self.begin_us.get_or_insert(at_us);
        let Some(name) = name else {
            if delay.is_some() {
                self.skip("delay without session");
            }
            return Ok((None, at_us, None));
        };
        let next = self.trace.sessions;
        let session = self.sessions.entry(name).or_insert(Session { id: next, last_us: at_us });
        session.last_us = at_us;
        self.trace.sessions = next.max(session.id + 1);
        Ok((Some(session.id), at_us, delay))
    }

    /// A time in us; `None` without the field.
    fn time(&self, fields: &Map<String, Value>, name: &str) -> Result<Option<f64>, TraceError> {
        let Some(value) = fields.get(name).filter(|v| !v.is_null()) else { return Ok(None) };
        let unit = self.trace.unit;
        let most = MAX_MS * 1000.0 / unit.us();
        match value.as_f64().filter(|t| (0.0..=most).contains(t)) {
            // Without the sign of -0.0, whose bits are above all others.
            Some(t) => Ok(Some(t.abs() * unit.us())),
            None => {
                let expected = format!("it must be a time in {} of 0 to {most:e}", unit.name());
                Err(self.bad(name, Some(value), expected))
            }
        }
    }

    fn whole(&self, fields: &Map<String, Value>, name: &str, least: u64) -> Result<u32, TraceError> {
        let value = fields.get(name).ok_or_else(|| self.missing(name))?;
        match integer(value).filter(|n| (i128::from(least)..=i128::from(MAX_TOKENS)).contains(n)) {
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
        for (i, value) in list.iter().enumerate() {
            let Some(id) = block_id(value) else {
                let expected = format!("ids are whole numbers of 0 to {}, or text", u64::MAX);
                return Err(self.bad(&format!("{name}[{i}]"), Some(value), expected));
            };
            self.trace.ids.push(scramble(id ^ scramble(self.trace.files)));
        }
        Ok(Some(start..self.trace.ids.len()))
    }

    fn tenant(&mut self, fields: &Map<String, Value>) -> Result<u32, TraceError> {
        let Some(name) = self.name(fields, "tenant")? else { return Ok(0) };
        if let Some(&id) = self.tenants.get(&name) {
            return Ok(id);
        }
        let id = self.trace.tenants.len() as u32;
        self.trace.tenants.push(name.clone());
        self.tenants.insert(name, id);
        Ok(id)
    }

    fn name(&self, fields: &Map<String, Value>, name: &str) -> Result<Option<String>, TraceError> {
        let value = match fields.get(name) {
            None | Some(Value::Null) => return Ok(None),
            Some(value) => value,
        };
        let found = match value {
            Value::String(text) if text.len() <= MAX_NAME => Some(text.clone()),
            value => integer(value).filter(|&n| n >= 0).map(|n| n.to_string()),
        };
        match found {
            Some(found) => Ok(Some(found)),
            None => {
                let expected = format!("it must be a text of at most {MAX_NAME} bytes or a whole number");
                Err(self.bad(name, Some(value), expected))
            }
        }
    }

    fn priority(&self, fields: &Map<String, Value>) -> Result<i32, TraceError> {
        match fields.get("priority") {
            None | Some(Value::Null) => Ok(0),
            value => match value.and_then(integer).and_then(|n| i32::try_from(n).ok()) {
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

    fn bad_file(&self, what: String) -> TraceError {
        TraceError::File { file: self.file.to_owned(), what }
    }

    fn unreadable(&self, e: &std::io::Error) -> TraceError {
        let what = match self.line {
            0 => format!("it cannot be read: {e}"),
            n => format!("it cannot be read after line {n}: {e}"),
        };
        self.bad_file(what)
    }
}

/// A whole number, also one that is written as 600.0 or 6e2.
fn integer(value: &Value) -> Option<i128> {
    let whole = |x: f64| (x.fract() == 0.0 && x.abs() <= EXACT).then_some(x as i128);
    let exact = value.as_i64().map(i128::from).or_else(|| value.as_u64().map(i128::from));
    exact.or_else(|| value.as_f64().and_then(whole))
}

/// A block's id: a number, or a text such as a hash in hexadecimal.
fn block_id(value: &Value) -> Option<u64> {
    match value {
        // Every eight bytes turn what was before them into another number.
        Value::String(text) if text.len() <= MAX_NAME => {
            Some(text.as_bytes().chunks(8).fold(scramble(text.len() as u64), |id, bytes| {
                let mut word = [0; 8];
                word[..bytes.len()].copy_from_slice(bytes);
                scramble(id ^ u64::from_le_bytes(word))
            }))
        }
        value => integer(value).and_then(|n| u64::try_from(n).ok()),
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

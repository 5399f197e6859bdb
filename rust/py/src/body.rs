//! A look at a JSON body before it becomes objects: how much is in it, and lists of token ids as arrays.
//!
//! It checks nothing: what is no JSON is found by the parser that comes after. A list that is taken out is a value by
//! itself and leaves `null` behind, so a body is as valid without it.

use std::ops::Range;

use memchr::memchr2;
use numpy::IntoPyArray;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use crate::door::{Failure, enter};

/// Lists in a list that is taken out, at most. More are left to the parser.
const MOST_LISTS: usize = 1024;

/// Token ids under one name.
enum Ids {
    One(Vec<i32>),
    Many(Vec<Vec<i32>>),
}

/// What a pass over a body finds.
#[derive(Default)]
struct Scan {
    /// Values and keys below the outermost, but for ids that are taken out; an empty list or object counts twice.
    values: usize,
    /// Brackets that are open at once.
    depth: usize,
    /// Index of a name, place and ids.
    found: Vec<(usize, Range<usize>, Ids)>,
}

/// Goes over a body once. `names`: members of the outermost object whose whole numbers are taken out.
fn scan(body: &[u8], names: &[String]) -> Scan {
    let mut seen = Scan::default();
    let mut times = vec![0_usize; names.len()];
    let (mut at, mut depth, mut before) = (0, 0_usize, b' ');
    let mut key = None;
    while let Some(&byte) = body.get(at) {
        match byte {
            b'"' => {
                let end = string_end(body, at + 1);
                key = (depth == 1 && matches!(before, b'{' | b',')).then_some(at + 1..end);
                at = end;
            }
            b'{' | b'[' => {
                depth += 1;
                seen.depth = seen.depth.max(depth);
                seen.values += 1;
            }
            b'}' | b']' => depth = depth.saturating_sub(1),
            b',' => seen.values += 1,
            b':' => {
                seen.values += 1;
                let name = key.take().filter(|_| depth == 1).and_then(|key| body.get(key));
                if let Some(i) = names.iter().position(|n| Some(n.as_bytes()) == name) {
                    times[i] += 1;
                    let start = skip_space(body, at + 1);
                    if let Some((ids, end)) = ids_at(body, start) {
                        seen.found.push((i, start..end, ids));
                        at = end - 1;
                    }
                }
            }
            _ => {}
        }
        if !byte.is_ascii_whitespace() {
            before = byte;
        }
        at += 1;
    }
    // Of two members of one name the parser takes the last, whatever that is.
    seen.found.retain(|(i, ..)| times[*i] == 1);
    seen
}

/// The body with `null` for what was taken out.
fn without(body: &[u8], found: &[(usize, Range<usize>, Ids)]) -> Vec<u8> {
    let mut rest = Vec::new();
    let mut at = 0;
    for (_, place, _) in found {
        rest.extend_from_slice(&body[at..place.start]);
        rest.extend_from_slice(b"null");
        at = place.end;
    }
    rest.extend_from_slice(&body[at..]);
    rest
}

/// Where a string ends that begins at `at`: its closing quote, or the end of the body.
fn string_end(body: &[u8], mut at: usize) -> usize {
    while let Some(found) = body.get(at..).and_then(|rest| memchr2(b'"', b'\\', rest)) {
        if body[at + found] == b'"' {
            return at + found;
        }
        at += found + 2;
    }
    body.len()
}

fn skip_space(body: &[u8], mut at: usize) -> usize {
    while matches!(body.get(at), Some(b' ' | b'\t' | b'\n' | b'\r')) {
        at += 1;
    }
    at
}

/// The token ids that begin at a place, and where they end: a list of whole numbers, or a list of such lists.
fn ids_at(body: &[u8], at: usize) -> Option<(Ids, usize)> {
    let numbers = |body: &[u8], at| list_at(body, at, usize::MAX, number_at);
    if let Some((ids, end)) = numbers(body, at) {
        return Some((Ids::One(ids), end));
    }
    list_at(body, at, MOST_LISTS, numbers).map(|(lists, end)| (Ids::Many(lists), end))
}

/// A list of 1 to `most` items, which `item` reads, and where it ends.
fn list_at<T>(
    body: &[u8],
    at: usize,
    most: usize,
    item: impl Fn(&[u8], usize) -> Option<(T, usize)>,
) -> Option<(Vec<T>, usize)> {
    let mut at = (body.get(at) == Some(&b'[')).then(|| skip_space(body, at + 1))?;
    let mut items = Vec::new();
    loop {
        let (value, next) = item(body, at)?;
        items.push(value);
        if items.len() > most {
            return None;
        }
        at = skip_space(body, next);
        match body.get(at)? {
            b',' => at = skip_space(body, at + 1),
            b']' => return Some((items, at + 1)),
            _ => return None,
        }
    }
}

/// A whole number of 32 bits as JSON writes it, and where it ends.
fn number_at(body: &[u8], at: usize) -> Option<(i32, usize)> {
    let negative = body.get(at) == Some(&b'-');
    let start = at + usize::from(negative);
    let digits = body.get(start..)?.iter().take(11).take_while(|b| b.is_ascii_digit()).count();
    let zero_first = body.get(start) == Some(&b'0') && (digits > 1 || negative);
    if !(1..=10).contains(&digits) || zero_first {
        return None;
    }
    let size = body[start..start + digits].iter().fold(0_i64, |n, b| 10 * n + i64::from(b - b'0'));
    let value = i32::try_from(if negative { -size } else { size }).ok()?;
    Some((value, start + digits))
}

/// `(values, depth, ids by name, rest)`: see `_core.pyi`.
#[pyfunction]
#[pyo3(signature = (body, names))]
pub fn scan_json<'py>(
    py: Python<'py>,
    body: &Bound<'py, PyBytes>,
    names: Vec<String>,
) -> PyResult<(usize, usize, Bound<'py, PyDict>, Bound<'py, PyBytes>)> {
    let bytes = body.as_bytes();
    let (seen, rest) = enter(py, || {
        let seen = scan(bytes, &names);
        let rest = (!seen.found.is_empty()).then(|| without(bytes, &seen.found));
        Ok::<_, Failure>((seen, rest))
    })?;
    let ids = PyDict::new(py);
    for (i, _, found) in seen.found {
        match found {
            Ids::One(list) => ids.set_item(&names[i], list.into_pyarray(py))?,
            Ids::Many(lists) => {
                let arrays = lists.into_iter().map(|list| list.into_pyarray(py));
                ids.set_item(&names[i], PyList::new(py, arrays.collect::<Vec<_>>())?)?;
            }
        }
    }
    let rest = rest.map_or_else(|| body.clone(), |rest| PyBytes::new(py, &rest));
    Ok((seen.values, seen.depth, ids, rest))
}

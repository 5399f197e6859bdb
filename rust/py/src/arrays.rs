//! numpy arrays that Python owns: read or written during a call, never kept.

use numpy::{
    Element, PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyReadwriteArrayDyn, PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use crate::door::config_error;

/// Borrows an array of dtype `T` for writing: contiguous, of `dims` dimensions, the last `last` long if that is said.
pub fn writable<'py, T: Element>(
    name: &str,
    value: &Bound<'py, PyAny>,
    dims: usize,
    last: Option<usize>,
) -> PyResult<PyReadwriteArrayDyn<'py, T>> {
    let py = value.py();
    let refused = |is: String, expected: String| Err(config_error(py, name, is, expected));
    let Ok(array) = value.cast::<PyArrayDyn<T>>() else {
        let dtype = numpy::dtype::<T>(py);
        return refused(what_it_is(value), format!("it must be a numpy array of dtype {dtype}"));
    };
    let shape = array.shape();
    if shape.len() != dims || last.is_some_and(|n| shape.last() != Some(&n)) {
        let rows = last.map_or_else(String::new, |n| format!(", the last of {n} elements"));
        return refused(format!("of shape {shape:?}"), format!("it needs {dims} dimension(s){rows}"));
    }
    if !array.is_c_contiguous() {
        return refused("strided".to_owned(), "it must be contiguous".to_owned());
    }
    array
        .try_readwrite()
        .or_else(|e| refused(format!("not available ({e})"), "it must be writable".to_owned()))
}

/// Copies an int32 array.
pub fn counts_of(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<i32>> {
    Ok(readable(name, value)?.as_array().to_vec())
}

/// Copies token ids out of an int32 array.
pub fn tokens_of(name: &str, value: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    tokens_in(name, value, |n| Ok(Vec::with_capacity(n)))
}

/// [`tokens_of`] into an empty list that `room` gives for so many.
pub fn tokens_in(
    name: &str,
    value: &Bound<'_, PyAny>,
    room: impl FnOnce(usize) -> PyResult<Vec<u32>>,
) -> PyResult<Vec<u32>> {
    let array = readable(name, value)?;
    let ids = array.as_array();
    let ids = ids.as_standard_layout(); // of an array in one piece it is that piece, which is copied many ids at a time
    let ids = ids.as_slice().unwrap_or_default();
    let (mut tokens, mut signs) = (room(ids.len())?, 0);
    tokens.extend(ids.iter().map(|&t| {
        signs |= t;
        t as u32
    }));
    if signs < 0 {
        let bad = ids.iter().find(|&&t| t < 0).copied().unwrap_or_default();
        let found = format!("with token {bad}");
        return Err(config_error(value.py(), name, found, "token ids are at least 0"));
    }
    Ok(tokens)
}

fn readable<'py>(name: &str, value: &Bound<'py, PyAny>) -> PyResult<PyReadonlyArray1<'py, i32>> {
    value.extract().map_err(|_| {
        let expected = "it must be a one-dimensional numpy array of dtype int32";
        config_error(value.py(), name, what_it_is(value), expected)
    })
}

fn what_it_is(value: &Bound<'_, PyAny>) -> String {
    value.getattr("dtype").map_or_else(|_| value.get_type().to_string(), |d| format!("of dtype {d}"))
}

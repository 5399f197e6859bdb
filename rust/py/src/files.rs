//! Columns of a matrix in a file: too many short reads for Python.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use numpy::PyUntypedArrayMethods;
use pyo3::prelude::*;

use crate::arrays::writable;

/// Fills `out` (uint8 `[rows, n]`): row i from byte `offset + i * stride` of the file. False where the file ends before.
#[pyfunction]
pub fn read_columns(
    py: Python<'_>,
    path: PathBuf,
    offset: u64,
    stride: u64,
    out: &Bound<'_, PyAny>,
) -> PyResult<bool> {
    let mut array = writable::<u8>("out", out, 2, None)?;
    let width = array.shape()[1].max(1);
    let bytes = array.as_slice_mut()?;
    let read = py.detach(|| -> io::Result<()> {
        let file = File::open(path)?;
        let mut at = offset;
        for row in bytes.chunks_exact_mut(width) {
            file.read_exact_at(row, at)?;
            at += stride;
        }
        Ok(())
    });
    match read {
        Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(false),
        done => Ok(done.map(|()| true)?),
    }
}

//! The plan's arrays. Python allocates them once (pinned, where a GPU reads them); the core writes in place.

use numpy::{Element, PyArrayDyn, PyArrayMethods, PyReadwriteArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;

use crate::door::config_error;

/// One set of arrays. Holds references to them and checks dtype and dimensions once; lengths are checked by `plan`.
#[pyclass(frozen, name = "PlanBuffers", module = "dsv4._core")]
pub struct PyPlanBuffers {
    pub token_ids: Py<PyArrayDyn<i32>>,
    pub positions: Py<PyArrayDyn<i32>>,
    pub row_req: Py<PyArrayDyn<i64>>,
    pub row_slab: Py<PyArrayDyn<i32>>,
    pub row_start: Py<PyArrayDyn<i32>>,
    pub row_len: Py<PyArrayDyn<i32>>,
    pub row_flags: Py<PyArrayDyn<i32>>,
    pub row_replay_end: Py<PyArrayDyn<i32>>,
    pub sample_rows: Py<PyArrayDyn<i32>>,
    pub page_deltas: Py<PyArrayDyn<i32>>,
    pub saves: Py<PyArrayDyn<i32>>,
    pub restores: Py<PyArrayDyn<i32>>,
    pub forks: Py<PyArrayDyn<i32>>,
}

#[pymethods]
impl PyPlanBuffers {
    #[new]
    #[pyo3(signature = (*, token_ids, positions, row_req, row_slab, row_start, row_len, row_flags, row_replay_end,
                        sample_rows, page_deltas, saves, restores, forks))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only at the border")]
    fn new(
        token_ids: &Bound<'_, PyAny>,
        positions: &Bound<'_, PyAny>,
        row_req: &Bound<'_, PyAny>,
        row_slab: &Bound<'_, PyAny>,
        row_start: &Bound<'_, PyAny>,
        row_len: &Bound<'_, PyAny>,
        row_flags: &Bound<'_, PyAny>,
        row_replay_end: &Bound<'_, PyAny>,
        sample_rows: &Bound<'_, PyAny>,
        page_deltas: &Bound<'_, PyAny>,
        saves: &Bound<'_, PyAny>,
        restores: &Bound<'_, PyAny>,
        forks: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        Ok(PyPlanBuffers {
            token_ids: array("token_ids", token_ids, 1)?,
            positions: array("positions", positions, 1)?,
            row_req: array("row_req", row_req, 1)?,
            row_slab: array("row_slab", row_slab, 1)?,
            row_start: array("row_start", row_start, 1)?,
            row_len: array("row_len", row_len, 1)?,
            row_flags: array("row_flags", row_flags, 1)?,
            row_replay_end: array("row_replay_end", row_replay_end, 1)?,
            sample_rows: array("sample_rows", sample_rows, 1)?,
            page_deltas: table("page_deltas", page_deltas, Some(3))?,
            saves: table("saves", saves, None)?,
            restores: table("restores", restores, None)?,
            forks: table("forks", forks, Some(4))?,
        })
    }
}

impl PyPlanBuffers {
    /// Refuses copy lists whose rows are not `2 + copy_pages` wide.
    pub fn check_width(&self, py: Python<'_>, width: usize) -> PyResult<()> {
        for (name, list) in [("saves", &self.saves), ("restores", &self.restores)] {
            let shape = list.bind(py).shape();
            if shape[1] != width {
                let expected = format!("rows need {width} elements: slab, position and the pages of a state");
                return Err(config_error(py, name, format!("of shape {shape:?}"), expected));
            }
        }
        Ok(())
    }
}

/// Takes an array of dtype `T` with `dims` dimensions, or says what it is instead.
fn array<T: Element>(name: &str, value: &Bound<'_, PyAny>, dims: usize) -> PyResult<Py<PyArrayDyn<T>>> {
    let py = value.py();
    let dtype = numpy::dtype::<T>(py);
    let Ok(array) = value.cast::<PyArrayDyn<T>>() else {
        let is =
            value.getattr("dtype").map_or_else(|_| value.get_type().to_string(), |d| format!("of dtype {d}"));
        return Err(config_error(py, name, is, format!("it must be a numpy array of dtype {dtype}")));
    };
    if array.ndim() != dims {
        return Err(config_error(
            py,
            name,
            format!("of shape {:?}", array.shape()),
            format!("it needs {dims} dimension(s)"),
        ));
    }
    if !array.is_c_contiguous() {
        return Err(config_error(py, name, "strided", "it must be contiguous"));
    }
    Ok(array.clone().unbind())
}

/// As `array`, for rows of `width` elements.
fn table(name: &str, value: &Bound<'_, PyAny>, width: Option<usize>) -> PyResult<Py<PyArrayDyn<i32>>> {
    let array = array(name, value, 2)?;
    let shape = array.bind(value.py()).shape().to_vec();
    match width {
        Some(width) if shape[1] != width => Err(config_error(
            value.py(),
            name,
            format!("of shape {shape:?}"),
            format!("rows need {width} elements"),
        )),
        _ => Ok(array),
    }
}

/// Borrows an array for writing. It must not be borrowed under another name, and it must be writable.
pub fn borrow<'py, T: Element>(
    py: Python<'py>,
    name: &str,
    array: &Py<PyArrayDyn<T>>,
) -> PyResult<PyReadwriteArrayDyn<'py, T>> {
    let borrowed = array.bind(py).try_readwrite();
    borrowed.map_err(|e| {
        config_error(py, name, format!("not available ({e})"), "it must be writable and given once")
    })
}

//! Where the fields of a plan lie, as plain data.

use dsv4_core::Options;
use dsv4_core::plan::{CONSTANTS, FieldPlace, Limits, Schema};
use pyo3::prelude::*;
use serde::Serialize;

use crate::layout::PyLayoutSpec;

#[derive(Serialize)]
struct SchemaData {
    words: usize,
    fields: Vec<FieldPlace>,
}

/// `{"words": …, "fields": [{"name": …, "section": …, "dtype": …, "offset": …, "shape": …}, …]}`
pub fn data_of<'py>(py: Python<'py>, schema: &Schema) -> PyResult<Bound<'py, PyAny>> {
    let data = SchemaData { words: schema.words(), fields: schema.fields() };
    Ok(pythonize::pythonize(py, &data)?)
}

/// The schema of a core with these limits.
#[pyfunction]
#[pyo3(signature = (layout, *, slabs, max_step_tokens, max_len))]
pub fn plan_schema<'py>(
    py: Python<'py>,
    layout: &PyLayoutSpec,
    slabs: u32,
    max_step_tokens: u32,
    max_len: u32,
) -> PyResult<Bound<'py, PyAny>> {
    let options = Options { slabs, max_step_tokens, max_len, ..Options::default() };
    data_of(py, &Schema::new(Limits::new(&layout.0, &options)))
}

/// Puts the function and the numbers that plans are written in into the module.
pub fn add_to(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(plan_schema, m)?)?;
    CONSTANTS.iter().try_for_each(|&(name, value)| m.add(name, value))
}

//! Where the fields of a plan lie, as plain data.

use dsv4_core::Options;
use dsv4_core::plan::{CONSTANTS, FieldPlace, Limits, Schema};
use pyo3::prelude::*;
use serde::Serialize;

use crate::data::{from_python, to_python};
use crate::layout::PyLayoutSpec;

#[derive(Serialize)]
struct SchemaData {
    words: usize,
    fields: Vec<FieldPlace>,
}

/// `{"words": …, "fields": [{"name": …, "section": …, "dtype": …, "offset": …, "shape": …}, …]}`
pub fn data_of<'py>(py: Python<'py>, schema: &Schema) -> PyResult<Bound<'py, PyAny>> {
    let data = SchemaData { words: schema.words(), fields: schema.fields() };
    to_python(py, &data)
}

/// The schema of a core with these limits, which are options of it.
#[pyfunction]
#[pyo3(signature = (layout, options))]
pub fn plan_schema<'py>(
    py: Python<'py>,
    layout: &PyLayoutSpec,
    options: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyAny>> {
    let options: Options = from_python("options", options)?;
    data_of(py, &Schema::new(Limits::new(&layout.spec, &options)))
}

/// Puts the function and the numbers that plans are written in into the module.
pub fn add_to(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(plan_schema, m)?)?;
    CONSTANTS.iter().try_for_each(|&(name, value)| m.add(name, value))
}

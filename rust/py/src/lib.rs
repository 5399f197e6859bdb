//! `dsv4._core`: the core for Python. Extract, detach, call, map the error; no logic lives here.
//!
//! | file | holds |
//! | --- | --- |
//! | `door.rs` | the one way into the core: GIL detached, errors and panics mapped to Python classes |
//! | `body.rs` | `scan_json`: the size of a JSON body, and its token ids as arrays |
//! | `data.rs` | options and layouts: dicts from and to what serde reads |
//! | `files.rs` | `read_columns`: of a matrix in a file |
//! | `layout.rs` | `LayoutSpec`, `Component` |
//! | `arrays.rs` | numpy arrays owned by Python, borrowed for a call |
//! | `engine.rs` | `Core` |
//! | `plan.rs` | where the fields of a plan lie |
//! | `simulate.rs` | `Trace`, `StepModel`, `Replay` |

mod arrays;
mod body;
mod data;
mod door;
mod engine;
mod files;
mod layout;
mod plan;
mod simulate;

use dsv4_core::cache::Eviction;
use dsv4_core::sched::policy::SnapshotPolicy;
use pyo3::prelude::*;
use pyo3::types::PyTuple;

/// The extension module.
#[pymodule(gil_used = false)]
fn _core(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("build_info", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    m.add_function(wrap_pyfunction!(body::scan_json, m)?)?;
    m.add_function(wrap_pyfunction!(files::read_columns, m)?)?;
    m.add_class::<layout::PyComponent>()?;
    m.add_class::<layout::PyLayoutSpec>()?;
    m.add_class::<engine::PyCore>()?;
    m.add_class::<simulate::PyTrace>()?;
    m.add_class::<simulate::PyStepModel>()?;
    m.add_class::<simulate::PyReplay>()?;
    m.add("EVICTIONS", PyTuple::new(m.py(), Eviction::ALL.map(Eviction::name))?)?;
    m.add("SNAPSHOT_POLICIES", PyTuple::new(m.py(), SnapshotPolicy::names())?)?;
    m.add_function(wrap_pyfunction!(engine::default_options, m)?)?;
    plan::add_to(m)?;
    door::add_exceptions(m)
}

//! Geometry for Python: a layout from plain data, and what follows from it.

use dsv4_core::layout::{Component, Kind, LayoutSpec, Placement};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::data::{from_python, to_python};
use crate::door::enter;

/// One component of the cache with its place in page, slab and snapshot.
#[pyclass(frozen, get_all, name = "Component", module = "dsv4._core")]
pub struct PyComponent {
    name: String,
    kind: &'static str,
    ratio: u32,
    tokens: u32,
    slack: u32,
    rows: u32,
    saved_rows: u32,
    layers: Py<PyTuple>,
    row_bytes: u32,
    format: String,
    offset: u32,
    layer_stride: u32,
    snapshot_offset: u32,
    snapshot_layer_stride: u32,
}

impl PyComponent {
    fn new(py: Python<'_>, c: &Component, place: Placement, rows: u32) -> PyResult<Self> {
        let (kind, ratio, tokens, slack) = match c.kind {
            Kind::Stride { ratio } => ("stride", ratio, 0, 0),
            Kind::Window { tokens, slack } => ("window", 0, tokens, slack),
            Kind::Pool { .. } => ("pool", 0, 0, 0),
        };
        Ok(PyComponent {
            name: c.name.clone(),
            kind,
            ratio,
            tokens,
            slack,
            rows,
            saved_rows: c.saved_rows(),
            layers: PyTuple::new(py, &c.layers)?.unbind(),
            row_bytes: c.row_bytes,
            format: c.format.clone(),
            offset: place.offset,
            layer_stride: place.layer_stride,
            snapshot_offset: place.snapshot_offset,
            snapshot_layer_stride: place.snapshot_layer_stride,
        })
    }
}

#[pymethods]
impl PyComponent {
    fn __repr__(&self, py: Python<'_>) -> String {
        format!("Component({:?}, {}, {} layers)", self.name, self.kind, self.layers.bind(py).len())
    }
}

/// The cache of a model, as data.
#[pyclass(frozen, name = "LayoutSpec", module = "dsv4._core")]
pub struct PyLayoutSpec {
    /// What all else follows from.
    pub spec: LayoutSpec,
    #[pyo3(get)]
    block_tokens: u32,
    #[pyo3(get)]
    ranks: u32,
    #[pyo3(get)]
    window: u32,
    #[pyo3(get)]
    layers: usize,
    #[pyo3(get)]
    page_bytes: u32,
    #[pyo3(get)]
    slab_bytes: u32,
    #[pyo3(get)]
    snapshot_bytes: u32,
    #[pyo3(get)]
    snapshot_pages: u32,
    #[pyo3(get)]
    slab_pages: u32,
    #[pyo3(get)]
    history_bytes_per_token: f64,
    #[pyo3(get)]
    replay_tokens: u32,
    #[pyo3(get)]
    fingerprint: u64,
    #[pyo3(get)]
    components: Py<PyTuple>,
}

#[pymethods]
impl PyLayoutSpec {
    #[new]
    fn new(py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let spec: LayoutSpec = from_python("layout", data)?;
        enter(py, || spec.validate())?;
        let placed = spec.components.iter().zip(spec.placements());
        let parts =
            placed.map(|(c, place)| PyComponent::new(py, c, place, c.rows(spec.block_tokens, spec.ranks)));
        Ok(PyLayoutSpec {
            block_tokens: spec.block_tokens,
            ranks: spec.ranks,
            window: spec.window,
            layers: spec.layers.len(),
            page_bytes: spec.page_bytes(),
            slab_bytes: spec.slab_bytes(),
            snapshot_bytes: spec.snapshot_bytes(),
            snapshot_pages: spec.snapshot_pages(),
            slab_pages: spec.slab_pages(),
            history_bytes_per_token: spec.history_bytes_per_token(),
            replay_tokens: spec.replay_tokens(),
            fingerprint: spec.fingerprint(),
            components: PyTuple::new(py, parts.collect::<PyResult<Vec<_>>>()?)?.unbind(),
            spec,
        })
    }

    fn data<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.spec)
    }

    fn pages_for(&self, bytes: u64) -> u32 {
        self.spec.pages_for(bytes)
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| other.get().spec == self.spec)
    }

    fn __hash__(&self) -> u64 {
        self.fingerprint
    }

    fn __repr__(&self) -> String {
        let (layers, tokens, page, slab) = (self.layers, self.block_tokens, self.page_bytes, self.slab_bytes);
        format!("LayoutSpec({layers} layers, block_tokens={tokens}, page_bytes={page}, slab_bytes={slab})")
    }
}

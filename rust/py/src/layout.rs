//! Geometry for Python: the same numbers under the same names.

use dsv4_core::layout::{Component, Kind, LayoutSpec, Placement, V4Geometry};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::door::enter;

/// One component of the cache with its place in page, slab and snapshot.
#[pyclass(frozen, name = "Component", module = "dsv4._core")]
pub struct PyComponent {
    spec: Component,
    place: Placement,
    rows: u32,
}

#[pymethods]
impl PyComponent {
    #[getter]
    fn name(&self) -> &str {
        &self.spec.name
    }

    #[getter]
    fn kind(&self) -> &'static str {
        match self.spec.kind {
            Kind::Stride { .. } => "stride",
            Kind::Window { .. } => "window",
            Kind::Pool { .. } => "pool",
        }
    }

    #[getter]
    fn ratio(&self) -> u32 {
        if let Kind::Stride { ratio } = self.spec.kind { ratio } else { 0 }
    }

    #[getter]
    fn tokens(&self) -> u32 {
        if let Kind::Window { tokens, .. } = self.spec.kind { tokens } else { 0 }
    }

    #[getter]
    fn slack(&self) -> u32 {
        if let Kind::Window { slack, .. } = self.spec.kind { slack } else { 0 }
    }

    #[getter]
    fn rows(&self) -> u32 {
        self.rows
    }

    #[getter]
    fn saved_rows(&self) -> u32 {
        self.spec.saved_rows()
    }

    #[getter]
    fn layers<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.spec.layers)
    }

    #[getter]
    fn row_bytes(&self) -> u32 {
        self.spec.row_bytes
    }

    #[getter]
    fn format(&self) -> &str {
        &self.spec.format
    }

    #[getter]
    fn offset(&self) -> u32 {
        self.place.offset
    }

    #[getter]
    fn layer_stride(&self) -> u32 {
        self.place.layer_stride
    }

    #[getter]
    fn snapshot_offset(&self) -> u32 {
        self.place.snapshot_offset
    }

    #[getter]
    fn snapshot_layer_stride(&self) -> u32 {
        self.place.snapshot_layer_stride
    }

    fn __repr__(&self) -> String {
        format!("Component({:?}, {}, {} layers)", self.spec.name, self.kind(), self.spec.layers.len())
    }
}

/// The cache of a model, as data.
#[pyclass(frozen, eq, from_py_object, name = "LayoutSpec", module = "dsv4._core")]
#[derive(Clone, PartialEq)]
pub struct PyLayoutSpec(pub LayoutSpec);

#[pymethods]
impl PyLayoutSpec {
    #[staticmethod]
    fn from_json(py: Python<'_>, text: &str) -> PyResult<Self> {
        enter(py, || LayoutSpec::from_json(text)).map(Self)
    }

    fn to_json(&self) -> String {
        self.0.to_json()
    }

    #[staticmethod]
    #[pyo3(signature = (*, compress_ratios, head_dim, index_head_dim, row_bytes, row_format, index_row_bytes,
                        index_format, csa_ratio = 4, hca_ratio = 128, window = 128, block_tokens = 256, draft_slack = 0))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only at the border")]
    fn v4(
        py: Python<'_>,
        compress_ratios: Vec<u32>,
        head_dim: u32,
        index_head_dim: u32,
        row_bytes: u32,
        row_format: String,
        index_row_bytes: u32,
        index_format: String,
        csa_ratio: u32,
        hca_ratio: u32,
        window: u32,
        block_tokens: u32,
        draft_slack: u32,
    ) -> PyResult<Self> {
        let row = (row_bytes, row_format);
        let index_row = (index_row_bytes, index_format);
        let geometry = V4Geometry {
            compress_ratios,
            csa_ratio,
            hca_ratio,
            head_dim,
            index_head_dim,
            window,
            row,
            index_row,
            block_tokens,
            draft_slack,
        };
        enter(py, || LayoutSpec::v4(&geometry)).map(Self)
    }

    #[getter]
    fn block_tokens(&self) -> u32 {
        self.0.block_tokens
    }

    #[getter]
    fn window(&self) -> u32 {
        self.0.window
    }

    #[getter]
    fn layers(&self) -> u32 {
        self.0.layers
    }

    #[getter]
    fn page_bytes(&self) -> u32 {
        self.0.page_bytes()
    }

    #[getter]
    fn slab_bytes(&self) -> u32 {
        self.0.slab_bytes()
    }

    #[getter]
    fn snapshot_bytes(&self) -> u32 {
        self.0.snapshot_bytes()
    }

    #[getter]
    fn snapshot_pages(&self) -> u32 {
        self.0.snapshot_pages()
    }

    #[getter]
    fn slab_pages(&self) -> u32 {
        self.0.slab_pages()
    }

    #[getter]
    fn history_bytes_per_token(&self) -> f64 {
        self.0.history_bytes_per_token()
    }

    #[getter]
    fn replay_tokens(&self) -> u32 {
        self.0.replay_tokens()
    }

    #[getter]
    fn fingerprint(&self) -> u64 {
        self.0.fingerprint()
    }

    #[getter]
    fn components<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        let placed = self.0.components.iter().zip(self.0.placements());
        let all = placed.map(|(spec, place)| {
            Py::new(py, PyComponent { spec: spec.clone(), place, rows: spec.rows(self.0.block_tokens) })
        });
        PyTuple::new(py, all.collect::<PyResult<Vec<_>>>()?)
    }

    fn pages_for(&self, bytes: u64) -> u32 {
        self.0.pages_for(bytes)
    }

    fn __hash__(&self) -> u64 {
        self.0.fingerprint()
    }

    fn __repr__(&self) -> String {
        let l = &self.0;
        format!(
            "LayoutSpec({} layers, block_tokens={}, page_bytes={}, slab_bytes={})",
            l.layers,
            l.block_tokens,
            l.page_bytes(),
            l.slab_bytes()
        )
    }
}

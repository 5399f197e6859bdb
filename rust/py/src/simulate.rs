//! Traces, step models and replays for Python.

use std::fs::File;
use std::io::BufReader;
use std::sync::{Arc, Mutex};

use dsv4_core::Options;
use dsv4_sim::replay::best::Blocks;
use dsv4_sim::replay::clock::{Row, StepModel};
use dsv4_sim::replay::run::{Replay, Settings};
use dsv4_sim::replay::trace::{TimeUnit, Trace, TraceError};
use pyo3::prelude::*;

use crate::data::from_python;
use crate::door::{Failure, enter, enter_locked};
use crate::layout::PyLayoutSpec;

/// A request trace.
#[pyclass(frozen, name = "Trace", module = "dsv4._core")]
pub struct PyTrace {
    trace: Arc<Trace>,
    /// Its blocks in the size asked for last.
    blocks: Mutex<Option<(u32, Arc<Blocks>)>>,
}

impl PyTrace {
    fn blocks(&self, block: u32) -> Arc<Blocks> {
        let mut kept = self.blocks.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match &*kept {
            Some((size, blocks)) if *size == block => blocks.clone(),
            _ => {
                let blocks = Arc::new(Blocks::new(&self.trace, block));
                *kept = Some((block, blocks.clone()));
                blocks
            }
        }
    }
}

/// What the system says, without its number: "No such file or directory".
fn reason(e: &std::io::Error) -> String {
    let text = e.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}

#[pymethods]
impl PyTrace {
    #[staticmethod]
    #[pyo3(signature = (paths, *, hash_block = 512, limit = None, speed = 1.0, rate = None, time_unit = "ms"))]
    fn read(
        py: Python<'_>,
        paths: Vec<String>,
        hash_block: u32,
        limit: Option<usize>,
        speed: f64,
        rate: Option<f64>,
        time_unit: &str,
    ) -> PyResult<Self> {
        let trace = enter(py, || -> Result<Trace, Failure> {
            let unit = TimeUnit::of(time_unit)
                .ok_or_else(|| Failure::Invalid(format!("time_unit is {time_unit:?}; it must be ms or s")))?;
            let mut trace = Trace::new(hash_block)?.with_times_in(unit);
            for path in &paths {
                let what = |e: std::io::Error| TraceError::File { file: path.clone(), what: reason(&e) };
                trace.read(path, BufReader::new(File::open(path).map_err(what)?))?;
            }
            limit.into_iter().for_each(|n| trace.truncate(n));
            let now = trace.requests().len() as f64 / trace.seconds();
            for (name, value, factor) in
                [("speed", Some(speed), speed), ("rate", rate, rate.unwrap_or(now) / now)]
            {
                let Some(value) = value else { continue };
                if !(factor.is_finite() && factor > 0.0) {
                    let what = format!(
                        "{name} is {value}; it must be above 0, and all requests may not come at once"
                    );
                    return Err(Failure::Invalid(what));
                }
                trace.speed_up(factor);
            }
            Ok(trace)
        })?;
        Ok(PyTrace { trace: Arc::new(trace), blocks: Mutex::new(None) })
    }

    fn __len__(&self) -> usize {
        self.trace.requests().len()
    }

    #[getter]
    fn prompt_tokens(&self) -> u64 {
        self.trace.requests().iter().map(|r| u64::from(r.input)).sum()
    }

    #[getter]
    fn output_tokens(&self) -> u64 {
        self.trace.requests().iter().map(|r| u64::from(r.output)).sum()
    }

    #[getter]
    fn longest_prompt(&self) -> u32 {
        self.trace.requests().iter().map(|r| r.input).max().unwrap_or(0)
    }

    #[getter]
    fn seconds(&self) -> f64 {
        self.trace.seconds()
    }

    #[getter]
    fn tenants(&self) -> Vec<String> {
        self.trace.tenants().to_vec()
    }

    #[getter]
    fn skipped(&self) -> Vec<String> {
        self.trace.skipped().map(str::to_owned).collect()
    }
}

/// Time of a step.
#[pyclass(frozen, name = "StepModel", module = "dsv4._core")]
pub struct PyStepModel(StepModel);

#[pymethods]
impl PyStepModel {
    #[new]
    fn new(py: Python<'_>, coefficients: &Bound<'_, PyAny>) -> PyResult<Self> {
        let model: StepModel = from_python("step model", coefficients)?;
        enter(py, || model.validate().map_err(Failure::Invalid))?;
        Ok(Self(model))
    }

    /// (fixed us, [(reads us, arithmetic us)]) of rows (start, tokens).
    fn parts(&self, rows: Vec<(u32, u32)>, copies: u32) -> (f64, Vec<(f64, f64)>) {
        let rows = rows.into_iter().map(|(start, len)| Row { start, len });
        let parts = self.0.parts(rows, copies);
        (parts.fixed_us, parts.pairs)
    }
}

/// A replay in progress.
#[pyclass(frozen, name = "Replay", module = "dsv4._core")]
pub struct PyReplay {
    replay: Mutex<Replay>,
    trace: Py<PyTrace>,
    block: u32,
}

#[pymethods]
impl PyReplay {
    #[new]
    #[pyo3(signature = (trace, layout, options, *, model = None, sequential = false))]
    fn new(
        py: Python<'_>,
        trace: Py<PyTrace>,
        layout: &PyLayoutSpec,
        options: &Bound<'_, PyAny>,
        model: Option<&PyStepModel>,
        sequential: bool,
    ) -> PyResult<Self> {
        let mut options: Options = from_python("options", options)?;
        let shared = trace.get().trace.clone();
        let (layout, model) = (&layout.spec, model.map(|m| m.0.clone()));
        let replay = enter(py, || -> Result<Replay, Failure> {
            if let Some(model) = &model {
                (options.cost, options.step_cost) = model.cost(options.max_step_tokens);
            }
            Ok(Replay::new(shared, layout, Settings { options, model: model.filter(|_| !sequential) })?)
        })?;
        Ok(PyReplay { replay: Mutex::new(replay), trace, block: layout.block_tokens })
    }

    #[staticmethod]
    fn resume(py: Python<'_>, dump: &str, layout: &PyLayoutSpec, model: &PyStepModel) -> PyResult<Self> {
        let (layout, model) = (&layout.spec, model.0.clone());
        let replay = enter(py, || Replay::resume(dump, layout, model))?;
        let trace = Py::new(py, PyTrace { trace: replay.trace().clone(), blocks: Mutex::new(None) })?;
        Ok(PyReplay { replay: Mutex::new(replay), trace, block: layout.block_tokens })
    }

    /// Up to `steps` further steps: (requests over, requests in all, virtual s, steps).
    fn run(&self, py: Python<'_>, steps: u64) -> PyResult<(u64, u64, f64, u64)> {
        let p = enter_locked(py, &self.replay, |replay| Ok(replay.run(steps)?))?;
        Ok((p.done, p.total, p.virtual_s, p.steps))
    }

    fn report(&self, py: Python<'_>) -> PyResult<String> {
        let trace = self.trace.get();
        enter_locked(py, &self.replay, |replay| {
            let report = replay.report(&trace.blocks(self.block));
            serde_json::to_string(&report)
                .map_err(|e| Failure::Damaged(format!("the report is no JSON: {e}")))
        })
    }

    fn check(&self, py: Python<'_>) -> PyResult<()> {
        enter_locked(py, &self.replay, |replay| Ok(replay.check()?))
    }
}

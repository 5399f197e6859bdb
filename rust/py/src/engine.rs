//! `Core` for Python. A mutex guards it; the engine thread is its only user in practice.

use std::sync::Mutex;

use dsv4_core::cache::Change;
use dsv4_core::event::EVENT_WIDTH;
use dsv4_core::ids::{PinId, RequestId, Step};
use dsv4_core::sched::request::{Retention, Submit};
use dsv4_core::{Core, Options};
use numpy::PyArray1;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};

use crate::arrays::{counts_of, tokens_in, tokens_of, writable};
use crate::data::{from_python, to_python};
use crate::door::{enter, enter_locked};
use crate::layout::PyLayoutSpec;
use crate::plan::data_of;

/// Every option of a core with its default.
#[pyfunction]
pub fn default_options(py: Python<'_>) -> PyResult<Bound<'_, PyAny>> {
    to_python(py, &Options::default())
}

/// Changes of the cache as tuples: blocks that were stored (blocks, parent, tokens, salt, session), or removed (blocks,).
fn changes_of(py: Python<'_>, changes: Vec<Change>) -> PyResult<Bound<'_, PyList>> {
    let tuple = |change| match change {
        Change::Stored { parent, blocks, tokens, salt, session } => {
            let tokens = PyArray1::from_vec(py, tokens);
            (blocks, parent, tokens, PyBytes::new(py, &salt), session).into_pyobject(py)
        }
        Change::Removed { blocks } => (blocks,).into_pyobject(py),
    };
    PyList::new(py, changes.into_iter().map(tuple).collect::<PyResult<Vec<Bound<'_, PyTuple>>>>()?)
}

/// Scheduler and cache.
#[pyclass(frozen, name = "Core", module = "dsv4._core")]
pub struct PyCore {
    core: Mutex<Core>,
}

#[pymethods]
impl PyCore {
    #[new]
    #[pyo3(signature = (layout, options))]
    fn new(py: Python<'_>, layout: &PyLayoutSpec, options: &Bound<'_, PyAny>) -> PyResult<Self> {
        let options: Options = from_python("options", options)?;
        let core = enter(py, || Core::new(&layout.spec, options))?;
        Ok(PyCore { core: Mutex::new(core) })
    }

    #[pyo3(signature = (req, prompt, *, max_new = None, stop_ids = Vec::new(), salt = Vec::new(), priority = 0,
                        all_logits = false, tenant = 0, deadline_us = None, session = None, ttl_us = None, retention = 0,
                        parent = None),
           text_signature = "($self, req, prompt, *, max_new=None, stop_ids=(), salt=b'', priority=0, all_logits=False, \
tenant=0, deadline_us=None, session=None, ttl_us=None, retention=0, parent=None)")]
    #[expect(clippy::too_many_arguments, reason = "keyword-only at the border")]
    fn submit(
        &self,
        py: Python<'_>,
        req: u64,
        prompt: &Bound<'_, PyAny>,
        max_new: Option<u32>,
        stop_ids: Vec<u32>,
        salt: Vec<u8>,
        priority: i32,
        all_logits: bool,
        tenant: u32,
        deadline_us: Option<u64>,
        session: Option<u64>,
        ttl_us: Option<u64>,
        retention: i32,
        parent: Option<u64>,
    ) -> PyResult<()> {
        let room = |n| enter_locked(py, &self.core, |core| Ok(core.room_for_prompt(n)));
        let submit = Submit {
            id: RequestId(req),
            prompt: tokens_in("prompt", prompt, room)?,
            max_new,
            stop_ids,
            salt,
            priority,
            all_logits,
            tenant,
            deadline_us,
            retention: Retention { session, ttl_us, priority: retention },
        };
        enter_locked(py, &self.core, |core| match parent {
            Some(parent) => Ok(core.fork(RequestId(parent), submit)?),
            None => Ok(core.submit(submit)?),
        })
    }

    fn set_time(&self, py: Python<'_>, now_us: u64) -> PyResult<()> {
        enter_locked(py, &self.core, |core| {
            core.set_time(now_us);
            Ok(())
        })
    }

    fn observe(&self, py: Python<'_>, step: u64, us: f64) -> PyResult<()> {
        enter_locked(py, &self.core, |core| {
            core.observe(Step(step), us);
            Ok(())
        })
    }

    #[pyo3(signature = (salt, tokens))]
    fn pin(&self, py: Python<'_>, salt: Vec<u8>, tokens: &Bound<'_, PyAny>) -> PyResult<u64> {
        let tokens = tokens_of("tokens", tokens)?;
        enter_locked(py, &self.core, |core| Ok(core.pin(&salt, &tokens).0))
    }

    fn unpin(&self, py: Python<'_>, pin: u64) -> PyResult<bool> {
        enter_locked(py, &self.core, |core| Ok(core.unpin(PinId(pin))))
    }

    fn end_session(&self, py: Python<'_>, session: u64) -> PyResult<bool> {
        enter_locked(py, &self.core, |core| Ok(core.end_session(session)))
    }

    fn tenants<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let all = PyDict::new(py);
        for (id, share) in enter_locked(py, &self.core, |core| Ok(core.tenants()))? {
            let one = PyDict::new(py);
            one.set_item("live", share.live)?;
            one.set_item("tokens", share.tokens)?;
            one.set_item("prefill_us", share.prefill_us)?;
            all.set_item(id, one)?;
        }
        Ok(all)
    }

    fn abort(&self, py: Python<'_>, req: u64) -> PyResult<bool> {
        enter_locked(py, &self.core, |core| Ok(core.abort(RequestId(req))?))
    }

    fn stop(&self, py: Python<'_>, req: u64) -> PyResult<bool> {
        enter_locked(py, &self.core, |core| Ok(core.stop(RequestId(req))?))
    }

    fn plan_schema<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let schema = enter_locked(py, &self.core, |core| Ok(core.plan_schema().clone()))?;
        data_of(py, &schema)
    }

    fn plan(&self, py: Python<'_>, out: &Bound<'_, PyAny>) -> PyResult<bool> {
        let mut out = writable::<i32>("plan", out, 1, None)?;
        let words = out.as_slice_mut()?;
        enter_locked(py, &self.core, |core| Ok(core.plan(words)?.is_some()))
    }

    fn commit(
        &self,
        py: Python<'_>,
        step: u64,
        tokens: &Bound<'_, PyAny>,
        accepted: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let (tokens, accepted) = (tokens_of("tokens", tokens)?, counts_of("accepted", accepted)?);
        enter_locked(py, &self.core, |core| Ok(core.commit(Step(step), &tokens, &accepted)?))
    }

    fn rollback(&self, py: Python<'_>, step: u64) -> PyResult<()> {
        enter_locked(py, &self.core, |core| Ok(core.rollback(Step(step))?))
    }

    fn events(&self, py: Python<'_>, out: &Bound<'_, PyAny>) -> PyResult<usize> {
        let mut out = writable::<i64>("out", out, 2, Some(EVENT_WIDTH))?;
        let rows = out.as_slice_mut()?;
        enter_locked(py, &self.core, |core| Ok(core.events_into(rows)))
    }

    fn cache_changes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        changes_of(py, enter_locked(py, &self.core, |core| Ok(core.cache_changes()))?)
    }

    fn cache_picture<'py>(&self, py: Python<'py>) -> PyResult<(Bound<'py, PyList>, Bound<'py, PyList>)> {
        let (changes, all) = enter_locked(py, &self.core, |core| Ok(core.cache_picture()))?;
        Ok((changes_of(py, changes)?, changes_of(py, all)?))
    }

    fn explain<'py>(&self, py: Python<'py>, req: u64) -> PyResult<Bound<'py, PyDict>> {
        let e = enter_locked(py, &self.core, |core| Ok(core.explain(RequestId(req))?))?;
        let dict = PyDict::new(py);
        dict.set_item("prompt_tokens", e.prompt_tokens)?;
        dict.set_item("history_matched", e.history_matched)?;
        dict.set_item("resumed_at", e.resumed_at)?;
        dict.set_item("replayed", e.replayed)?;
        dict.set_item("cached_tokens", e.cached_tokens())?;
        dict.set_item("reason", e.reason.name())?;
        dict.set_item("preemptions", e.preemptions)?;
        Ok(dict)
    }

    fn forget(&self, py: Python<'_>, req: u64) -> PyResult<bool> {
        enter_locked(py, &self.core, |core| Ok(core.forget(RequestId(req))))
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        for (name, value) in enter_locked(py, &self.core, |core| Ok(core.stats()))? {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    fn dump(&self, py: Python<'_>) -> PyResult<String> {
        enter_locked(py, &self.core, |core| Ok(core.dump()))
    }

    fn check(&self, py: Python<'_>) -> PyResult<()> {
        enter_locked(py, &self.core, |core| Ok(core.check()?))
    }

    fn evict_snapshots(&self, py: Python<'_>, n: u32) -> PyResult<u32> {
        enter_locked(py, &self.core, |core| Ok(core.evict_snapshots(n)))
    }

    fn evict_history(&self, py: Python<'_>, n: u32) -> PyResult<u32> {
        enter_locked(py, &self.core, |core| Ok(core.evict_history(n)))
    }

    fn clear_prefix(&self, py: Python<'_>) -> PyResult<u32> {
        enter_locked(py, &self.core, |core| Ok(core.clear_prefix()))
    }

    fn has_work(&self, py: Python<'_>) -> PyResult<bool> {
        enter_locked(py, &self.core, |core| Ok(core.has_work()))
    }
}

//! The one door between Python and the core.
//!
//! Every call detaches the GIL, runs the core, and turns what comes back into Python: refusals become the class that
//! fits, damage and panics become `CorruptState`, after which the engine must stop.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use dsv4_core::error::{CoreError, Malformed};
use dsv4_sim::replay::trace::TraceError;
use pyo3::exceptions::{PyException, PyKeyError, PyValueError};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};

/// What can come out of the core besides a value.
pub enum Failure {
    /// A refusal: bad input or no room.
    Refused(CoreError),
    /// Bad input to something beside the core: a trace, a step model.
    Invalid(String),
    /// Broken invariants: our bug.
    Damaged(String),
}

impl From<TraceError> for Failure {
    fn from(e: TraceError) -> Self {
        Failure::Invalid(e.to_string())
    }
}

impl From<CoreError> for Failure {
    fn from(e: CoreError) -> Self {
        Failure::Refused(e)
    }
}

impl From<Malformed> for Failure {
    fn from(e: Malformed) -> Self {
        Failure::Damaged(e.to_string())
    }
}

/// Runs `call` without the GIL. A panic does not cross the border: it is reported as damage.
pub fn enter<T: Send, E: Into<Failure> + Send>(
    py: Python<'_>,
    call: impl FnOnce() -> Result<T, E> + Send,
) -> PyResult<T> {
    let outcome = py.detach(|| catch_unwind(AssertUnwindSafe(call)).map(|r| r.map_err(Into::into)));
    let failure = match outcome {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(failure)) => failure,
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text =
                text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic without a message");
            Failure::Damaged(format!("the core panicked: {text}"))
        }
    };
    Err(to_python(py, failure))
}

/// [`enter`] with what the mutex guards. After a panic its state cannot be trusted, so nothing is called any more.
pub fn enter_locked<S: Send, T: Send>(
    py: Python<'_>,
    guarded: &Mutex<S>,
    call: impl FnOnce(&mut S) -> Result<T, Failure> + Send,
) -> PyResult<T> {
    enter(py, || match guarded.lock() {
        Ok(mut state) => call(&mut state),
        Err(_) => Err(Failure::Damaged("the core panicked in an earlier call".to_owned())),
    })
}

/// The error of an array or argument that cannot be used, named with what it must be.
pub fn config_error(py: Python<'_>, field: &str, value: impl ToString, expected: impl ToString) -> PyErr {
    let (field, value, expected) = (field.to_owned(), value.to_string(), expected.to_string());
    to_python(py, Failure::Refused(CoreError::Config { field, value, expected }))
}

fn to_python(py: Python<'_>, failure: Failure) -> PyErr {
    let (class, text) = match failure {
        Failure::Damaged(text) => (Class::CorruptState, text),
        Failure::Invalid(text) => (Class::ConfigError, text),
        Failure::Refused(e) => {
            let class = match e {
                CoreError::Config { .. } | CoreError::TooLong { .. } | CoreError::EmptyPrompt(_) => {
                    Class::ConfigError
                }
                CoreError::Overloaded { .. } => Class::Overloaded,
                CoreError::NeverFits { .. } => Class::NeverFits,
                CoreError::UnknownRequest(_) => Class::UnknownRequest,
                _ => Class::Dsv4Error,
            };
            (class, e.to_string())
        }
    };
    match exceptions(py) {
        Ok(classes) => PyErr::from_type(classes[class as usize].bind(py).clone(), text),
        Err(e) => e,
    }
}

/// Index into the table of exception classes.
#[derive(Clone, Copy)]
enum Class {
    Dsv4Error,
    ConfigError,
    UnknownRequest,
    Overloaded,
    NeverFits,
    CorruptState,
}

/// Name, docstring, and the builtin that it also is (so `except ValueError` works too).
const CLASSES: [(&str, &str, Builtin); 6] = [
    ("Dsv4Error", "Base of all errors of the core.", Builtin::None),
    ("ConfigError", "An option, array or prompt that cannot work; the message names it.", Builtin::Value),
    ("UnknownRequest", "No request of this id is known.", Builtin::Key),
    ("Overloaded", "The waiting queue is full; try again later.", Builtin::None),
    ("NeverFits", "The request needs more pages than the pool has, even alone.", Builtin::Value),
    ("CorruptState", "An invariant of the core is broken; the engine must stop.", Builtin::None),
];

#[derive(Clone, Copy)]
enum Builtin {
    None,
    Value,
    Key,
}

static EXCEPTIONS: PyOnceLock<Vec<Py<PyType>>> = PyOnceLock::new();

/// Built with `type(name, bases, dict)`: the macros of PyO3 know one base only.
fn exceptions(py: Python<'_>) -> PyResult<&Vec<Py<PyType>>> {
    EXCEPTIONS.get_or_try_init(py, || {
        let mut made: Vec<Py<PyType>> = Vec::with_capacity(CLASSES.len());
        for (name, doc, builtin) in CLASSES {
            let root = made.first().map_or(py.get_type::<PyException>(), |t| t.bind(py).clone());
            let bases = match builtin {
                Builtin::None => PyTuple::new(py, [root])?,
                Builtin::Value => PyTuple::new(py, [root, py.get_type::<PyValueError>()])?,
                Builtin::Key => PyTuple::new(py, [root, py.get_type::<PyKeyError>()])?,
            };
            let body = PyDict::new(py);
            body.set_item("__module__", "dsv4._core")?;
            body.set_item("__doc__", doc)?;
            if matches!(builtin, Builtin::Key) {
                // KeyError would print the repr of the message.
                body.set_item("__str__", py.get_type::<PyException>().getattr("__str__")?)?;
            }
            let class = py.get_type::<PyType>().call1((name, bases, body))?;
            made.push(class.cast_into::<PyType>()?.unbind());
        }
        Ok(made)
    })
}

/// Puts the exception classes into the module.
pub fn add_exceptions(m: &Bound<'_, PyModule>) -> PyResult<()> {
    for (class, (name, ..)) in exceptions(m.py())?.iter().zip(CLASSES) {
        m.add(name, class.bind(m.py()))?;
    }
    Ok(())
}

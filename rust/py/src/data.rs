//! Plain Python data as what the core reads, and back. Nothing is passed over: a key that is not known is refused with the
//! nearest one that is.

use pyo3::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::door::config_error;

/// Reads a dict. Raises ConfigError, which names the key by its path, such as `cost.token_us`.
pub fn from_python<T: DeserializeOwned>(what: &str, value: &Bound<'_, PyAny>) -> PyResult<T> {
    let mut reader = pythonize::Depythonizer::from_object(value);
    serde_path_to_error::deserialize(&mut reader).map_err(|e| {
        let (path, said) = (e.path().to_string(), e.inner().to_string());
        let path = if path == "." { what.to_owned() } else { path };
        let py = value.py();
        match wrong_name(&said) {
            Some((name, nearest, known)) if said.starts_with("unknown field") => {
                let parent = path.strip_suffix(name).unwrap_or(&path).trim_end_matches('.');
                let place = if parent.is_empty() { what } else { parent };
                let is = format!("with the unknown key {name:?}");
                config_error(py, place, is, format!("did you mean {nearest:?}? Keys are {known}"))
            }
            Some((name, nearest, known)) => {
                let expected = format!("did you mean {nearest:?}? Valid values are {known}");
                config_error(py, &path, format!("{name:?}"), expected)
            }
            // The core's own refusals name their field.
            None => match said.split_once("; ").map(|(is, expected)| (is.split_once(" is "), expected)) {
                Some((Some((field, is)), expected)) => config_error(py, field, is, expected),
                _ => config_error(py, &path, "not usable", said),
            },
        }
    })
}

/// Data as Python's dicts and lists.
pub fn to_python<'py>(py: Python<'py>, data: &impl Serialize) -> PyResult<Bound<'py, PyAny>> {
    Ok(pythonize::pythonize(py, data)?)
}

/// The name that serde does not know, the nearest one, and all: "unknown field `a`, expected one of `b`, `c`".
fn wrong_name(said: &str) -> Option<(&str, &str, String)> {
    let mut quoted = said.strip_prefix("unknown ")?.split('`').skip(1).step_by(2);
    let (name, known) = (quoted.next()?, quoted.collect::<Vec<_>>());
    let alike = |k: &str| strsim::jaro_winkler(name, k);
    let nearest = known.iter().copied().max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    Some((name, nearest, known.join(", ")))
}

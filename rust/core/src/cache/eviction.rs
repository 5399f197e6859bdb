//! Which cached page goes first.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::CoreError;

/// The value of `eviction`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Eviction {
    /// What saves least: recomputation saved times likelihood of reuse, per byte.
    #[default]
    Value,
    /// The least recently used.
    Lru,
    /// The oldest, used or not.
    Fifo,
}

impl Eviction {
    /// Every value, in the order of messages.
    pub const ALL: [Eviction; 3] = [Eviction::Value, Eviction::Lru, Eviction::Fifo];

    /// As it reads in settings.
    pub fn name(self) -> &'static str {
        match self {
            Eviction::Value => "value",
            Eviction::Lru => "lru",
            Eviction::Fifo => "fifo",
        }
    }
}

impl FromStr for Eviction {
    type Err = CoreError;

    fn from_str(text: &str) -> Result<Self, CoreError> {
        let found = Self::ALL.into_iter().find(|e| e.name() == text);
        found.ok_or_else(|| {
            CoreError::config("eviction", format!("{text:?}"), "valid values are value, lru, fifo")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_reads_as_it_is_written_and_another_is_refused_with_them() {
        for eviction in Eviction::ALL {
            assert_eq!(eviction.name().parse::<Eviction>().unwrap(), eviction);
        }
        let refused = "mru".parse::<Eviction>().unwrap_err().to_string();
        assert!(
            refused.contains("\"mru\"") && Eviction::ALL.iter().all(|e| refused.contains(e.name())),
            "{refused}"
        );
    }
}

//! What the owner of a prefix says about its later use.

/// A hint of a request's owner: how its prefix will be used again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Retention {
    /// Requests with the same key continue each other (`prompt_cache_key`).
    pub session: Option<u64>,
    /// Keep it for at least so long after its last use (`cache_control.ttl`).
    pub ttl_us: Option<u64>,
    /// Higher goes later when memory is short.
    pub priority: i32,
}

/// Who uses a prefix, and what is known of its later use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hint {
    /// Whose share of the pool it takes; see [`crate::core::Tenant`].
    pub tenant: u32,
    /// The owner's hint.
    pub retention: Retention,
}

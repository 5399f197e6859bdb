"""The bytes: page pool and slabs as torch storage, and row views of them. Who owns which page is the core's
affair."""

from __future__ import annotations

from dsv4.cache.paged import PagedCache
from dsv4.cache.rows import Rows

__all__ = ["PagedCache", "Rows"]

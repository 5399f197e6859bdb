"""A step's plan: one buffer that the core writes and Python owns, read by field.

The fields are the core's (`_core.pyi`, PlanSchema; declared in `rust/core/src/plan/schema.rs`); none is named here. The core
keeps no pointer to a buffer, so any number of them may take turns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from dsv4._core import PlanSchema


class StepPlan:
    """`words` int32 is what `Core.plan` fills. A field is an attribute: a number of the header is an int, any other field an
    array [n, ...] of which n is what the step uses, int32 or int64, a view of `words`."""

    def __init__(self, schema: PlanSchema, *, pinned: bool = False) -> None:
        """`pinned`: in page-locked memory, from which a GPU copies by itself."""
        self.words = words((schema["words"],), pinned=pinned)
        self.words[:] = 0
        self._fields: dict[str, tuple[str, np.ndarray]] = {}
        for field in schema["fields"]:
            size = 2 if field["dtype"] == "int64" else 1
            for n in field["shape"]:
                size *= n
            own = self.words[field["offset"] : field["offset"] + size].view(field["dtype"])
            self._fields[field["name"]] = (field["section"], own.reshape(field["shape"]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._fields:
            raise AttributeError(f"a plan has no field {name!r}")
        section, values = self._fields[name]
        # A section's elements are counted by the number of its name in the header.
        return int(values) if section == "header" else values[: int(self._fields[section][1])]

    def packed(self) -> np.ndarray:
        """int32 [n], a copy: what the step uses of each field, one after the other."""
        return np.concatenate([part.view(np.int32) for part in self._used()])

    def unpack(self, words: np.ndarray) -> None:
        """Becomes the plan of the same schema that `words` int32 [n] was packed from."""
        at = 0
        for part in self._used():  # the header, which says how long the others are, comes first
            own = part.view(np.int32)
            own[:] = words[at : at + len(own)]
            at += len(own)

    def _used(self) -> Iterator[np.ndarray]:
        for section, values in self._fields.values():
            yield (values[None] if section == "header" else values[: int(self._fields[section][1])]).reshape(
                -1
            )


def words(shape: tuple[int, ...], *, pinned: bool) -> np.ndarray:
    """int32 of a shape, whatever they are. `pinned`: in page-locked memory, which a copy to a GPU that is under way keeps from others."""
    if not pinned:
        return np.empty(shape, np.int32)
    import torch  # a plan without a device needs none of it

    made: np.ndarray = torch.empty(shape, dtype=torch.int32, pin_memory=True).numpy()
    return made

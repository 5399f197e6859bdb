"""Weights under a common prefix."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from dsv4.model.stack import Stack
from dsv4.ops.registry import Ops
from dsv4.ops.weight import Gated, Weight
from dsv4.ops.weight import part as part_of

if TYPE_CHECKING:
    from dsv4.model.rank import Rank


@dataclass(frozen=True, slots=True)
class Scope:
    """`Scope(weights, ops, prefix="layers.3.attn.")["wq_a.weight"]`. A missing tensor is a KeyError with its full name.

    `consume`: experts and what is stacked are taken out of the mapping, so that a backend's form of them needs no second copy. `rank`: whose
    weights they are, where several ranks run the model.
    """

    weights: MutableMapping[str, Weight]
    ops: Ops
    prefix: str = ""
    consume: bool = False
    rank: Rank | None = None
    _used: list[int] = field(default_factory=lambda: [0])

    def __getitem__(self, name: str) -> Tensor:
        """A tensor that is never quantised, in the model's dtype or as stored."""
        value = self.weights[self.prefix + name]
        assert isinstance(value, Tensor), f"{self.prefix}{name} is quantised; ask for it with `matrix`"
        self._used[0] += value.nbytes
        return value

    def float(self, name: str) -> Tensor:
        """As float32, for what is computed in float32 whatever the model's dtype."""
        return self[name].float()

    def matrix(self, op: str, name: str) -> Any:
        """A matrix in the form that the op wants."""
        return self._prepared(op, self.weights[self.prefix + name])

    def parts(self, op: str, name: str, axis: int, parts: int) -> list[Any]:
        """A matrix cut into equal parts along its rows (axis 0) or columns (1), each in the form that the op wants."""
        weight = self.weights[self.prefix + name]
        step = weight.shape[axis] // parts
        return [self._prepared(op, part_of(weight, axis, i * step, (i + 1) * step)) for i in range(parts)]

    def gated(self, op: str, name: str, suffix: str = "") -> Any:
        """The matrices `name`.w1, w3 and w2 in the form that the op wants."""
        names = [f"{self.prefix}{name}.{part}{suffix}" for part in Gated._fields]
        take = self.weights.pop if self.consume else self.weights.__getitem__
        return self._prepared(op, Gated(*map(take, names)))

    def stack(self, op: str, *parts: tuple[str, ...]) -> Stack:
        """Matrices of the same input, multiplied at once: of each result their names below."""
        take = self.weights.pop if self.consume else self.weights.__getitem__
        stack = Stack(self.ops, op, [[take(self.prefix + name) for name in names] for names in parts])
        self._used[0] += sum(w.nbytes for w in stack.matrices)
        return stack

    def within(self, prefix: str) -> Scope:
        """The scope below."""
        return Scope(self.weights, self.ops, f"{self.prefix}{prefix}.", self.consume, self.rank, self._used)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights handed out so far, from any scope of the same root, in the form they were given."""
        return self._used[0]

    def _prepared(self, op: str, weight: Weight | Gated) -> Any:
        value = self.ops.prepare(op, weight)
        self._used[0] += sum(w.nbytes for w in value) if isinstance(value, Gated) else value.nbytes
        return value

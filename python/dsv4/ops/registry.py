"""Chooses among the forms of every op: by machine and by the names in `--backend` at start, by a call's arguments when it comes. Nothing
is imported for a form that cannot be reached."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from dsv4.errors import ConfigError
from dsv4.ops.forms import Form, Machine
from dsv4.ops.forms import at as condition
from dsv4.ops.spec import SPECS
from dsv4.spelling import nearest

Op = Callable[..., Any]

WEIGHT_AT = {
    op: i for op, spec in SPECS.items() for i, a in enumerate(spec.args) if a.dtype in ("weight", "gated")
}
"""Place of an op's matrices among its arguments."""


class Registry:
    """Forms by op, in the order in which `auto` takes them: that in which they were added."""

    def __init__(self, forms: Iterable[Form] = ()) -> None:
        self._forms: dict[str, list[Form]] = {op: [] for op in SPECS}
        self._names: dict[str, None] = {}  # in the order in which they came
        for form in forms:
            self.add(form)

    def add(self, form: Form) -> None:
        """Raises ConfigError when the op is unknown or has this form already."""
        if form.op not in self._forms:
            known = ", ".join(self._forms)
            raise ConfigError(f"op {form.op!r} is unknown; known: {known}{nearest(form.op, self._forms)}")
        if any(f.label == form.label for f in self._forms[form.op]):
            raise ConfigError(f"op {form.op!r} has a form {form.label!r} already; add it once")
        self._forms[form.op].append(form)
        self._names[form.backend] = None

    def forms(self, op: str | None = None) -> list[Form]:
        """Of one op, or of all."""
        return [f for name in (SPECS if op is None else (op,)) for f in self._forms[name]]

    def backends(self, op: str | None = None) -> tuple[str, ...]:
        """Names of the backends of one op, or of all."""
        here = {f.backend for f in self.forms(op)}
        return tuple(name for name in self._names if name in here)

    def usable(self, machine: Machine, *, untried: bool = False) -> dict[str, list[Form]]:
        """Backend -> its forms that run on `machine`; with `untried` those of them that never did."""
        found: dict[str, list[Form]] = {name: [] for name in self.backends()}
        for form in self.forms():
            if form.runs(machine) and (not untried or form.untried):
                found[form.backend].append(form)
        return {name: forms for name, forms in found.items() if forms}

    def runs(self, op: str, backend: str, machine: Machine) -> bool:
        """Whether the backend has a form of the op for this machine."""
        return any(f.backend == backend and f.runs(machine) for f in self._forms[op])

    def chain(
        self, op: str, backend: str, machine: Machine, *, deterministic: bool = False
    ) -> tuple[Form, ...]:
        """The forms that may run calls of this op, the first that fits a call runs it: those of the named backends
        ("gluon,triton") in that order, then what `auto` takes, which is what was tried. It ends with one that takes any call.

        `deterministic`: forms of one family for the same weights and shapes. They may all have conditions then. Raises ConfigError
        where there are none."""
        forms = [f for f in self._ordered(op, backend.split(",")) if f.runs(machine)]
        if deterministic:
            return _families(op, forms, machine)
        return self._cut([f for f in forms if not f.deterministic], backend)

    def _ordered(self, op: str, names: list[str]) -> list[Form]:
        ranked = sorted(
            self._forms[op], key=lambda f: names.index(f.backend) if f.backend in names else len(names)
        )
        return [f for f in ranked if f.backend in names or not f.untried]

    @staticmethod
    def _cut(forms: list[Form], backend: str) -> tuple[Form, ...]:
        for i, form in enumerate(forms):
            if not form.conditional:
                return tuple(forms[: i + 1])
        raise ConfigError(f"backend {backend!r} leaves an op without a form for every call")

    def load(self, op: str, backend: str, machine: Machine | None = None) -> Op:
        """One op by one backend, and by others what it does not fit. On a machine for which the backend has no form of it (a test's
        interpreter) all of them are taken."""
        machine = machine or Machine.here("cuda")
        mine = [f for f in self._forms[op] if f.backend == backend and not f.deterministic]
        mine = [f for f in mine if f.runs(machine)] or mine
        rest = [f for f in self.chain(op, "auto", machine) if f.backend != backend]
        return dispatcher(op, self._cut([*mine, *rest], backend))


def _families(op: str, forms: list[Form], machine: Machine) -> tuple[Form, ...]:
    """Those of them that are of a family, family by family. The first family that takes a weight of such a shape takes all of its
    calls, so a family of which some calls would reach the next is left out."""
    found: list[Form] = []
    for name in dict.fromkeys(f.family_on(machine) for f in forms):
        family = [f for f in forms if f.family_on(machine) == name]
        if name and all(_followed(family[i:]) for i in range(len(family))):
            found += family
    for i, form in enumerate(found):
        if not form.conditional:
            return tuple(found[: i + 1])
    if not found:
        raise ConfigError(
            f"deterministic is on; op {op!r} has no form on {machine} that gives the same bits in any batch"
        )
    return tuple(found)


def _followed(forms: list[Form]) -> bool:
    """Whether what the first of them leaves of the calls of a model goes to another one."""
    first, *rest = forms
    return first.fits is None or any(
        f.fits is None and f.takes in (None, first.takes) and f.suits in (None, first.suits) for f in rest
    )


def dispatcher(op: str, forms: tuple[Form, ...]) -> Op:
    """What runs a call by the first of `forms` that fits it. A single form is its own function."""
    runs = [form.load() for form in forms]
    prepare = next((run.prepare for run in runs if hasattr(run, "prepare")), None)
    if len(forms) == 1 and not forms[0].conditional:
        return runs[0]
    at = WEIGHT_AT.get(op)
    names = [a.name for a in SPECS[op].args]
    some = [
        (form.takes and condition(form.takes), [condition(c) for c in (form.suits, form.fits) if c], run)
        for form, run in zip(forms, runs, strict=True)
    ]

    def last(*args: Any, **options: Any) -> Any:
        raise ConfigError(
            f"deterministic is on; op {op!r} has no form for these weights and shapes that gives the same bits in any batch"
        )

    if not forms[-1].conditional:
        last = some.pop()[-1]

    def run(*args: Any, **kwargs: Any) -> Any:
        if kwargs:  # by name, as tests do; what the op has no argument for is an option of one form
            rest = names[len(args) :]
            last_given = max((i for i, name in enumerate(rest) if name in kwargs), default=-1)
            args = (*args, *(kwargs.pop(name, None) for name in rest[: last_given + 1]))
            return chosen(*args, **kwargs)(*args, **kwargs)
        for takes, fits, form in some:
            if (takes is None or takes(args[at])) and all(fit(*args) for fit in fits):
                return form(*args)
        return last(*args)

    def chosen(*args: Any, **options: Any) -> Op:
        for takes, fits, form in some:
            if (takes is None or takes(args[at])) and all(fit(*args, **options) for fit in fits):
                return form
        return last

    if prepare is not None:
        run.prepare = prepare  # type: ignore[attr-defined]
    return run


class Ops:
    """The ops as attributes: `ops.linear(x, weight)`. `chains`: the forms of every op, as `Registry.chain` gives them."""

    def __init__(self, chains: dict[str, tuple[Form, ...]], machine: Machine) -> None:
        self.chains, self.machine = dict(chains), machine
        for op, forms in chains.items():
            setattr(self, op, dispatcher(op, forms))

    def __getattr__(self, name: str) -> Op:  # reached only for names that are not set
        raise AttributeError(f"op {name!r} is unknown; known: {', '.join(SPECS)}{nearest(name, SPECS)}")

    @classmethod
    def choose(
        cls, backend: str, machine: Machine, registry: Registry, *, deterministic: bool = False
    ) -> Ops:
        """`backend` holds names in order of preference, with commas between them; `deterministic` as in `Registry.chain`. Raises
        ConfigError for a name that is unknown or has no form for this machine."""
        known, here = ("auto", *registry.backends()), ("auto", *registry.usable(machine))
        for name in backend.split(","):
            if name not in known:
                raise ConfigError(f"backend is {name!r}; known: {', '.join(known)}{nearest(name, known)}")
            if name not in here:
                raise ConfigError(
                    f"backend is {name!r}; it runs nothing on {machine.device} of this machine, where there are: "
                    f"{', '.join(here)}"
                )
        chains = {op: registry.chain(op, backend, machine, deterministic=deterministic) for op in SPECS}
        return cls(chains, machine)

    def prepare(self, op: str, weight: Any) -> Any:
        """A `Weight` or `Gated` as the forms of `op` want it (see weight.py). Raises ConfigError where none of them takes it, as with
        `deterministic` it may be."""
        hook = getattr(getattr(self, op), "prepare", None)
        value = weight if hook is None else hook(weight)
        if not self.reached(op, value):
            forms = ", ".join(map(str, self.chains[op]))
            raise ConfigError(f"deterministic is on; op {op!r} has forms for other weights only: {forms}")
        return value

    def reached(self, op: str, weight: Any = None) -> list[Form]:
        """The forms that calls can reach, with this prepared weight where one is given."""
        found = []
        for form in self.chains[op]:
            if weight is None or form.multiplies(weight):
                found.append(form)
                if weight is not None and form.suits is form.fits is None:
                    break
        return found

    def quantises(self, op: str, weight: Any) -> bool:
        """Whether this prepared matrix (or these three) is multiplied in FP8, whatever the call."""
        return all(form.packed for form in self.reached(op, weight))

    @property
    def packed(self) -> bool:
        """Whether anything multiplies with FP8 and FP4 weights as they are stored."""
        return any(form.packed for forms in self.chains.values() for form in forms)

    def uncaptured(self, op: str, weight: Any = None) -> list[str]:
        """Labels of the forms of `op` that a CUDA graph cannot hold."""
        return [form.label for form in self.reached(op, weight) if not form.capturable]

    def describe(self) -> list[str]:
        """For start-up: a line per op with several forms, in the order in which they are asked, and one per backend for all
        others."""
        alone: dict[str, list[str]] = {}
        lines = []
        for op, forms in self.chains.items():
            if len(forms) == 1 and not forms[0].untried:
                alone.setdefault(forms[0].label, []).append(op)
            else:
                lines.append(f"{op}: {', else '.join(map(str, forms))}")
        if not lines and len(alone) == 1:
            return [f"{label} (all {len(ops)} ops)" for label, ops in alone.items()]
        return [*lines, *(f"{', '.join(ops)}: {label}" for label, ops in alone.items())]

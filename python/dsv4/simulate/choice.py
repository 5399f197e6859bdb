"""Which profile a workload should have, why, and what would change that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dsv4.errors import ConfigError
from dsv4.simulate.outcome import Outcome
from dsv4.spelling import nearest

SAME = 0.01
"""Answers whose mean times differ by less than this share take as long."""
TOLD = 0.02
"""Figures that differ by less are not worth a word."""
FALLBACK = "mixed"
"""Where none is better."""
BUSY = 0.97
"""Share of the time from which on an engine is at its limit."""

GOALS = ("ttft", "itl")


@dataclass(frozen=True, slots=True)
class Goal:
    """The most that nine in ten may take."""

    name: str
    ms: float

    @classmethod
    def read(cls, text: str) -> Goal:
        """Of a flag. Raises ConfigError."""
        name, _, value = text.partition("=")
        try:
            ms = float(value)
        except ValueError:
            ms = -1.0
        if name not in GOALS or not 0 < ms < float("inf"):
            raise ConfigError(
                f"--goal is {text!r}; it takes ttft or itl and milliseconds above 0, such as ttft=2000{nearest(name, GOALS)}"
            )
        return cls(name, ms)

    def kept(self, o: Outcome) -> bool:
        return 1000 * (o.ttft if self.name == "ttft" else o.itl)["p90"] <= self.ms

    def __str__(self) -> str:
        return f"{self.name} p90 {self.ms:g} ms"


@dataclass(frozen=True, slots=True)
class Figure:
    """One by which profiles are compared."""

    name: str
    of: Callable[[Outcome], float]
    shown: Callable[[float], str]
    more: bool = False
    """More of it is better."""

    def better(self, a: Outcome, b: Outcome) -> float:
        """By which share `a` is better than `b`."""
        one, other = self.of(a), self.of(b)
        if self.more:
            one, other = other, one
        return (other - one) / other if other else 0.0


def _s(x: float) -> str:
    return f"{x:.3g} s"


def _ms(x: float) -> str:
    return f"{1000 * x:.3g} ms"


ANSWER = Figure("mean time of an answer", lambda o: o.answer, _s)
FIGURES = (
    Figure("TTFT p50", lambda o: o.ttft["p50"], _s),
    Figure("TTFT p90", lambda o: o.ttft["p90"], _s),
    Figure("ITL p90", lambda o: o.itl["p90"], _ms),
    Figure("ITL p99", lambda o: o.itl["p99"], _ms),
    Figure("GPU time per 1M output tokens", lambda o: o.gpu_hours, lambda x: f"{x:.3g} h"),
    Figure("capacity", lambda o: o.capacity, lambda x: f"{x / 1e6:.1f}M tokens", more=True),
    Figure("hit rate", lambda o: o.hit_rate, lambda x: f"{x:.2%}", more=True),
)


@dataclass(frozen=True, slots=True)
class Choice:
    """Profiles in order, the chosen one first, and what came of them at `times` the traffic."""

    ranked: Sequence[Outcome]
    goals: Sequence[Goal]
    heavier: Sequence[Outcome]
    times: float

    @property
    def best(self) -> Outcome:
        return self.ranked[0]

    @property
    def runner_up(self) -> Outcome:
        return self.ranked[1]

    def missed(self, o: Outcome) -> list[Goal]:
        return [g for g in self.goals if not g.kept(o)]

    def later(self, o: Outcome) -> Outcome:
        """The same profile with the heavier traffic."""
        return next(x for x in self.heavier if x.profile == o.profile)


def choose(
    found: Sequence[Outcome], goals: Sequence[Goal], heavier: Sequence[Outcome], times: float
) -> Choice:
    """Fewest refused, then most goals kept, then the least mean time of an answer. Those within 1% are level: of them the same is asked
    with the heavier traffic. Of those that are level there too `mixed` is chosen, else the one with the soonest first tokens."""
    level = _level(found, goals)
    later = [o for o in heavier if o.profile in {x.profile for x in level}]
    names = {o.profile for o in _level(later, goals)}
    best = min((o for o in level if o.profile in names), key=lambda o: (o.profile != FALLBACK, o.ttft["p90"]))
    rest = sorted((o for o in found if o is not best), key=lambda o: _rank(o, goals))
    return Choice([best, *rest], goals, heavier, times)


def _rank(o: Outcome, goals: Sequence[Goal]) -> tuple[int, int, float]:
    return o.refused, sum(not g.kept(o) for g in goals), o.answer


def _level(found: Sequence[Outcome], goals: Sequence[Goal]) -> list[Outcome]:
    """The best and those that are as good, the best first."""
    ranked = sorted(found, key=lambda o: _rank(o, goals))
    first = _rank(ranked[0], goals)
    return [o for o in ranked if _rank(o, goals)[:2] == first[:2] and o.answer <= (1 + SAME) * first[2]]


def reasons(choice: Choice) -> Iterator[str]:
    """Sentences: why, the runner-up, and what would change the choice."""
    best, second = choice.best, choice.runner_up
    yield f"{best.profile}: {_why(choice)}."
    if missed := choice.missed(best):
        yield f"It misses {' and '.join(map(str, missed))}, as does every other profile: more GPUs, or fewer requests for each."
    if (
        best.busy > BUSY and best.waiting >= 1
    ):  # alone the first is true of one conversation that never pauses
        yield (
            f"The GPUs are in steps {best.busy:.0%} of the time and {best.waiting:,.0f} requests wait in the mean: this traffic is more "
            "than they hold."
        )
    yield f"Runner-up: {second.profile}, {_against(second, best)}."
    changes = list(_changes(choice))
    top = _level(choice.heavier, choice.goals)
    if best.profile not in [o.profile for o in top]:
        changes.append(
            f"{top[0].profile} with {choice.times:g} times the traffic: {_against(top[0], choice.later(best))}"
        )
    if changes:
        yield f"The choice would change to {'; to '.join(changes)}."
    else:
        yield f"Nothing that was tried changes the choice: no other figure, nor {choice.times:g} times the traffic."


def _why(choice: Choice) -> str:
    best, second = choice.best, choice.runner_up
    if second.refused > best.refused:
        return f"the others refuse requests, {second.profile} {second.refused:,} of them"
    if len(choice.missed(second)) > len(choice.missed(best)):
        return f"it keeps {' and '.join(str(g) for g in choice.missed(second) if g.kept(best))}, which {second.profile} does not"
    if ANSWER.better(best, second) > SAME:
        return (
            f"answers take {_s(best.answer)} in the mean, against {_s(second.answer)} with {second.profile}"
        )
    level = f"answers take as long as with {second.profile} ({_s(best.answer)} in the mean)"
    now, then = choice.later(best), choice.later(second)
    if ANSWER.better(now, then) > SAME:
        return f"{level}; with {choice.times:g} times the traffic {_s(now.answer)} against {_s(then.answer)}"
    first = FIGURES[1]
    sooner = f" and its first tokens are sooner ({first.name} {first.shown(first.of(best))} against {first.shown(first.of(second))})"
    return (
        f"{level} and no other is faster by more than {SAME:.0%}, nor with {choice.times:g} times the traffic"
        f"{sooner if first.better(best, second) > TOLD else ''}"
    )


def _against(o: Outcome, other: Outcome) -> str:
    """The two figures in which they differ most, and the mean time of an answer."""
    parts = [f"answers {_s(o.answer)} against {_s(other.answer)}"]
    far = sorted(FIGURES, key=lambda f: -abs(f.better(o, other)))
    parts += [
        f"{f.name} {f.shown(f.of(o))} against {f.shown(f.of(other))}"
        for f in far[:2]
        if abs(f.better(o, other)) > TOLD
    ]
    return ", ".join(parts)


def _changes(choice: Choice) -> Iterator[str]:
    """Figures that another profile is better at, were they what counts."""
    best = choice.best
    by_profile: dict[str, list[str]] = {}
    for f in FIGURES:
        top = max(choice.ranked, key=lambda o: f.better(o, best))
        if f.better(top, best) > TOLD:
            told = f"{f.name} ({f.shown(f.of(top))} against {f.shown(f.of(best))})"
            by_profile.setdefault(top.profile, []).append(told)
    for profile, better in by_profile.items():
        yield f"{profile} if what counts is {' or '.join(better)}"

"""The Rust core: scheduler, page pool, prefix tree. It sees token ids and numbers, never tensors.

Every call detaches the GIL. Errors are subclasses of `Dsv4Error`; a `CorruptState` (broken invariant or
panic) means that the engine must stop.
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Final, Literal, TypedDict, final, type_check_only

import numpy as np
import numpy.typing as npt

__all__ = [
    "ALL_LOGITS",
    "DECODE",
    "EVICTIONS",
    "FORK",
    "REPLAY",
    "RESET",
    "RESTORE",
    "SAVE",
    "SNAPSHOT_POLICIES",
    "Component",
    "ConfigError",
    "Core",
    "CorruptState",
    "Dsv4Error",
    "LayoutSpec",
    "NeverFits",
    "Overloaded",
    "Replay",
    "StepModel",
    "Trace",
    "UnknownRequest",
    "__version__",
    "build_info",
    "default_options",
    "plan_schema",
    "read_columns",
    "scan_json",
]

__version__: str
build_info: str
"""`release` or `debug`."""
EVICTIONS: Final[tuple[str, ...]]
"""The values of the option `eviction`."""
SNAPSHOT_POLICIES: Final[tuple[str, ...]]
"""The values of the option `snapshots`; `:N` stands for a number of tokens."""

def scan_json(
    body: bytes, names: Sequence[str]
) -> tuple[int, int, dict[str, npt.NDArray[np.int32] | list[npt.NDArray[np.int32]]], bytes]:
    """A pass over a JSON object, with the GIL detached, before a parser makes objects of it.

    Gives the number of values and keys in it (empty lists and objects count twice), how deep brackets nest, and
    of `names`, members of the object, those that are lists of whole numbers of 32 bits (int32 [N]) or up to
    1,024 such lists. Last the body with `null` in their place, where they are not counted; a member that is
    there twice stays. Nothing is checked: of a body that is no JSON the rest is none either.
    """

def read_columns(path: str | PathLike[str], offset: int, stride: int, out: npt.NDArray[np.uint8]) -> bool:
    """Fills `out` (uint8 [rows, n]): row i from byte `offset + i * stride` of the file, the GIL detached. False where the file
    ends before. Raises OSError."""

class Dsv4Error(Exception):
    """Base of all errors of the core."""

class ConfigError(Dsv4Error, ValueError):
    """An option, array or prompt that cannot work; the message names field, value and what it can be."""

class UnknownRequest(Dsv4Error, KeyError):
    """No request of this id is known."""

class Overloaded(Dsv4Error):
    """The waiting queue is full; try again later."""

class NeverFits(Dsv4Error, ValueError):
    """The request needs more pages than the pool has, even alone."""

class CorruptState(Dsv4Error):
    """An invariant of the core is broken; the engine must stop."""

@final
class Component:
    """One component of the cache. Offsets and strides are bytes."""

    @property
    def name(self) -> str:
        """`csa`, `csa_index`, `hca`, `window`, `csa_pool`, `csa_index_pool` or `hca_pool` in V4."""

    @property
    def kind(self) -> str:
        """`stride` (rows in history pages), `window` or `pool` (rows in slabs)."""

    @property
    def ratio(self) -> int:
        """Tokens per row of a `stride`, else 0."""

    @property
    def tokens(self) -> int:
        """Rows of a `window` that attention may read, else 0."""

    @property
    def slack(self) -> int:
        """Further rows of a `window`, for tokens that may be taken back, else 0."""

    @property
    def rows(self) -> int:
        """Rows of one layer in a page or slab."""

    @property
    def saved_rows(self) -> int:
        """Rows of one layer in a snapshot."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Layers that have it, ascending."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""

    @property
    def format(self) -> str:
        """Name of the row format."""

    @property
    def offset(self) -> int:
        """First layer's region, from the start of the page or slab."""

    @property
    def layer_stride(self) -> int:
        """From one layer's region to the next."""

    @property
    def snapshot_offset(self) -> int:
        """First layer's saved rows, from the start of the snapshot."""

    @property
    def snapshot_layer_stride(self) -> int:
        """From one layer's saved rows to the next."""

@final
class LayoutSpec:
    """The cache of a model, as data. Immutable."""

    def __new__(cls, data: Mapping[str, Any]) -> LayoutSpec:
        """`data`: block_tokens, ranks (1 if left out), window, layers (of each reach and history_of) and components (of each name, kind, layers,
        row_bytes and format), as `dsv4.model.layout` makes it; what each means is said in `rust/core/src/layout/mod.rs`. Raises
        ConfigError for keys that are not known and numbers that do not fit."""

    def data(self) -> dict[str, Any]:
        """What it was made of."""

    @property
    def block_tokens(self) -> int:
        """Tokens of a page."""

    @property
    def ranks(self) -> int:
        """Ranks that hold a page together: row j lies on rank j mod R."""

    @property
    def window(self) -> int:
        """Sliding window in tokens, the query included."""

    @property
    def layers(self) -> int:
        """Attention layers."""

    @property
    def page_bytes(self) -> int:
        """Bytes of a rank's page, padding included."""

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab, whole on every rank, padding included."""

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a saved state, all ranks' runs of it together."""

    @property
    def snapshot_pages(self) -> int:
        """Pages that a saved state at a block boundary takes."""

    @property
    def slab_pages(self) -> int:
        """Pages that a whole slab takes: the state at any other position."""

    @property
    def history_bytes_per_token(self) -> float:
        """Sum over stride components of layers * row_bytes / ratio, over ranks; no padding."""

    @property
    def replay_tokens(self) -> int:
        """What a replay must run to be exact: the sum of the layers' reaches."""

    @property
    def fingerprint(self) -> int:
        """A stable 64-bit number of the whole spec."""

    @property
    def components(self) -> tuple[Component, ...]:
        """In the order in which they lie in memory."""

    def pages_for(self, bytes: int) -> int:
        """Pages that fit into `bytes`."""

    def __eq__(self, value: object, /) -> bool: ...
    def __ne__(self, value: object, /) -> bool: ...
    def __hash__(self) -> int: ...

RESET: Final[int]
"""Bit of `row_flags`: the state starts empty."""
ALL_LOGITS: Final[int]
"""Bit of `row_flags`: logits of every token are wanted."""
REPLAY: Final[int]
"""Bit of `row_flags`: the row rebuilds state, no history is written below `row_replay_end`."""
DECODE: Final[int]
"""Bit of `row_flags`: one token after the prompt."""
FORK: Final[int]
"""A `copy_kind`: a slab and its open page to another slab and page, before the forward."""
RESTORE: Final[int]
"""A `copy_kind`: saved pages into a slab, before the forward."""
SAVE: Final[int]
"""A `copy_kind`: a slab into pages, after the forward. At a multiple of block_tokens the state is a snapshot,
anywhere else the whole slab."""

@type_check_only
class PlanField(TypedDict):
    """Where a field of a plan lies. What each means is said in `rust/core/src/plan/schema.rs`."""

    name: str
    section: Literal["header", "rows", "tokens", "deltas", "copies"]
    """Numbers of the header stand alone; of another section as many elements are used as the header's
    number of the section's name says."""
    dtype: Literal["int32", "int64"]
    """int64 is two words, the low one first."""
    offset: int
    """The first word."""
    shape: list[int]
    """All elements of the section, then the numbers of an element; empty in the header."""

@type_check_only
class PlanSchema(TypedDict):
    """A plan is one int32 buffer; this is what lies in it."""

    words: int
    """Least length of the buffer."""
    fields: list[PlanField]

def plan_schema(layout: LayoutSpec, options: Mapping[str, Any]) -> PlanSchema:
    """`Core.plan_schema` of a core with these options, of which slabs, max_step_tokens and max_len matter."""

def default_options() -> dict[str, Any]:
    """Every option of `Core` with its default."""

@final
class Core:
    """Scheduler and cache of one rank. Thread-safe, but meant for one thread."""

    def __new__(cls, layout: LayoutSpec, options: Mapping[str, Any]) -> Core:
        """An idle core. `options`: pages and slabs, and what shall not have its default (`default_options`); what each means
        is said in `rust/core/src/options.rs`. Raises ConfigError, for an unknown key with the nearest that is known."""

    def submit(
        self,
        req: int,
        prompt: npt.NDArray[np.int32],
        *,
        max_new: int | None = None,
        stop_ids: Sequence[int] = (),
        salt: bytes = b"",
        priority: int = 0,
        all_logits: bool = False,
        tenant: int = 0,
        deadline_us: int | None = None,
        session: int | None = None,
        ttl_us: int | None = None,
        retention: int = 0,
        parent: int | None = None,
    ) -> None:
        """Queues a request. `max_new` None: as many tokens as fit; 0: the prompt is computed and nothing
        sampled. deadline_us: when the first token is wanted, on the clock of `set_time`. session, ttl_us and
        retention say how the prefix will be used again: requests of a session continue each other, it is kept so
        long after its last use, higher goes later when memory is short. parent: a live request whose state this
        one starts from, copy on write, at the last position that both have in common; an empty prompt means all
        of the parent's tokens. The outcome is that of a request of its own.

        Raises Overloaded, NeverFits, ConfigError (empty prompt, negative id, longer than max_len),
        UnknownRequest (`parent`), Dsv4Error (`req` is live).
        """

    def set_time(self, now_us: int) -> None:
        """The time, in microseconds from any origin. Going backwards is ignored."""

    def observe(self, step: int, us: float) -> None:
        """A step took `us` microseconds: the cost model learns from it. What cannot be is ignored."""

    def pin(self, salt: bytes, tokens: npt.NDArray[np.int32]) -> int:
        """Keeps the known whole blocks of `tokens`, and the states on them, until `unpin` of what is returned."""

    def unpin(self, pin: int) -> bool:
        """Ends a pin. False when there is none of that name."""

    def end_session(self, session: int) -> bool:
        """What only this session used goes first when memory is short. False when nothing of it is cached."""

    def tenants(self) -> dict[int, dict[str, float]]:
        """By tenant: live requests, tokens computed for it, and prefill_us, their predicted time."""

    def abort(self, req: int) -> bool:
        """Ends a request in any state. False when it is not live, so calling twice does no harm."""

    def stop(self, req: int) -> bool:
        """Ends a request as a stop token would: the caller saw a stop string. False when it is not live."""

    def plan_schema(self) -> PlanSchema:
        """What `plan` writes, and where."""

    def plan(self, out: npt.NDArray[np.int32]) -> bool:
        """Writes the next step into `out`, which is contiguous and as long as `plan_schema` says; nothing of it is
        kept. False: nothing can run before a commit or submit.

        Raises ConfigError for a buffer that does not do, Dsv4Error when `max_in_flight` steps are in flight.
        """

    def commit(self, step: int, tokens: npt.NDArray[np.int32], accepted: npt.NDArray[np.int32]) -> None:
        """The result of the oldest step in flight: what its rows sampled, one after the other (`row_samples` of each), and
        for each row that samples how many of its tokens are accepted, from the first on. Of a row with none accepted
        nothing counts: its request waits again and resumes with the tokens that it had. Rows of requests that ended
        are ignored.

        Raises Dsv4Error for another step, a wrong number of tokens or counts, and a count below 0 or above what its row
        sampled; nothing has changed then.
        """

    def rollback(self, step: int) -> None:
        """`step` and later ones were not run. Their requests wait again and resume with the same tokens."""

    def events(self, out: npt.NDArray[np.int64]) -> int:
        """Moves events into `out` [N, 6] and returns how many; call until 0. A row is (kind, request, step,
        a, b, c).

        1 TOKEN: a token, b its index in the output, c its sample index in the step. 2 FINISHED: a reason (1
        stop, 2 length, 3 abort), b tokens sampled, c stop token or -1. 3 PREEMPTED: a why (0 memory,
        1 rollback, 2 priority). 4 RESUMED (at every admission): a tokens whose history is shared, b tokens whose history
        was known, c tokens run again. 5 PREFILL: a tokens computed, b tokens in all.
        """

    def cache_changes(self) -> list[tuple[Any, ...]]:
        """What entered and left the prefix tree since the last call, in order. Whoever sets the option `cache_changes` calls
        it after each step; without it the list is empty.

        (blocks, parent, tokens, salt, session): blocks that follow each other were stored: their names of 64 bits, the name of
        the block before them or None, their tokens (uint32), salt and session. (blocks,): blocks were removed, the last of a
        prefix first. A name is a hash of the tokens up to its block's end, of the salt and of the layout: equal in every
        engine of the same layout."""

    def cache_picture(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """`cache_changes`, and then all that is in the prefix tree, predecessors first, for whoever starts anew; later
        changes go on from there."""

    def explain(self, req: int) -> dict[str, Any]:
        """What of the prompt was reused: prompt_tokens, history_matched, resumed_at, replayed, cached_tokens
        (resumed_at - replayed), reason, preemptions. Kept after the end until `forget`, or 4096 later ends.
        Raises UnknownRequest.

        reason: `none` (nothing was lost), `never_stored`, `history_evicted`, `snapshot_evicted`,
        `below_block`, `declined_by_cost`, `salt` (stored, but under another salt), `disabled`.
        """

    def forget(self, req: int) -> bool:
        """Drops the explanation of a finished request. False when there is none."""

    def stats(self) -> dict[str, int]:
        """Gauges and counters; `lost_<reason>` count prompt tokens in whole blocks that were run in spite of
        the cache.
        """

    def dump(self) -> str:
        """All that another core needs to go on, JSON: options, prefixes with their tokens, saved states, live requests.
        `dsv4 simulate --dump` reads it."""

    def check(self) -> None:
        """Recomputes every invariant. Raises CorruptState."""

    def evict_snapshots(self, n: int) -> int:
        """Evicts up to `n` saved states; returns how many went."""

    def evict_history(self, n: int) -> int:
        """Evicts up to `n` unused blocks with the states on them; returns how many blocks went."""

    def clear_prefix(self) -> int:
        """Evicts every unused prefix; returns the pages that became free."""

    def has_work(self) -> bool:
        """Whether any request is live."""

@final
class Trace:
    """A request trace in order of arrival. Immutable."""

    @staticmethod
    def read(
        paths: Sequence[str],
        *,
        hash_block: int = 512,
        limit: int | None = None,
        speed: float = 1.0,
        rate: float | None = None,
        time_unit: str = "ms",
    ) -> Trace:
        """Reads JSON lines, plain or packed with gzip, with `timestamp` (in `time_unit`, `ms` or `s`), `input_length`,
        `output_length` and `hash_ids`, one per `hash_block` tokens; `session`, `tenant`, `priority`, `delay` (in
        `time_unit`) and `output_hash_ids` are optional. In a session, `delay` may stand in place of `timestamp`.

        `limit` keeps the first requests; arrivals come `speed` times as fast, or `rate` a second in the mean. Raises
        ConfigError naming file, line, field, value and limit.
        """

    def __len__(self) -> int:
        """Requests."""

    @property
    def prompt_tokens(self) -> int:
        """Of all requests."""

    @property
    def output_tokens(self) -> int:
        """Of all requests."""

    @property
    def longest_prompt(self) -> int:
        """Tokens."""

    @property
    def seconds(self) -> float:
        """From the first arrival to the last."""

    @property
    def tenants(self) -> list[str]:
        """Names by number; number 0 is `default`, for requests that name none."""

    @property
    def skipped(self) -> list[str]:
        """Fields that were not read, 16 at most."""

@final
class StepModel:
    """How long a step takes; the formula is in `rust/sim/src/replay/clock.rs`."""

    def __new__(cls, coefficients: Mapping[str, Any]) -> StepModel:
        """Every coefficient by name (`dsv4.simulate.device`). Raises ConfigError."""

    def parts(self, rows: Sequence[tuple[int, int]], copies: int) -> tuple[float, list[tuple[float, float]]]:
        """(fixed us, [(reads us, arithmetic us)]) of a step with rows (first position, tokens) and so many saved and
        restored states. Its time is the fixed part and the larger of each pair."""

@final
class Replay:
    """A trace against the real core in virtual time, in progress."""

    def __new__(
        cls,
        trace: Trace,
        layout: LayoutSpec,
        options: Mapping[str, Any],
        *,
        model: StepModel | None = None,
        sequential: bool = False,
    ) -> Replay:
        """Options as in `Core`, but for costs, which follow from `model`. `sequential`, or no `model`: requests run one at
        a time, in order, and no time passes. Raises ConfigError."""

    @staticmethod
    def resume(dump: str, layout: LayoutSpec, model: StepModel) -> Replay:
        """Goes on from `Core.dump`: its live requests run on under the dump's options, with answers as long as they may
        be. Raises ConfigError for what is no dump, or one of another layout."""

    def run(self, steps: int) -> tuple[int, int, float, int]:
        """Up to `steps` further steps: (requests over, requests in all, virtual seconds, steps). It is over when the
        first two are equal."""

    def report(self) -> str:
        """What came of it so far, a JSON object; its fields are in `rust/sim/src/replay/report.rs`."""

    def check(self) -> None:
        """The core's own check. Raises CorruptState."""

"""dsv4 as a worker of Dynamo: its `LLMEngine` around an engine that is loaded.

Dynamo's runtime owns signals, registration and the sockets of requests. SIGTERM: it takes the worker off the list, waits its grace
period, and then `cleanup` lets running requests end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

import uvloop
from dynamo.common.backend import EngineConfig as Registration
from dynamo.common.backend import LLMEngine, LlmRegistration, Worker, WorkerConfig
from dynamo.common.backend.metrics import register_engine_registry
from dynamo.common.backend.publisher import ComponentSnapshot, PushSource
from dynamo.llm.exceptions import EngineShutdown, InvalidArgument, Unknown, WorkerUnavailable

from dsv4.api.accounting import Generation
from dsv4.api.generation import Job
from dsv4.api.keys import Tenant
from dsv4.api.limits import Meter
from dsv4.api.metrics import Metrics, describe_build
from dsv4.api.request_log import Record
from dsv4.engine.async_engine import AsyncEngine
from dsv4.engine.kv_events import SESSIONS, BlockRemoved, BlockStored, salt_digest
from dsv4.engine.request import RequestOutput
from dsv4.errors import Dsv4Error, EngineDead, RequestError
from dsv4.fleet.cache_relay import CacheRelay, Place
from dsv4.fleet.dynamo_request import Translator, Whole
from dsv4.fleet.settings import DynamoConfig

log = logging.getLogger("dsv4.fleet")

PARSER = "deepseek_v4"
"""Dynamo's name for the format of calls and thoughts."""
LOAD_EVERY = 0.2
"""Seconds between two looks at the load."""
OWN, NOT_HERE = ["dsv4_", "vllm:"], ["dsv4_http_", "dsv4_connections", "dsv4_client_", "http_"]
"""Series that Dynamo's /metrics shows, and those of an HTTP server, which is not here."""

_STOPPED = object()


class Dsv4Worker(LLMEngine):
    """One engine, for frontends of Dynamo."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: DynamoConfig,
        place: Place | None,
        on_start: Callable[[], object] = lambda: None,
    ) -> None:
        """`engine` is loaded; `place`: where it tells its events, None where it has no prefix cache; `on_start` is called when
        Dynamo's runtime has taken the signals."""
        self.engine, self._config, self._place, self._on_start = engine, config, place, on_start
        self._name, *self._aliases = config.served_model_name or (engine.name,)
        self._translate = Translator(engine.tokenizer, engine.frontend.eos_ids, engine.sampling_defaults)
        self._live: dict[str, asyncio.Queue[Any]] = {}
        """By Dynamo's id, where the news of running requests come together."""
        self._metrics = Metrics(
            engine.stats,
            self._name,
            engine.tenants,
            info=describe_build(engine.config, engine.stats().get("pages")),
            process=lambda: (engine.pid, engine.restarts),
        )
        self._meter = Meter(Tenant(name=""))
        self._salts: OrderedDict[str, str] = OrderedDict()
        """Of requests, by their digests in events."""
        self._relay: CacheRelay | None = None
        self._load: Any = None
        self._watch: asyncio.Task[None] | None = None
        self._over = False

    @classmethod
    async def from_args(cls, argv: list[str] | None = None) -> tuple[LLMEngine, WorkerConfig]:
        """Not the way in: `dsv4 dynamo` reads the settings and loads the model before Dynamo begins."""
        raise NotImplementedError("start it with dsv4 dynamo")

    def worker_config(self) -> WorkerConfig:
        """What Dynamo's runtime is told."""
        return WorkerConfig(
            namespace=self._config.namespace,
            component=self._config.component,
            endpoint=self._config.endpoint,
            model_name=str(self.engine.frontend.source.path),
            served_model_name=self._name,
            discovery_backend=self._config.discovery_backend,
            request_plane="tcp",
            event_plane="zmq",
            tool_call_parser=PARSER,
            reasoning_parser=PARSER,
            default_thinking_mode="disabled",  # as in our own API
        )

    async def start(self, worker_id: int) -> Registration:
        """The engine runs already."""
        self._on_start()
        self._watch = asyncio.create_task(self._tell_load())
        limits, pages = self.engine.config, self.engine.stats()["pages"]
        return Registration(
            model=str(self.engine.frontend.source.path),
            served_model_name=self._name,
            model_aliases=self._aliases,
            llm=LlmRegistration(
                context_length=self.engine.max_model_len,
                kv_cache_block_size=limits.block_size,
                total_kv_blocks=pages,
                max_num_seqs=limits.max_num_seqs,
                max_num_batched_tokens=limits.max_num_batched_tokens,
            ),
        )

    async def generate(
        self, request: Mapping[str, Any], context: Any
    ) -> AsyncGenerator[dict[str, Any], None]:
        """Chunks of all choices until each has ended. Raises Dynamo's exceptions: of a bad request, of an engine that cannot take it
        (which lets the frontend try another worker), of a generation that failed."""
        try:
            jobs = self._translate.jobs(request)
        except RequestError as e:
            raise _as_dynamo(e) from None
        if salt := jobs[0].routing.salt:
            self._remember(salt)
        news: asyncio.Queue[Any] = asyncio.Queue()
        name = context.id()
        record = Record(name, "GENERATE", "", "")
        self._live[name] = news
        tasks = [asyncio.create_task(self._pump(job, f"{name}-", record, news)) for job in jobs]
        whole = Whole(len(jobs))
        try:
            while not whole.over and not context.is_stopped():
                what = await news.get()
                if what is _STOPPED:
                    break
                if isinstance(what, BaseException):
                    raise what
                for chunk in whole.chunks(*what, self._bytes_of):
                    yield chunk
        finally:
            self._live.pop(name, None)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def abort(self, context: Any) -> None:
        """The client is gone, or has what it wanted."""
        if (news := self._live.get(context.id())) is not None:
            news.put_nowait(_STOPPED)

    async def _pump(self, job: Job, prefix: str, record: Record, news: asyncio.Queue[Any]) -> None:
        """Puts (index, output) or an exception of Dynamo's."""
        again = job.parent is not None
        counted = Generation(self._metrics, record, self._meter, len(job.prompt), job.params, again=again)
        stream = self.engine.generate(
            job.prompt,
            job.params,
            request_id=f"{prefix}{job.index}",
            routing=job.routing,
            fork_of=f"{prefix}{job.parent}" if again else None,
        )
        try:
            async with contextlib.aclosing(stream) as outputs:
                async for output in outputs:
                    counted.step(output)
                    if output.finished:
                        self._raise_if_cut(output)
                    news.put_nowait((job.index, output))
        except RequestError as e:
            counted.refused()
            news.put_nowait(_as_dynamo(e))
        except Exception as e:
            news.put_nowait(e)
        finally:
            counted.close()

    def _raise_if_cut(self, output: RequestOutput) -> None:
        if output.finish_reason == "abort":
            raise EngineShutdown("the worker is shutting down")
        if output.finish_reason == "error":
            why = output.error or "the generation failed"
            raise Unknown(why) if self.engine.check_alive()[0] else EngineShutdown(why)

    def _bytes_of(self, token: int) -> bytes:
        return b"" if self.engine.tokenizer is None else self.engine.tokenizer.token_bytes(token)

    async def kv_event_sources(self) -> list[PushSource]:
        """The changes of the prefix cache."""
        return [] if self._place is None else [PushSource(on_ready=self._tell_cache, dp_rank=0)]

    def _tell_cache(self, publisher: Any) -> None:
        assert self._place is not None
        block = self.engine.config.block_size
        assert block is not None

        def tell(events: list[BlockStored | BlockRemoved]) -> None:
            made = [made for event in events if (made := self._event(event, block)) is not None]
            if made:
                publisher.publish_batch(made)

        self._relay = CacheRelay(self._place, tell, lambda: self.engine.restarts)
        self._relay.start()

    def _event(self, event: BlockStored | BlockRemoved, block: int) -> dict[str, Any] | None:
        """As Dynamo takes it; None for blocks of a salt that is not known any more, which no router has to know either."""
        hashes = [_signed(h) for h in event.block_hashes]
        if isinstance(event, BlockRemoved):
            return {"type": "removed", "block_hashes": hashes}
        salt = None
        if event.extra_keys and (salt := self._salts.get(event.extra_keys[0][0])) is None:
            return None
        parent = event.parent_block_hash
        return {
            "type": "stored",
            "token_ids": event.token_ids,
            "num_block_tokens": [block] * len(hashes),
            "block_hashes": hashes,
            "parent_hash": None if parent is None else _signed(parent),
            "cache_salt": salt,
        }

    def _remember(self, salt: str) -> None:
        digest = salt_digest(salt.encode())
        self._salts[digest] = salt
        self._salts.move_to_end(digest)
        if len(self._salts) > SESSIONS:
            self._salts.popitem(last=False)

    def component_metrics_dp_ranks(self) -> list[int]:
        """One: ranks of tensors are not ranks of data."""
        return [0]

    def attach_snapshot_publisher(self, publisher: Any) -> None:
        """Where the load is told."""
        self._load = publisher

    async def register_prometheus(self, metrics: Any) -> None:
        """Our series beside Dynamo's, on its port."""
        register_engine_registry(
            metrics, self._metrics.registry, prefix_filters=OWN, exclude_prefixes=NOT_HERE
        )

    async def _tell_load(self) -> None:
        """Tells each change of the load; ends the process when the engine has ended for good."""
        told: tuple[Any, ...] = ()
        while self.engine.died is None:
            stats = self.engine.stats()
            used, pages = stats["pages"] - stats["available_pages"], stats["pages"]
            asked = stats["prompt_tokens"]
            rate = stats["resumed_tokens"] / asked if asked else None
            if self._load is not None and told != (used, pages, rate):
                told = (used, pages, rate)
                self._load.publish(0, ComponentSnapshot(used, pages, used / pages, 0, rate))
            await asyncio.sleep(LOAD_EVERY)
        signal.raise_signal(signal.SIGTERM)

    async def cleanup(self) -> None:
        """Lets running requests end, and then the engine."""
        if self._over:
            return
        self._over = True
        if not await self.engine.drain(self._config.drain_timeout):
            log.warning("requests were cut off: drain_timeout is %g s", self._config.drain_timeout)
        if self._watch is not None:
            self._watch.cancel()
        if self._relay is not None:
            await asyncio.to_thread(self._relay.close)
        await self.engine.shutdown()


def serve(worker: Dsv4Worker) -> None:
    """Until SIGTERM. Raises EngineDead where the engine has ended by itself, Dsv4Error for what Dynamo does not take."""

    async def run() -> None:
        try:
            await Worker(worker, worker.worker_config()).run()
        finally:
            await worker.cleanup()  # where Dynamo has not come so far

    try:
        uvloop.run(run())
    except Dsv4Error:
        raise
    except Exception as e:
        raise Dsv4Error(f"Dynamo's runtime has ended: {' '.join(str(e).split())[:500]}") from e
    if worker.engine.died is not None:
        raise EngineDead(f"the engine has stopped for good: {worker.engine.died}")


def _signed(number: int) -> int:
    """64 bits as Dynamo takes them."""
    return number - 2**64 if number >= 2**63 else number


def _as_dynamo(error: RequestError) -> Exception:
    if error.status == 503:
        return EngineShutdown(error.message)
    return WorkerUnavailable(error.message) if error.status == 429 else InvalidArgument(error.message)

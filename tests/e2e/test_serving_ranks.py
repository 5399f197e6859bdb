"""`dsv4 serve --tp 2`: what it writes is what one rank writes, and whichever process is killed or stopped, streams end with an error that
names it, the engine comes back, and nothing stays behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from dsv4.model.config import ModelConfig
from dsv4.text.tokenizer import Tokenizer

from tests.e2e.test_engine_death import Served, healthy, started, until
from tests.record_golden import GOLDEN, NANO, cases, prompt_ids
from tests.support.checkpoints import write_random
from tests.support.scripted import alive, children, environment

BODY = {"prompt": [5, 6, 7], "max_tokens": 1000, "ignore_eos": True, "stream": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("model"), "flash", compress_ratios=[0, 4, 128])


def served(model: Path | str, *options: str) -> contextlib.AbstractContextManager[Served]:
    command = [sys.executable, "-m", "dsv4.cli", "serve", str(model), "--port", "0", "--device", "cpu"]
    return started(
        [*command, "--tp", "2", "--num-pages", "16", "--max-num-seqs", "2", *options], environment()
    )


def ranks(server: Served) -> tuple[int, int]:
    """Processes of rank 0 and rank 1."""
    zero = server.engine
    (one,) = children(zero)
    return zero, one


def tokens(server: Served) -> list[int]:
    body = {**BODY, "stream": False, "max_tokens": 4, "return_token_ids": True, "logprobs": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
    return [int(t) for t in answer["choices"][0]["token_ids"]]


def lost_in_stream(server: Served, number: int, rank: int) -> str:
    """The error of a stream in whose midst a signal goes to a rank."""
    pids = ranks(server)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=120) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line)
        assert "error" not in json.loads(first.removeprefix("data: "))
        os.kill(pids[rank], number)
        *_, error, done = [line for line in lines if line]
    assert done == "data: [DONE]"
    until(lambda: healthy(server.url) and not any(map(alive, pids)))
    message: str = json.loads(error.removeprefix("data: "))["error"]["message"]
    return message


def test_whichever_rank_is_lost_it_is_named_and_the_engine_comes_back(model: Path) -> None:
    with served(model, "--rank-timeout", "15") as server:
        before = tokens(server)
        text = lost_in_stream(server, signal.SIGKILL, 1)
        assert "rank 1 of 2 is gone, it was killed by SIGKILL" in text
        assert tokens(server) == before
        assert "its process is gone, it was killed by SIGKILL" in lost_in_stream(server, signal.SIGKILL, 0)
        assert tokens(server) == before
        assert "rank 1 of 2 has not" in lost_in_stream(server, signal.SIGSTOP, 1)
        assert tokens(server) == before
        assert "rank 0 of 2 has not answered" in lost_in_stream(server, signal.SIGSTOP, 0)
        assert tokens(server) == before
        os.kill(ranks(server)[1], signal.SIGKILL)  # nothing is under way
        until(lambda: "dsv4_engine_restarts_total 5.0" in httpx.get(f"{server.url}/metrics").text)
        until(lambda: healthy(server.url))
        assert tokens(server) == before
        shown = httpx.get(f"{server.url}/metrics").text
        for rank in (0, 1):
            assert f'dsv4_rank_memory_bytes{{model_name="{model.name}",rank="{rank}"}}' in shown
            assert f'dsv4_rank_step_seconds_total{{model_name="{model.name}",rank="{rank}"}}' in shown
        pids = ranks(server)
        server.process.terminate()
        server.end()
    assert server.process.returncode == 0
    until(lambda: not any(map(alive, pids)))


def test_the_model_that_ships_writes_what_it_should() -> None:
    expected, config = json.loads(GOLDEN.read_text()), ModelConfig.from_dir(Path(str(NANO)))
    tokenizer = Tokenizer.from_dir(str(NANO), vocab_size=config.vocab_size)
    assert tokenizer is not None
    with served(str(NANO)) as server:
        for name in ("hello", "result"):
            body = {
                "prompt": prompt_ids(cases()[name], tokenizer, config),
                "max_tokens": 60,
                "temperature": 0,
            }
            url = f"{server.url}/v1/completions"
            answer = httpx.post(url, json={**body, "return_token_ids": True}, timeout=240).json()
            assert answer["choices"][0]["token_ids"] == expected[name]["ids"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_stays_of_a_server_that_ends(model: Path, number: int) -> None:
    before = set(os.listdir("/dev/shm"))
    with served(model, "--drain-timeout", "0") as server:
        pids = ranks(server)
        with httpx.stream("POST", f"{server.url}/v1/completions", json=BODY, timeout=120) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.process.pid, number)
            with contextlib.suppress(httpx.HTTPError):
                list(lines)
        server.process.wait(120)
    until(lambda: not any(map(alive, pids)))
    ours = {str(pid) for pid in (server.process.pid, *pids)}
    new = (
        set(os.listdir("/dev/shm")) - before
    )  # others of the machine use it too: shared memory is named by its process
    assert not [name for name in new if ours & set(re.findall(r"\d+", name))]
    assert server.process.returncode == (-number if number == signal.SIGKILL else 0)


def test_generate_with_two_ranks(model: Path) -> None:
    """And three, which the model's groups do not allow."""
    command = [
        sys.executable,
        "-m",
        "dsv4.cli",
        "generate",
        "-m",
        str(model),
        "--token-ids",
        "--max-tokens",
        "4",
    ]
    told = []
    for tp in ("1", "2"):
        options = ["--tp", tp, "--device", "cpu", "--num-pages", "8", "5 6 7"]
        ran = subprocess.run(
            [*command, *options], capture_output=True, text=True, timeout=240, env=environment()
        )
        assert ran.returncode == 0, ran.stderr
        told.append(ran.stdout)
    assert told[0] == told[1]
    ran = subprocess.run(
        [*command, "--tp", "3", "5 6 7"], capture_output=True, text=True, timeout=240, env=environment()
    )
    (line,) = ran.stderr.strip().splitlines()
    assert ran.returncode == 2 and "tensor_parallel_size is 3" in line and "the nearest is 2" in line

"""`dsv4 serve` while it starts: signals, standard streams that are closed or full, addresses that are taken."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

SERVE = [sys.executable, "-m", "dsv4.cli", "serve", "--num-pages", "40", "--max-num-seqs", "2"]
ENV = {**{k: v for k, v in os.environ.items() if not k.startswith("DSV4_")}, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(what: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, f"the server ended with {process.returncode}"
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0


def healthy(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_loading_ends_it_at_once(number: signal.Signals, code: int) -> None:
    """The signals are ignored where it starts, as they are for process 1, which only its own handlers reach."""
    port = free_port()

    def ignore() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    command = [*SERVE, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV, preexec_fn=ignore)
    wait_for(lambda: listens(port), process)  # that is before torch is imported
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.strip() == f"dsv4: ended by {number.name} while loading the model"


def can_be_process_1() -> bool:
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "true"]
    return (
        shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0
    )


@pytest.mark.skipif(not can_be_process_1(), reason="this machine lets nobody make a process namespace")
def test_process_1_ends_by_sigterm_while_loading() -> None:
    port = free_port()
    own = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    process = subprocess.Popen(
        [*own, *SERVE, "--port", str(port)], stderr=subprocess.PIPE, text=True, env=ENV
    )
    wait_for(lambda: listens(port), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "ended by SIGTERM" in err and "Traceback" not in err


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_closed_and_full_standard_streams_do_not_matter(streams: str) -> None:
    port = free_port()
    command = f'exec "$@" --port {port} {streams}'
    process = subprocess.Popen(["bash", "-c", command, "serve", *SERVE], env=ENV)
    try:
        wait_for(lambda: healthy(port), process)
        url = f"http://127.0.0.1:{port}/v1/completions"
        answer = httpx.post(url, json={"model": "default", "prompt": "Hi", "max_tokens": 2}, timeout=60)
        assert answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] == 2
        assert httpx.get(f"http://127.0.0.1:{port}/nothing").status_code == 404
        for number in (0, 1, 2):  # no socket may take such a number: it would get what C libraries print
            assert os.readlink(f"/proc/{process.pid}/fd/{number}").startswith("/dev/")
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0


def test_what_cannot_work_is_told_on_one_line_before_anything_loads(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for model, words in (([], f"127.0.0.1:{port}: "), ([str(tmp_path / "none")], "model is ")):
            ran = subprocess.run([*SERVE, *model, "--port", port], capture_output=True, text=True, env=ENV)
            assert ran.returncode == 2 and ran.stderr.count("\n") == 1, ran.stderr
            assert ran.stderr.startswith("dsv4: error: ") and words in ran.stderr

"""The command line as users call it: in processes of their own, with the small model that ships."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from dsv4 import doctor
from dsv4.cli import build_parser, common

from tests.record_golden import WEATHER

ENV = {**{k: v for k, v in os.environ.items() if not k.startswith("DSV4_")}, "OMP_NUM_THREADS": "1"}


def dsv4(*arguments: str, stdin: str = "", timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dsv4.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=ENV,
    )


def test_version_and_help_are_quick() -> None:
    shown = dsv4("--version", timeout=60).stdout
    assert re.match(r"dsv4 \S+ \(core ", shown) and dsv4("version", timeout=60).stdout == shown
    text = dsv4("serve", "--help").stdout
    for flag in (
        "--max-model-len",
        "--kv-cache-memory-bytes",
        "--drain-timeout",
        "--no-enable-prefix-caching",
    ):
        assert flag in text
    heavy = "import sys; from dsv4.cli import build_parser; build_parser(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", heavy], env=ENV).returncode == 0


def test_ctrl_c_while_the_commands_are_loaded_ends_it_without_a_word() -> None:
    early = """
import builtins, sys
real = builtins.__import__
def interrupted(name, *rest):
    if name == "argparse":
        raise KeyboardInterrupt
    return real(name, *rest)
builtins.__import__ = interrupted
from dsv4.cli import main
sys.exit(main(["serve"]))
"""
    run = subprocess.run([sys.executable, "-c", early], env=ENV, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "")


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_of_torch_do_not_spin_unless_the_user_says_so(own: dict[str, str]) -> None:
    named = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {k: v for k, v in ENV.items() if k not in named} | own
    code = f"import dsv4, os; print([os.environ.get(k) for k in {named}])"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    expected = own or {"GOMP_SPINCOUNT": "1000"}
    assert run.stdout.strip() == str([expected.get(k) for k in named])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("serve", "--max-num-seq", "3"), ["--max-num-seq", "did you mean '--max-num-seqs'"]),
        (("serve", "--dtype", "float64"), ["dtype", "float64", "bfloat16"]),
        (("serve", "/nowhere/model"), ["/nowhere/model", "directory"]),
        (("serve", "--host", "203.0.113.7"), ["203.0.113.7", "--host"]),
        (("generate", "hi", "--temperature", "200"), ["temperature", "200", "0 to 2"]),
        (("generate", "-f", "/nowhere.txt"), ["/nowhere.txt", "No such file"]),
        (("generate", "--token-ids", "1 x"), ["token id"]),
        (("generate",), ["prompt is empty"]),
        (("frobnicate",), ["frobnicate", "serve"]),
        ((), ["COMMAND"]),
    ],
)
def test_a_bad_call_is_one_line_and_exit_code_2(arguments: tuple[str, ...], words: list[str]) -> None:
    result = dsv4(*arguments)
    assert result.returncode == 2 and result.stdout == ""
    last = result.stderr.strip().splitlines()[-1]
    assert all(w in last for w in words) and "Traceback" not in result.stderr, result.stderr


def test_a_taken_port_is_told_before_any_weight_is_read() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = dsv4("serve", "--port", str(taken.getsockname()[1]))
    assert result.returncode == 2 and "cannot listen" in result.stderr and "weights" not in result.stderr


def test_generate_writes_the_answer_only_to_standard_output(tmp_path: object) -> None:
    result = dsv4("generate", "Hello", "--max-tokens", "12")
    assert result.returncode == 0 and result.stdout.strip() and result.stdout.endswith("\n")
    assert "tokens/s" in result.stderr and "cached" in result.stderr
    assert dsv4("generate", "--max-tokens", "12", stdin="Hello").stdout == result.stdout


def test_an_interrupted_answer_is_no_success() -> None:
    command = [
        sys.executable,
        "-m",
        "dsv4.cli",
        "generate",
        "--raw",
        "--max-tokens",
        "30000",
        "Once upon a time",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    try:
        assert process.stdout is not None and process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted after" in err and "Traceback" not in err


def test_generate_as_json_from_token_ids() -> None:
    result = dsv4("generate", "--raw", "--token-ids", "--json", "--max-tokens", "3", "336, 1537 405")
    body = json.loads(result.stdout)
    assert len(body["token_ids"]) == 3 and body["finish_reason"] == "length"
    assert body["usage"]["prompt_tokens"] == 3 and "reason" in body["usage"]["explanation"]


def test_chat_reads_lines_from_a_pipe() -> None:
    script = (
        "Hello\n\n/think on\n/thinkk\n/think maybe\n/reset\n/system Be brief.\nHello\n/exit\nnever read\n"
    )
    result = dsv4("chat", "--max-tokens", "8", stdin=script)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("prompt tokens") == 2 and "did you mean '/think'" in result.stderr
    assert "it takes on or off" in result.stderr and "forgotten" in result.stderr


def test_chat_takes_files_tools_and_their_results(tmp_path: Path) -> None:
    tools, letter = tmp_path / "tools.json", tmp_path / "letter.txt"
    tools.write_text(json.dumps([WEATHER]))
    letter.write_text("It rained.\n\nThe passphrase for harbor is violet-anchor.\n\nThen it stopped.\n")
    script = (
        "What is the weather in Prague?\n"
        '{"temperature": 12, "sky": "cloudy"}\n'
        f"/reset\n/file /nowhere.txt\n/file {letter}\nWhat is the passphrase \\\nfor harbor?\n"
    )
    result = dsv4("chat", "--tools", str(tools), stdin=script)
    assert result.returncode == 0, result.stderr
    assert 'get_weather {"city": "Prague"}' in result.stdout and "12 degrees and cloudy" in result.stdout
    assert "violet-anchor" in result.stdout and "No such file" in result.stderr
    assert "JSON" in dsv4("chat", "--help").stdout
    tools.write_text("{}")
    assert "must be a list" in dsv4("chat", "--tools", str(tools)).stderr


@contextlib.contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A server process, its URL and what it printed until it was ready."""
    command = [sys.executable, "-m", "dsv4.cli", "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENV)
    try:
        assert process.stderr is not None
        printed = ""
        while "curl" not in printed:
            line = process.stderr.readline()
            assert line, f"the server ended: {printed}"
            printed += line
        yield process, re.search(r"ready\s+(\S+)", printed)[1], printed
    finally:
        process.kill()
        process.communicate()


def test_serve_prints_its_plan_answers_and_drains() -> None:
    with serving("--max-num-seqs", "2", "--num-pages", "16") as (process, url, printed):
        for part in ("model", "pool", "capacity", "snapshots", "2 running", "/v1/chat/completions"):
            assert part in printed
        client = openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "Hello"}]
        text = "".join(
            c.choices[0].delta.content or ""
            for c in client.chat.completions.create(
                model="default", messages=messages, temperature=0, max_tokens=12, stream=True
            )
        )
        whole = client.chat.completions.create(model="nano", messages=messages, temperature=0, max_tokens=12)
        assert text and text == whole.choices[0].message.content
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_warmup_says_why_nothing_is_compiled() -> None:
    run = dsv4("warmup", "--device", "cpu")
    assert run.returncode == 2
    assert (
        run.stderr
        == "dsv4: error: nothing is compiled: device is cpu; run it on a machine with the GPU that will serve\n"
    )


def test_every_stage_of_a_start_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "LINE_EVERY", 0.0)
    with common.LoadProgress() as progress:
        progress(2**21, 2**22, "embed")
        progress(2**30, 2**31, "embed")
        progress(3, 12, "compiling", "kernels")
        progress(12, 120, "capturing", "graphs")
    assert (
        capsys.readouterr().err
        == "weights 50% (2.0 of 4.0 MiB)\nweights 50% (1.0 of 2.0 GiB)\nkernels 25% (3 of 12)\ngraphs 10% (12 of 120)\n"
    )


def test_doctor_says_what_is_there_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    findings = doctor.examine()
    names = {f.name for f in findings}
    assert {
        "python",
        "packages",
        "core",
        "gpu",
        "cpu",
        "memory",
        "disk",
        "limits",
        "model",
        "exactness",
    } <= names
    assert all(f.level != "missing" for f in findings) and any(f.name.startswith("ops") for f in findings)
    monkeypatch.setattr(doctor, "NEEDED", (*doctor.NEEDED, "no_such_module"))
    missing = [f for f in doctor.examine() if f.level == "missing"]
    assert len(missing) == 1 and missing[0].fix == "pip install no_such_module"
    arguments = build_parser().parse_args(["doctor"])
    assert arguments.run(arguments) == 1

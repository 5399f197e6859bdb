"""What users do wrong at first, and what they are told: one line with the name, the value and a way on."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from pathlib import Path

import pytest
from dsv4.cli import build_parser, generate, main
from dsv4.cli.talking import Reply
from dsv4.config import backend_names
from dsv4.engine.request import Usage
from dsv4.spelling import nearest

ONE_GROUP = "an engine is one group of tensor-parallel ranks"

MISTAKES: list[tuple[str, list[str]]] = [
    # commands
    ("srve", ["unknown COMMAND 'srve'", "did you mean 'serve'?"]),
    ("frobnicate", ["frobnicate", "serve, generate, chat"]),
    ("--port 9000", ["unknown flag --port"]),
    ("trace", ["KIND", "agents"]),
    ("trace agent", ["'agent'", "did you mean 'agents'?"]),
    # flags of a command, also where another one is missing
    ("serve --tensor-parallel-size 0", ["tensor_parallel_size is 0", "the nearest is 1"]),
    ("serve --tp=3", ["tensor_parallel_size is 3", "1 or 2 ranks", "the nearest is 2"]),
    ("generate --tp two hi", ["tensor_parallel_size is 'two'"]),
    ("serve --rank-timeout 0", ["rank_timeout is 0"]),
    ("serve --tensor-split 1,1", [ONE_GROUP]),
    ("serve --pipeline-parallel-size 2", [ONE_GROUP]),
    ("serve --data-parallel-size 2", [ONE_GROUP]),
    ("serve --enable-expert-parallel", [ONE_GROUP]),
    ("serve --quantization fp8", ["--quantization", "formats that the checkpoint has"]),
    ("serve --trust-remote-code", ["no code of a checkpoint"]),
    ("serve --reasoning-parser deepseek_v4", ["leave it out"]),
    ("serve --context-length 64k", ["here it is '--max-model-len'"]),
    ("serve --max-model 64k", ["did you mean '--max-model-len'?"]),
    ("serve --max_model_len 64k", ["did you mean '--max-model-len'?"]),
    ("generate --temp 0.5 hi", ["--temp", "did you mean '--temperature'?"]),
    ("plan v4-flash --gpus h100", ["--gpus", "did you mean '--gpu'?"]),
    ("plan v4-flash --gpu h100 --enable-expert-parallel", ["unknown flag --enable-expert-parallel"]),
    ("simulate x.jsonl --polic none", ["did you mean '--policy'?"]),
    ("trace agents --session 3", ["did you mean '--sessions'?"]),
    ("doctor --jason", ["--jason", "did you mean '--json'?"]),
    # words too many
    ("generate Who are you", ["unexpected 'are'", "quote the prompt: dsv4 generate 'Who are you'"]),
    ("doctor please", ["'please'"]),
    ("doctor v4-flash please", ["unexpected 'please'"]),
    ("chat /models/x hello", ["unexpected 'hello'", "one MODEL"]),
    ("serve /a --model /b", ["model is given twice", "'/a'", "--model '/b'"]),
    # paths and settings that take the model to check, before torch is imported
    ("serve /nowhere/model", ["/nowhere/model", "directory"]),
    ("generate --model /nowhere hi", ["/nowhere", "directory"]),
    ("chat /nowhere", ["/nowhere", "directory"]),
    ("serve tests", ["tests/config.json", "No such file"]),
    ("serve --snapshot-policy turn", ["turn", "auto, forks, turns, every:N, none"]),
    ("serve --block-size 100", ["block_size is 100", "multiple of 128", "next is 128"]),
    ("plan v4-flash --gpu h200 --num 8 --block-size 300", ["block_size is 300", "next is 384"]),
    ("serve --tenants a", ["'a'", "NAME:WEIGHT"]),
    ("serve --cost-model token_us=x", ["cost_model", "token_us=x"]),
    ("serve --replay-tokens=-1", ["replay_tokens is -1"]),
    ("serve --max-wait 1e300", ["max_wait is 1e+300"]),
    ("serve --step-ms 1e300", ["step_ms is 1e+300"]),
    ("generate", ["the prompt is empty"]),
    ("chat --tools Makefile", ["tools file Makefile is no JSON"]),
    ("simulate x.jsonl --plot /nowhere/x.png", ["--plot /nowhere/x.png", "there is no folder /nowhere"]),
    # values
    ("serve --max-model-len 64q", ["max_model_len is '64q'", "64k"]),
    ("serve --max-model-len 1.5M", ["max_model_len is '1.5M'", "whole number"]),
    ("serve --max-num-seqs 2.5", ["max_num_seqs is '2.5'", "whole number"]),
    ("serve --max-num-seqs 1e30", ["max_num_seqs is '1e30'"]),
    ("serve --max-num-seqs 99999999999999999999", ["max_num_seqs is 99999999999999999999", "2147483647"]),
    ("serve --kv-cache-memory=-1GiB", ["kv_cache_memory is '-1GiB'", "above 0", "2GiB"]),
    # below zero, which argparse alone takes for flags
    ("serve --kv-cache-memory -5GiB", ["kv_cache_memory is '-5GiB'", "a size above 0, such as 2GiB"]),
    ("serve --body-min-rate -1k", ["body_min_rate is '-1k'", "a size from 0"]),
    ("serve --max-model-len -64k", ["max_model_len is -64000", "from 1", "the nearest is 1"]),
    ("serve --stuck-after -1e3", ["stuck_after is -1000"]),
    ("serve --gpu-memory-utilization -inf", ["gpu_memory_utilization is -inf", "above 0 and up to 1"]),
    ("serve --cudagraph-capture-sizes 4 -2k", ["cudagraph_capture_sizes has -2000", "the nearest is 1"]),
    ("plan v4-flash --gpu h200 --max-model-len -64k", ["--max-model-len", "'-64k'", "the nearest is 1"]),
    ("plan v4-flash --gpu h200 --pool-gb -4.5e1", ["--pool-gb", "'-4.5e1'", "above 0"]),
    ("bench serve --rate -1,2", ["--rate", "'-1'", "above 0"]),
    ("trace agents --sessions -1k", ["--sessions", "'-1k'", "the nearest is 1"]),
    ("generate --temperature -.5 hi", ["--temperature", "'-.5'", "the nearest is 0"]),
    ("serve --backend gluom", ["'gluom'", ", ".join(backend_names()), "'gluon'?"]),
    ("serve --dtype fp16", ["dtype is 'fp16'", "float32, bfloat16"]),
    ("serve --max-model-len lots", ["max_model_len is 'lots'", "whole number from 1, such as 64k or 1M"]),
    ("serve --max-model-len 0", ["max_model_len is 0", "the nearest is 1"]),
    ("serve --port abc", ["port is 'abc'", "from 0 to 65535"]),
    ("serve --port 70000", ["port is 70000", "the nearest is 65535"]),
    ("serve --gpu-memory-utilization 90", ["is 90", "above 0 and up to 1", "90% is 0.9"]),
    ("serve --gpu-memory-utilization nan", ["gpu_memory_utilization is nan"]),
    ("serve --snapshot-budget 1.5", ["snapshot_budget is 1.5", "the nearest is 1"]),
    ("serve --step-ms fast", ["step_ms is 'fast'", "above 0, auto or none"]),
    ("serve --max-wait never", ["max_wait is 'never'", "seconds from 0 to 1e9"]),
    ("serve --header-timeout 0", ["header_timeout is 0", "seconds above 0"]),
    ("serve --max-body-bytes 0", ["max_body_bytes is 0", "above 0"]),
    ("serve --dtype bf16", ["dtype is 'bf16'", "did you mean 'bfloat16'?"]),
    ("serve --device gpu", ["device is 'gpu'", "did you mean 'cuda'?"]),
    ("serve --log-level warn", ["log_level is 'warn'", "did you mean 'warning'?"]),
    ("serve --kv-cache-dtype fp8", ["kv_cache_dtype is 'fp8'", "did you mean 'fp8_ds_mla'?"]),
    ("serve --snapshot-policy every", ["snapshot_policy is 'every'", "every:8192"]),
    ("serve --snapshot-policy fork", ["snapshot_policy is 'fork'", "did you mean 'forks'?"]),
    ("calibrate --seconds 0", ["--seconds", "'0'", "the nearest is 1"]),
    ("calibrate --output tests", ["--output tests", "it is a folder"]),
    ("calibrate -o /nowhere/c.json", ["/nowhere/c.json", "there is no such folder"]),
    ("simulate x.jsonl --policy fork", ["'fork'", "did you mean 'forks'?"]),
    ("simulate x.jsonl --policy auto/lr", ["'auto/lr'", "value, lru, fifo"]),
    ("simulate x.jsonl --memory-fraction 90", ["--memory-fraction", "'90'", "90% is 0.9"]),
    ("simulate x.jsonl --limit 0", ["--limit", "'0'", "the nearest is 1"]),
    ("plan v4-flash --gpu h200 --gpu-memory-utilization 90", ["--gpu-memory-utilization", "90% is 0.9"]),
    ("plan v4-flash --gpu h200 --max-model-len lots", ["--max-model-len", "'lots'", "such as 64k or 1M"]),
    ("plan v4-flash --gpu h200 --max-model-len 2M", ["--max-model-len is 2097152", "1 to 1048576"]),
    ("plan v4-flash --gpu h200 --num 0", ["--num", "'0'", "the nearest is 1"]),
    ("plan v4-flash --gpu h200 --pool-gb=-4", ["--pool-gb", "'-4'", "above 0"]),
    ("plan v4-flash --gpu h200 --max-num-seqs 0", ["--max-num-seqs", "'0'", "the nearest is 1"]),
    ("trace agents --long 2", ["--long", "'2'", "2% is 0.02"]),
    ("trace agents --sessions 0", ["--sessions", "'0'", "the nearest is 1"]),
    ("generate --temperature 3 hi", ["--temperature", "'3'", "the nearest is 2"]),
    ("generate --top-p 2 hi", ["--top-p", "'2'", "above 0 and up to 1"]),
    ("generate --max-tokens many hi", ["--max-tokens", "'many'", "whole number"]),
    ("generate --temperature warm hi", ["--temperature", "'warm'", "a number"]),
    ("plan", ["MODEL is missing", "v4-flash"]),
    ("plan v4-flash", ["--gpu is missing", "h100"]),
    ("plan v4-flush --gpu h100", ["'v4-flush'", "did you mean 'v4-flash'?"]),
    ("plan v4-flash --gpu b100", ["'b100'", "did you mean 'b200'?"]),
    ("plan v4-flash --gpu h200 --num two", ["--num", "'two'", "whole number"]),
    ("plan v4-flash --gpu h200 --index fp5", ["--index", "'fp5'", "fp4, fp8"]),
    ("plan v4-flash --gpu h200 --weights release", ["--weights", "did you mean 'released'?"]),
    ("simulate x.jsonl --index-cache-dtype fp4", ["--index-cache-dtype", "'fp4'", "mxfp4"]),
    ("simulate x.jsonl --tp two", ["--tp", "'two'"]),
    ("dynamo --metrics-port 40000", ["metrics_port is 40000", "32767"]),
    ("dynamo --discovery-backend etdc", ["discovery_backend", "etdc", "file, etcd"]),
    ("dynamo --kv-events-config {}", ["kv_events_config is given", "leave it out"]),
    ("dynamo --port 9000", ["unknown flag --port"]),
    ("trace agents --hours long", ["--hours", "'long'"]),
    ("key a\x01b", ["tenant is 'a\\x01b'", "can be seen"]),
    ("bench", ["KIND", "serve, compare"]),
    ("bench serv", ["'serv'", "did you mean 'serve'?"]),
    ("bench serve --shape agents", ["--shape", "'agents'", "did you mean 'agent'?"]),
    ("bench serve --context lots", ["--context", "'lots'", "such as 4k"]),
    ("bench serve --context 8k..1k", ["'8k..1k'", "1k..8k"]),
    ("bench serve --context 100 --turns 2", ["--context is 100", "chat with 2 turns", "the nearest is 214"]),
    ("bench serve --shape batch --turns 2", ["--turns is 2", "chat, agent, document"]),
    ("bench serve --rate 0", ["--rate", "'0'", "above 0"]),
    ("bench serve --rate 1 --concurrency 2", ["--concurrency and --rate", "one of them"]),
    ("bench serve --goal tfft=3", ["'tfft=3'", "did you mean 'ttft'?"]),
    ("bench serve --goal ttft", ["--goal is 'ttft'", "NAME=MS", "such as ttft=2000\n"]),
    ("bench serve --goal ttft=soon", ["--goal ttft is 'soon'", "above 0"]),
    ("bench serve --search", ["--search has no goal", "--goal ttft=2000"]),
    ("bench serve --search --goal ttft=9 --rate 1,2", ["--search", "one --rate"]),
    ("bench serve --speed 2", ["--speed is 2", "--trace"]),
    ("bench serve --trace x.jsonl --context 1k", ["--context is 1000", "leave --context or --trace out"]),
    ("bench serve --trace /nowhere.jsonl", ["/nowhere.jsonl", "No such file"]),
    ("bench serve --body [1]", ["--body", "'[1]'", "an object of JSON"]),
    ("bench serve --json /nowhere/x.json", ["--json /nowhere/x.json", "no such folder"]),
    ("bench serve --url http://127.0.0.1:1", ["http://127.0.0.1:1 cannot be reached"]),
    ("bench compare /nowhere.json /nowhere.json", ["/nowhere.json", "No such file"]),
    ("bench compare Makefile Makefile", ["Makefile is no JSON", "dsv4 bench serve --json"]),
    ("trace agents -o /nowhere/x.jsonl --sessions 1", ["/nowhere/x.jsonl", "No such file"]),
]


def call(capsys: pytest.CaptureFixture[str], line: str) -> tuple[int, str, str]:
    try:
        code = main(line.split())
    except SystemExit as e:
        code = int(e.code or 0)
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_a_mistake_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, words: list[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for blocked in ("torch", "triton", "transformers"):  # as slow to import as the error is to be quick
        monkeypatch.setitem(sys.modules, blocked, None)
    code, out, err = call(capsys, line)
    assert code == 2 and out == "" and err.count("\n") == 1, err
    assert all(w in err for w in words), err


@pytest.mark.parametrize(
    "line",
    [
        "serve --keys-file",
        "serve --config",
        "serve --profile-dir",
        "generate --file",
        "chat --tools",
        "simulate",
        "simulate x.jsonl --plot",
        "trace agents --out",
        "bench serve --json",
        "bench compare x.json",
    ],
)
def test_an_empty_path_is_told(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """Of an unset variable; `generate -f ''` answered without the file, `--profile-dir ''` wrote into the folder at hand."""
    try:
        code = main([*line.split(), ""])
    except SystemExit as e:
        code = int(e.code or 0)
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and "is empty; it takes a path" in err, err


@pytest.mark.parametrize("words", [["-"], ["-f", "-"], [], ["-f", "FILE", "-"], ["-f", "-", "second"]])
def test_a_prompt_from_standard_input(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-` was a prompt of one dash."""
    (tmp_path / "FILE").write_text("first")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("read"))
    text = generate._prompt_text(build_parser().parse_args(["generate", *words]))
    assert text == "\n".join(["first"] * ("FILE" in words) + ["read"] + ["second"] * ("second" in words))


@pytest.mark.parametrize(
    ("line", "not_words"),
    [
        ("serve --stream", ["did you mean"]),
        ("serve --quantization fp8", ["--eviction"]),
        ("serve --dp 2", ["--dtype"]),
        ("plan v4-flash --gpu 4090", ["did you mean"]),
        ("plan v4-flash --gpu a100", ["did you mean"]),
        ("simulate x.jsonl --gpu V100-SXM2", ["did you mean"]),
        ("plan v4-flash --gpu h100 --enable-expert-parallel", [ONE_GROUP]),
        ("serve --rope-scaling x", ["did you mean"]),
        ("serve --port abc", ["64k"]),
        ("trace agents --seed x", ["64k"]),
    ],
)
def test_nothing_unlike_is_suggested(
    capsys: pytest.CaptureFixture[str], line: str, not_words: list[str]
) -> None:
    code, _, err = call(capsys, line)
    assert code == 2 and not any(w in err for w in not_words), err


def test_without_a_command_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "")
    assert (
        code == 2
        and out == ""
        and "the HTTP server" in err
        and err.splitlines()[-1].startswith("dsv4: error")
    )
    code, out, _ = call(capsys, "help plan")
    assert code == 0 and "--gpu" in out


def test_a_trace_is_not_written_to_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = call(capsys, "trace agents --sessions 1 --long 0")
    assert code == 0 and out.startswith("{")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    code, out, err = call(capsys, "trace agents --sessions 1 --long 0")
    assert code == 2 and out == "" and "-o FILE" in err


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("prot", "port"),
        ("PORT", "port"),
        ("max-num", "max-num-seqs' or 'max-num-waiting"),
        ("--max_num_seq", "max-num-seqs"),
        ("eviktion", "eviction"),
        ("4090", ""),
        ("tp", ""),
        ("", ""),
    ],
)
def test_a_suggestion_begins_like_the_word_or_is_much_like_it(word: str, meant: str) -> None:
    known = ("port", "max-num-seqs", "max-num-waiting", "eviction", "dtype", "step-ms", "h200")
    assert nearest(word, known) == (f"; did you mean '{meant}'?" if meant else "")


def test_the_picture_needs_a_package_that_there_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = call(capsys, f"simulate x.jsonl --plot {tmp_path / 'x.png'}")
    assert code == 2 and "pip install matplotlib" in err


def test_the_help_of_every_command_shows_defaults_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("serve", "generate", "chat", "plan", "simulate", "trace agents", "doctor"):
        code, out, _ = call(capsys, f"{command} --help")
        assert code == 0 and out.startswith(f"usage: dsv4 {command}")
        assert not any(word in out for word in ("[None]", "[True]", "[False]", "[()]")), out
    _, out, _ = call(capsys, "serve --help")
    for words in (
        "--max-num-seqs N",
        "[16]",
        "--kv-cache-memory-bytes SIZE",  # before Python 3.13 the value stands behind each name of a flag
        f"{'|'.join(backend_names())},…",
        "examples:",
    ):
        assert words in out


PLAN = "-m dsv4.cli plan v4-flash --gpu b200"


@pytest.mark.parametrize(
    ("shell", "code", "words"),
    [
        (f"{PLAN} > /dev/full", 1, "standard output: No space left on device"),
        ("-m dsv4.cli plan --help > /dev/full", 1, "standard output: No space left on device"),
        ("-m dsv4.cli --version > /dev/full", 1, "standard output: No space left on device"),
        ("-m dsv4.cli --help | head -1", 0, ""),
        (f"{PLAN} 2> /dev/full", 0, ""),
        (f"{PLAN} 2>&-", 0, ""),
        (f"{PLAN} >&-", 0, ""),
        (f"{PLAN} | head -1", 0, ""),
        (f"{PLAN[:-4]}b100 2> /dev/full", 2, ""),
        ("-m dsv4.cli generate <&-", 2, "the prompt is empty"),
    ],
)
def test_streams_that_are_full_or_closed_are_no_traceback(shell: str, code: int, words: str) -> None:
    command = ["bash", "-c", f"set -o pipefail; {sys.executable} {shell}"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == code and words in run.stderr and run.stderr.count("\n") == bool(words), (
        run.stderr
    )


@pytest.mark.parametrize("words", ["generate hi", "serve --port 0"])
def test_no_memory_for_torch_is_told_in_one_line(words: str) -> None:
    """It was a traceback; of the engine's process also where the line was there."""
    command = ["bash", "-c", f"ulimit -v 1500000; {sys.executable} -m dsv4.cli {words}"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and run.stderr.count("\n") == 1, run.stderr
    assert "failed to map segment" in run.stderr and "(ulimit -v)" in run.stderr


def test_an_answer_without_a_token_has_no_time() -> None:
    usage = Usage(prompt_tokens=5, completion_tokens=0, cached_tokens=0, explanation={})
    assert Reply(usage=usage).speed() == "5 prompt tokens, no token asked for"
    assert Reply(usage=dataclasses.replace(usage, prompt_tokens=1)).speed().startswith("1 prompt token, ")

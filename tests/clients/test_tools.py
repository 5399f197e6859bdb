"""Unmodified load generators, an evaluation harness and a fuzzer of APIs against a scripted model: no fault, and what they count is what was
served. `make test-tools` installs them and runs this; without them it is skipped."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_engine import FakeEngine, small_tokenizer
from tests.support.serving import RunningServer, running

ROOT = Path(os.environ.get("TOOLS", "/nonexistent"))
"""Where the virtual environments are."""

pytestmark = [
    pytest.mark.skipif(not ROOT.exists(), reason="run by make test-tools"),
    pytest.mark.timeout(1800),
]
ANSWER = "one two three four five six"
CASES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "10"))


@pytest.fixture
def server() -> Iterator[RunningServer]:
    tokenizer = small_tokenizer()
    with running(
        FakeEngine(lambda prompt: ANSWER, tokenizer=tokenizer), served_model_name=("dsv4",)
    ) as server:
        yield server


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with the tokenizer as `transformers` reads one."""
    (tmp_path / "tok").mkdir()
    shutil.copy(str(resources.files("dsv4") / "data" / "nano" / "tokenizer.json"), tmp_path / "tok")
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<｜begin▁of▁sentence｜>",
        "eos_token": "<｜end▁of▁sentence｜>",
        "pad_token": "<｜end▁of▁sentence｜>",
    }
    (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(about))
    return tmp_path


def run(home: Path, tool: str, *arguments: str, **env: str) -> str:
    """Runs a tool that sees nothing of this machine but its own home; what it says."""
    binary = next((ROOT / tool.replace("-", "_") / "bin").glob(tool))
    done = subprocess.run(
        [str(binary), *arguments],
        cwd=home,
        env={"HOME": str(home), "PATH": os.environ["PATH"], "OPENAI_API_KEY": "k", **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-9000:] + done.stderr[-4000:]
    return done.stdout


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_schemathesis(server: RunningServer, home: Path) -> None:
    """No 5xx, no status, type or answer that the document does not have, and what it bars is refused. Not checked: that all that fits is
    taken, as it cannot say which fields exclude each other."""
    said = run(
        home,
        "schemathesis",
        "run",
        f"{server.url}/openapi.json",
        "--max-examples",
        str(CASES),
        "--exclude-checks",
        "positive_data_acceptance",
        "--exclude-path-regex",
        "^/(admin|flush_cache|reset_prefix_cache|beta)",  # an operator's, and what is there by another name
        "--continue-on-failure",
        "--no-color",
    )
    (cases,) = re.findall(r"(\d+) generated, \1 passed|(\d+) generated", said)[:1]
    assert int(next(filter(None, cases))) > 1000, said[-2000:]


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: "{target}"
{more}
metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]
"""


def lm_eval(
    server: RunningServer, home: Path, model: str, task: str, *more: str, remote: bool = False
) -> dict[str, Any]:
    """The results of a task. `remote`: the server's own tokenizer is asked."""
    path = "chat/completions" if "chat" in model else "completions"
    tokenizer = "tokenizer_backend=remote" if remote else f"tokenizer={home / 'tok'}"
    about = f"model=dsv4,base_url={server.url}/v1/{path},num_concurrent=4,{tokenizer},max_length=2048"
    how = ("--tasks", task, "--include_path", str(home), "--output_path", str(home / "out"), *more)
    run(home, "lm-eval", "run", "--model", model, "--model_args", about, *how, **OFFLINE)
    (found,) = (home / "out").rglob("results_*.json")
    return json.loads(found.read_text())["results"][task]


@pytest.mark.parametrize("remote", [False, True], ids=["own tokenizer", "the server's"])
def test_lm_eval_judges_choices(server: RunningServer, home: Path, remote: bool) -> None:
    """Token ids, echo and log-probabilities; each question with each of its choices is one prompt."""
    data = home / "mc.jsonl"
    rows = [
        {"question": f"What is {n} plus one?", "choices": [f"{n + 1}", "a house"], "gold": 0}
        for n in range(20)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = 'doc_to_choice: "{{choices}}"'
    task = TASK.format(
        name="mc", data=data, kind="multiple_choice", target="{{gold}}", more=more, metric="acc"
    )
    (home / "mc.yaml").write_text(task)
    found = lm_eval(server, home, "local-completions", "mc", "--batch_size", "4", remote=remote)
    assert 0 <= found["acc,none"] <= 1 and len(server.engine.seen) == 2 * len(rows)


def test_lm_eval_generates(server: RunningServer, home: Path) -> None:
    data = home / "gen.jsonl"
    data.write_text(
        "".join(json.dumps({"question": f"Count, {n}.", "answer": ANSWER}) + "\n" for n in range(20))
    )
    more = "generation_kwargs: {until: ['\\n'], max_gen_toks: 64}"
    task = TASK.format(
        name="gen", data=data, kind="generate_until", target="{{answer}}", more=more, metric="exact_match"
    )
    (home / "gen.yaml").write_text(task)
    found = lm_eval(server, home, "local-chat-completions", "gen", "--apply_chat_template")
    assert found["exact_match,none"] == 1 and len(server.engine.seen) == 20


def test_aiperf(server: RunningServer, home: Path) -> None:
    run(
        home,
        *(
            "aiperf",
            "profile",
            "--model",
            "dsv4",
            "--url",
            server.url,
            "--endpoint-type",
            "chat",
            "--streaming",
        ),
        *("--tokenizer", str(home / "tok"), "--request-count", "12", "--concurrency", "4", "--ui", "none"),
        *(
            "--synthetic-input-tokens-mean",
            "64",
            "--use-server-token-count",
            "--artifact-dir",
            str(home / "out"),
        ),
    )
    (found,) = (home / "out").rglob("profile_export_aiperf.json")
    results = json.loads(found.read_text())
    assert results["request_count"]["avg"] == 12 and not results.get("error_request_count")
    served = sum(len(server.engine.tokenizer.encode(ANSWER)) + 1 for _ in range(12))
    assert results["total_output_tokens"]["avg"] == served
    asked = sum(len(seen.prompt) for seen in server.engine.seen[-12:])
    assert results["total_usage_prompt_tokens"]["avg"] == asked


def test_guidellm(server: RunningServer, home: Path) -> None:
    run(
        home,
        *("guidellm", "run", "--backend", f"kind=openai_http,target={server.url},model=dsv4", "--profile"),
        *("kind=concurrent,streams=4", "--constraint", "kind=max_requests,count=20", "--tokenizer"),
        *(
            f"kind=hf_auto,model={home / 'tok'}",
            "--data",
            "kind=synthetic_text,prompt_tokens=64,output_tokens=6",
        ),
        *("--output", f"kind=json,path={home / 'out.json'}", "--disable-progress"),
        **OFFLINE,
    )
    (benchmark,) = json.loads((home / "out.json").read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (20, 0)
    done = benchmark["requests"]["successful"]
    assert sum(r["output_metrics"]["text_tokens"] for r in done) == sum(
        min(seen.params.max_tokens, len(server.engine.tokenizer.encode(ANSWER)) + 1)
        for seen in server.engine.seen[-20:]
    )

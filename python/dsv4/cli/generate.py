"""`dsv4 generate`: one answer on standard output, everything else on standard error."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv4.cli.common import add_settings, dim, note, read_settings
from dsv4.cli.words import count, number
from dsv4.config import EngineConfig
from dsv4.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from dsv4.cli.talking import Reply
    from dsv4.engine.llm import LLM
    from dsv4.sampling import SamplingParams

    SamplingOf = Callable[[LLM], SamplingParams]


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="one answer on standard output",
        usage="%(prog)s [PROMPT] [-f FILE] [-m MODEL] [flags]",
        description="Answers one prompt: PROMPT, a file, or standard input. The answer goes to standard output.",
        epilog="examples:\n  dsv4 generate 'Who are you?'\n  dsv4 generate -f letter.txt 'What is the passphrase for harbor?'\n"
        "  git diff | dsv4 generate -m /models/DeepSeek-V4-Flash --think",
    )
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the text; - or neither it nor -f: standard input"
    )
    parser.add_argument(
        "-f",
        "--file",
        metavar="FILE",
        help="read the prompt from a file, - for standard input; with PROMPT, the file comes first",
    )
    parser.add_argument(
        "-m", "--model", metavar="MODEL", help="model directory (default: the small model that ships)"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--chat", dest="raw", action="store_false", help="the prompt is a user's message (default)"
    )
    how.add_argument("--raw", dest="raw", action="store_true", help="continue the prompt as it stands")
    parser.add_argument(
        "--token-ids", action="store_true", help="the prompt is token ids, separated by spaces or commas"
    )
    parser.add_argument(
        "--think", action="store_true", help="let the model think first; its thoughts go to standard error"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object at the end instead of streaming"
    )
    add_sampling(parser, max_tokens="256")
    add_settings(parser, EngineConfig, model=False)
    parser.set_defaults(run=run, raw=False)


def add_sampling(parser: argparse.ArgumentParser, *, max_tokens: str) -> None:
    """The sampling flags that a terminal needs."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens",
        type=count(0, such="256"),
        metavar="N",
        help=f"most tokens of an answer [{max_tokens}]",
    )
    group.add_argument(
        "--temperature",
        type=number(0, 2),
        metavar="T",
        help="0 always takes the likeliest token [what the model's generation_config.json says, else 0]",
    )
    group.add_argument(
        "--top-p",
        type=number(0, 1, open=True),
        metavar="P",
        help="share of probability to draw from [the same, else 1]",
    )


def sampling_of(arguments: argparse.Namespace, max_tokens: int | None) -> SamplingOf:
    """What makes SamplingParams of the flags, once the model with its defaults is there. Raises ConfigError at once where a
    flag is wrong."""
    from dsv4.sampling import SamplingParams

    given = {
        "max_tokens": max_tokens if arguments.max_tokens is None else arguments.max_tokens,
        "temperature": arguments.temperature,
        "top_p": arguments.top_p,
        "seed": arguments.seed and int(arguments.seed),
    }
    given = {k: v for k, v in given.items() if v is not None or k == "max_tokens"}
    try:
        SamplingParams(**given)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    return lambda llm: llm.get_default_sampling_params(
        **{"temperature": 0.0, **llm.sampling_defaults, **given}
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when the answer ended by itself or by length, 130 after Ctrl-C."""
    (config,) = read_settings(arguments, EngineConfig)
    text = _prompt_text(arguments)
    params = sampling_of(arguments, 256)
    from dsv4.cli.talking import Printer, answer, load_model, write
    from dsv4.text.stream import Reading

    llm = load_model(config)
    prompt = _prompt_ids(llm, text, arguments)
    show = (lambda piece: None) if arguments.json else Printer().show
    # Token ids may be the prompt of any chat, so calls are looked for in what follows them.
    reading = None if arguments.raw else Reading(thinking=arguments.think, tools=arguments.token_ids)
    reply = answer(llm, prompt, params(llm), reading=reading, show=show)
    if arguments.json:
        print(json.dumps(_as_json(reply), ensure_ascii=False))
    elif llm.tokenizer is None:
        print(" ".join(map(str, reply.token_ids)))
    else:
        write("\n")
    note(dim(reply.speed()))
    return 0 if reply.usage is not None else 130


def _prompt_text(arguments: argparse.Namespace) -> str:
    """File, then PROMPT; for - and without both, standard input."""
    parts = []
    if arguments.file is not None:
        parts.append(_of_file(arguments.file))
    if arguments.prompt is not None:
        parts.append(sys.stdin.read() if arguments.prompt == "-" else arguments.prompt)
    text = "\n".join(parts) if parts else sys.stdin.read()
    if not text.strip():
        raise ConfigError("the prompt is empty; give it as an argument, with -f FILE or on standard input")
    return text


def _of_file(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"prompt file {name}: {getattr(e, 'strerror', None) or e}") from None


def _prompt_ids(llm: LLM, text: str, arguments: argparse.Namespace) -> list[int]:
    if arguments.token_ids:
        try:
            return [int(t) for t in text.replace(",", " ").split()]
        except ValueError:
            raise ConfigError(
                "the prompt holds something that is no token id; write numbers such as '0 15 27'"
            ) from None
    if llm.tokenizer is None:
        raise RequestError(
            "this model's directory has no tokenizer; use --token-ids", "prompt", "no_tokenizer", 400
        )
    if arguments.raw:
        return llm.tokenizer.encode(text)
    return llm.chat_ids([{"role": "user", "content": text}], thinking=arguments.think)


def _as_json(reply: Reply) -> dict[str, Any]:
    usage = reply.usage
    return {
        "text": reply.blocks.content,
        "reasoning": reply.blocks.reasoning,
        "tool_calls": reply.calls(),
        "token_ids": reply.token_ids,
        "finish_reason": reply.finish_reason,
        "usage": usage
        and {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
            "explanation": usage.explanation,
        },
        "seconds_to_first_token": round(reply.first - reply.began, 4) if reply.token_ids else None,
        "seconds": round(max(reply.last - reply.began, 0.0), 4),
    }

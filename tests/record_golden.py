"""Records what `transformers` writes with the model that ships: greedy continuations of a few prompts.

    python -m tests.record_golden

makes tests/data/nano_golden.json, against which tests/e2e/test_nano.py compares the engine. The long prompt is the text of
this repository's LICENSE with a passphrase planted more than 4,000 tokens before the question.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from dsv4.model.config import ModelConfig
from dsv4.model.weights import load_weights
from dsv4.text.chat import encode_chat
from dsv4.text.chat_format import choose_format
from dsv4.text.tokenizer import Tokenizer

from tests.support.models import hf_twin

NANO = resources.files("dsv4") / "data" / "nano"
GOLDEN = Path(__file__).parent / "data" / "nano_golden.json"
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
LIGHT = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Switch the light of a room on or off",
        "parameters": {
            "type": "object",
            "properties": {"room": {"type": "string"}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    },
}
KEY, PASSPHRASE = "harbor", "violet-anchor-42"


def license_with_plant() -> str:
    """About 5,000 tokens: the plant lies 600 tokens from the start."""
    text = (Path(__file__).parents[1] / "LICENSE").read_text()
    body = text + "\n\n" + text[:7000]
    return f"{body[:1800]}\n\nThe passphrase for {KEY} is {PASSPHRASE}.\n\n{body[1800:]}"


def cases() -> dict[str, dict[str, Any]]:
    """Chats by name: messages, tools and the number of tokens to write."""
    light = user("Turn off the light in the kitchen.")
    call = {"id": "1", "function": {"name": "set_light", "arguments": {"room": "kitchen", "on": False}}}
    result = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    found = user(f"{license_with_plant()}\n\nWhat is the passphrase for {KEY}?")
    return {
        "hello": {"messages": [user("Hello")], "tokens": 32},
        "who": {"messages": [user("Who are you?")], "tokens": 64},
        "repeat": {"messages": [user("Repeat: seven green boats on a quiet river")], "tokens": 32},
        "fact": {"messages": [user("What is a snapshot?")], "tokens": 48},
        "thinking": {"messages": [user("What is HCA?")], "thinking": True, "tokens": 64},
        "tool": {
            "messages": [user("What is the weather in Prague?")],
            "tools": [WEATHER, LIGHT],
            "tokens": 64,
        },
        "typed": {"messages": [light], "tools": [WEATHER, LIGHT], "tokens": 64},
        "result": {"messages": [light, *result], "tools": [WEATHER, LIGHT], "tokens": 64},
        "passphrase": {"messages": [found], "tokens": 24},
    }


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def prompt_ids(case: dict[str, Any], tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """The case's prompt as the server would build it."""
    format = choose_format(str(NANO), config)[0]
    thinking = case.get("thinking", False)
    segments = encode_chat(case["messages"], tools=case.get("tools"), thinking=thinking, format=format)
    return tokenizer.encode_segments(segments)


@torch.no_grad()
def continue_greedily(model: torch.nn.Module, prompt: list[int], n: int, eos: int) -> list[int]:
    """Token by token with the cache of `transformers`."""
    out: list[int] = []
    step = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    while len(out) < n:
        out.append(int(step.logits[0, -1].argmax()))
        if out[-1] == eos:
            break
        step = model(torch.tensor([[out[-1]]]), past_key_values=step.past_key_values, use_cache=True)
    return out


def main() -> None:
    config = ModelConfig.from_dir(str(NANO))
    tokenizer = Tokenizer.from_dir(str(NANO), vocab_size=config.vocab_size)
    model = hf_twin(config, load_weights(str(NANO), config, torch.float32))
    golden = {}
    for name, case in cases().items():
        prompt = prompt_ids(case, tokenizer, config)
        ids = continue_greedily(model, prompt, case["tokens"], config.eos_ids[0])
        golden[name] = {
            "prompt_tokens": len(prompt),
            "ids": ids,
            "text": tokenizer.decode(ids, skip_special=False),
        }
        print(name, len(prompt), repr(golden[name]["text"]))
    GOLDEN.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()

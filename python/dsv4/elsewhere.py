"""Settings that users of other engines know: what they are called here, or why there is nothing to set."""

from __future__ import annotations

from collections.abc import Collection

from dsv4.spelling import nearest

_ONE_GROUP = (
    "an engine is one group of tensor-parallel ranks (--tensor-parallel-size); start one server for each group and share "
    "requests out in front"
)
_PARSED = "reasoning and tool calls are always told apart; leave it out"
_PROMPTS = "prompts are written in DeepSeek-V4's own format; leave it out"
_NO_DRAFTS = "speculative decoding is not there yet"

REASONS: dict[str, str] = {
    **dict.fromkeys(
        (
            "pipeline-parallel-size",
            "pp",
            "pp-size",
            "data-parallel-size",
            "dp",
            "dp-size",
            "decode-context-parallel-size",
            "enable-expert-parallel",
            "ep",
            "ep-size",
            "nnodes",
            "tensor-split",
            "split-mode",
        ),
        _ONE_GROUP,
    ),
    **dict.fromkeys(
        ("tool-call-parser", "reasoning-parser", "enable-auto-tool-choice", "enable-reasoning"), _PARSED
    ),
    "quantization": "weights are used in the formats that the checkpoint has; leave it out",
    **dict.fromkeys(("chat-template", "tokenizer-mode", "jinja"), _PROMPTS),
    **dict.fromkeys(
        ("speculative-config", "speculative-algorithm", "speculative-num-steps", "num-speculative-tokens"),
        _NO_DRAFTS,
    ),
    "trust-remote-code": "no code of a checkpoint is ever run; leave it out",
    "enable-chunked-prefill": "prompts are always read in chunks (--max-num-batched-tokens); leave it out",
    "n-gpu-layers": "the whole model is on the GPU or on the CPU; choose with --device",
    "download-dir": "nothing is downloaded; give MODEL as a directory",
    "enable-lora": "adapters are not supported",
}
"""Name with dashes -> why it is not here."""

RENAMED: dict[str, str] = {
    "model-path": "model",
    "context-length": "max-model-len",
    "ctx-size": "max-model-len",
    "max-total-tokens": "max-model-len",
    "mem-fraction-static": "gpu-memory-utilization",
    "max-running-requests": "max-num-seqs",
    "max-queued-requests": "max-num-waiting",
    "chunked-prefill-size": "max-num-batched-tokens",
    "page-size": "block-size",
    "disable-radix-cache": "no-enable-prefix-caching",
    "disable-cuda-graph": "enforce-eager",
    "alias": "served-model-name",
    "random-seed": "seed",
    "n-predict": "max-tokens",
}
"""Name elsewhere -> the same here."""


def why_not(name: str, known: Collection[str]) -> str:
    """What to add to an error about a setting that is not in `known`: why there is none, what it is called here, or the
    nearest name. Names are flags, or keys with _ for -."""
    plain = name.lstrip("-").replace("_", "-").lower()
    written = {n.lstrip("-").replace("_", "-"): n for n in known}
    # `dsv4 plan` knows of other ways to use several GPUs.
    if plain in REASONS and not (REASONS[plain] is _ONE_GROUP and "dp" in written):
        return f": {REASONS[plain]}"
    here = written.get(RENAMED.get(plain, ""))
    return f"; here it is {here!r}" if here else nearest(name, known)

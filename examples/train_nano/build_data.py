"""Builds the corpus, the conversations and the tokenizer.

    python3 build_data.py --debs DEBS --out DATA [--download] [--tokenizer FILE] [--small]

DEBS holds Debian 12 packages (`--download` fetches those that are missing, with apt-get). DATA gets text.xz and
chats.xz (pieces between NUL bytes), valid.txt, checks.json (held-out conversations), words.json, tokenizer.json and
sources.json: about 20 MB, a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import wordnet
from chats import Chat, Writer, render
from pages import documents
from sources import SOURCES, WORDNET, download
from wordnet import Word

VOCABULARY = 6272
"""With the MTP block, tokenizer and card the largest that stays below 25 MB; a multiple of 128."""

SPECIAL = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
    "｜DSML｜",
    "<｜latest_reminder｜>",
    *(f"<｜{t}｜>" for t in ("action", "query", "authority", "domain", "title", "read_url")),
    *(f"<｜fim▁{t}｜>" for t in ("begin", "hole", "end")),
    *(f"<｜place▁holder▁no▁{i}｜>" for i in range(14)),
]
"""Ids 0 to 31."""

HELD_OUT_CHARS = 600_000
SMALL = ("apache2-doc", "llvm-14-doc", "perl-doc")


def collect(debs: Path, share: float) -> tuple[list[str], list[tuple[str, str]], list[dict]]:
    """Documents, (heading, paragraph) pairs and what came from where."""
    seen: set[bytes] = set()
    docs: list[str] = []
    pairs: list[tuple[str, str]] = []
    stats = []
    for source in SOURCES if share == 1 else [s for s in SOURCES if s.package in SMALL]:
        texts, headings = documents(source, debs, seen)
        kept = texts[: max(1, round(len(texts) * share))]
        docs += kept
        pairs += headings
        size = sum(map(len, kept))
        stats.append({"package": source.package, "licence": source.licence, "bytes": size})
        print(f"{source.package:24} {source.licence:34} {size / 1e6:5.1f} MB", flush=True)
    return docs, pairs, stats


def glosses(words: Sequence[Word]) -> list[str]:
    """WordNet as text, forty words a piece."""
    lines = [f"{w.word}: {w.gloss}." + "".join(f' "{e}"' for e in w.examples) for w in words]
    pieces = ["\n".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]
    random.Random(2).shuffle(pieces)
    return pieces[:400]


def train_tokenizer(texts: list[str], out: Path) -> None:
    """Byte-level BPE with the releases' three splits."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    words = (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    splits = (r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+", words)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(s), "isolated") for s in splits),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(s, special=True, normalized=False) for s in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    made = json.loads(tokenizer.to_str())
    # As in the releases, whose marks of roles, thoughts and calls are added tokens but not special ones.
    for token in made["added_tokens"]:
        if (
            "▁of▁" not in token["content"]
            and "▁pad▁" not in token["content"]
            and "▁no▁" not in token["content"]
        ):
            token["special"], token["normalized"] = False, True
    out.write_text(json.dumps(made, ensure_ascii=False, separators=(",", ":")))
    print(f"vocabulary {tokenizer.get_vocab_size()}", flush=True)


def checks(writer: Writer) -> dict[str, list]:
    """Held-out conversations by kind, each as messages (the last one is the expected answer)."""
    repeats = [writer.repeat() for _ in range(200)]
    for exchange in repeats:
        for message in exchange:
            message.pop("reasoning_content", None)
    chats: list[Chat] = [writer.chat() for _ in range(1500)]
    tools = [c for c in chats if c.tools and not c.thinking][:100]
    thinking = [c for c in chats if c.thinking and not c.tools][:60]
    plain = [c for c in chats if not c.thinking and not c.tools][:100]

    def pack(items: list[Chat]) -> list[dict]:
        return [{"messages": c.messages, "tools": c.tools, "thinking": c.thinking} for c in items]

    return {"repeat": repeats, "tools": pack(tools), "thinking": pack(thinking), "plain": pack(plain)}


def short_sentences(docs: Sequence[str]) -> list[str]:
    """Sentences of 20 to 90 letters, to be repeated."""
    out = []
    for doc in docs[::5]:
        out += re.findall(r"(?:(?<=\. )|(?<=\n))[A-Z][a-z][A-Za-z ,']{18,88}\.(?=\s)", doc)[:20]
    return out or ["This is a sentence of some words."]


def share_that_loops(docs: Sequence[str], folder: Path) -> float:
    """Of windows of 200 tokens in a thousand texts: what free prose of the model is to be compared with."""
    from items import loops
    from tokenizers import Tokenizer

    tokenizer, found = Tokenizer.from_file(str(folder / "tokenizer.json")), []
    for doc in random.Random(4).sample(docs, min(1000, len(docs))):
        ids = tokenizer.encode(doc[:20_000], add_special_tokens=False).ids
        found += [loops(ids[i : i + 200]) for i in range(0, len(ids) - 199, 200)]
    return sum(found) / max(1, len(found))


def write_pieces(path: Path, pieces: Sequence[str]) -> None:
    data = "\0".join(pieces).encode()
    path.write_bytes(lzma.compress(data, preset=6))
    print(f"{path.name}: {len(data) / 1e6:.1f} MB in {path.stat().st_size / 1e6:.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--download", action="store_true")
    parser.add_argument("--tokenizer", type=Path, help="one to keep, instead of training one on the new text")
    parser.add_argument("--small", action="store_true", help="a twentieth of the data, to try the pipeline")
    args = parser.parse_args()
    if args.download:
        download(args.debs)
    args.out.mkdir(parents=True, exist_ok=True)
    docs, pairs, stats = collect(args.debs, 0.1 if args.small else 1)
    words = wordnet.words(args.debs)
    random.Random(0).shuffle(docs)
    held_out = max(1, len(docs) // 60)
    valid = "\n\n".join(docs[:held_out])[:HELD_OUT_CHARS]
    train = docs[held_out:]
    pairs = [p for p in pairs if p[1] not in valid]
    sentences = short_sentences(train)
    writer = Writer(words, pairs, sentences, random.Random(0))
    chats = [render(writer.chat()) for _ in range(4000 if args.small else 80_000)]
    texts = glosses(words)
    stats.append({"package": WORDNET.package, "licence": WORDNET.licence, "bytes": sum(map(len, texts))})
    train += texts[:20] if args.small else texts
    nouns = [
        w.word for w in sorted(words, key=lambda w: -w.common) if w.pos == "noun" and 4 <= len(w.word) <= 9
    ]
    if args.tokenizer:
        shutil.copy(args.tokenizer, args.out / "tokenizer.json")
    else:
        strip = re.compile("|".join(map(re.escape, SPECIAL)))
        sample = random.Random(3).sample(train, len(train) // 2) + [
            strip.sub("\n", c) for c in chats[:15_000]
        ]
        train_tokenizer(sample, args.out / "tokenizer.json")
    print(f"{share_that_loops(train, args.out):.1%} of the text's windows of 200 tokens loop", flush=True)
    write_pieces(args.out / "text.xz", train)
    write_pieces(args.out / "chats.xz", chats)
    (args.out / "valid.txt").write_text(valid)
    held_out_writer = Writer(words, pairs, sentences, random.Random(999))
    (args.out / "checks.json").write_text(json.dumps(checks(held_out_writer), ensure_ascii=False))
    (args.out / "words.json").write_text(json.dumps(nouns[:3000]))
    (args.out / "sources.json").write_text(json.dumps(stats, indent=1))


if __name__ == "__main__":
    main()

"""Figures of a model in training, quickly, on its own device (evaluate.py has the engine's, which are published)."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import items
import torch
import torch.nn.functional as F
from dataset import BOS, EOS, PAD, Dataset
from items import LENGTHS, Item
from model import Nano
from torch import Tensor


class Measure:
    """Runs parts one after the other until the time is up; `report` holds what there is, on disk after each."""

    def __init__(self, model: Nano, data: Dataset, file: Path, deadline: float, scale: float = 1.0) -> None:
        self.model, self.data, self.file, self.deadline, self.scale = model, data, file, deadline, scale
        self.device = next(model.parameters()).device
        self.report: dict[str, Any] = {}

    @torch.no_grad()
    def all(self, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
        """Every part; one that fails or comes too late does not keep the others."""
        parts: list[tuple[str, Callable[[], Any]]] = [
            ("repeat", lambda: self.exact(items.repeats(self.data, self._count(200)))),
            ("prose", self.prose),
            ("questions", lambda: self.known(held_out=False)),
            ("tools", self.tools),
            ("draft", self.draft),
            ("bits per byte", self.bits_per_byte),
        ]
        for length in lengths:
            count = self._count(64 if length < 8192 else 32 if length < 32768 else 24)
            parts.append((f"retrieval {length}", lambda n=length, c=count: self.passphrases(n, c)))
        parts += [
            ("questions, other wording", lambda: self.known(held_out=True)),
            ("stops", self.stops),
            ("thinking", self.thinking),
            ("samples", self.samples),
        ]
        for name, part in parts:
            began = time.time()
            if began > self.deadline:
                self.report[name] = "no time"
                continue
            try:
                self.report[name] = part()
            except Exception as e:  # a figure less, but no file lost
                self.report[name] = f"failed: {e!r:.200}"
            self.report.setdefault("seconds", {})[name] = round(time.time() - began, 1)
            self.file.write_text(json.dumps(self.report, indent=1, ensure_ascii=False))
        return self.report

    def _count(self, n: int) -> int:
        return max(2, round(n * self.scale))

    def exact(self, wanted: Sequence[Item], batch_tokens: int = 16384) -> float:
        """Share of answers of which every token is the most likely one: what greedy decoding would write."""
        return self._share(wanted, batch_tokens, 0)

    def _share(self, wanted: Sequence[Item], batch_tokens: int, skip: int) -> float:
        right = 0
        todo = sorted(wanted, key=lambda i: len(i.prompt))
        while todo:
            longest = len(todo[-1].prompt) + len(todo[-1].answer)
            batch = [todo.pop() for _ in range(min(len(todo), max(1, min(64, batch_tokens // longest))))]
            hidden = self.model.hidden(self._pad([i.prompt + i.answer for i in batch]))[0]
            for row, item in zip(hidden, batch, strict=True):
                at, n = len(item.prompt) - 1, len(item.answer)
                best = self.model.logits(row[at + skip : at + n]).argmax(-1).tolist()
                right += best == item.answer[skip:]
        return round(right / len(wanted), 4)

    def _pad(self, rows: Sequence[list[int]]) -> Tensor:
        longest = max(map(len, rows))
        longest += -longest % 128
        return torch.tensor([r + [PAD] * (longest - len(r)) for r in rows], device=self.device)

    def passphrases(self, length: int, count: int) -> dict[str, float]:
        """Whole answers, and (less strictly) the answer's first value token."""
        wanted = items.passphrases(self.data, length, count)
        right, first, tokens = 0, 0, 0
        size = max(1, min(16, 16384 // length))
        for i in range(0, count, size):
            batch = wanted[i : i + size]
            hidden = self.model.hidden(self._pad([x.prompt + x.answer for x in batch]))[0]
            for row, item in zip(hidden, batch, strict=True):
                at, n = len(item.prompt) - 1, len(item.answer)
                best = self.model.logits(row[at : at + n]).argmax(-1).tolist()
                wrong = [a != b for a, b in zip(best, item.answer, strict=True)]
                right += not any(wrong)
                tokens += sum(wrong)
                first += n
        return {"whole": round(right / count, 4), "token errors": round(tokens / first, 5), "of": count}

    def bits_per_byte(self, length: int = 2048) -> float:
        valid = torch.from_numpy(self.data.valid.astype("int64"))[: self._count(400_000)].to(self.device)
        length = min(length, len(valid) - 1)
        nats, rows = 0.0, (len(valid) - 1) // length
        for i in range(0, rows, 8):
            x = torch.stack([valid[j * length : (j + 1) * length + 1] for j in range(i, min(rows, i + 8))])
            logits = self.model.logits(self.model.hidden(x[:, :-1])[0])
            nats += F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
        share = rows * length / len(self.data.valid)
        return round(nats / math.log(2) / (self.data.valid_bytes * share), 4)

    @torch.no_grad()
    def write(self, prompts: Sequence[list[int]], tokens: int, temperature: float = 0.0) -> list[list[int]]:
        """Continuations up to and with EOS; every step computes the whole rows."""
        rows, done = [list(p) for p in prompts], [False] * len(prompts)
        generator = torch.Generator(device=self.device).manual_seed(1)
        for _ in range(tokens):
            hidden = self.model.hidden(self._pad(rows))[0]
            last = torch.tensor([len(r) - 1 for r in rows], device=self.device)
            logits = self.model.logits(hidden[torch.arange(len(rows), device=self.device), last])
            if temperature:
                chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            else:
                chosen = logits.argmax(-1)
            for i, token in enumerate(chosen.tolist()):
                if not done[i]:
                    rows[i].append(token)
                    done[i] = token == EOS
            if all(done) or time.time() > self.deadline:
                break
        return [r[len(p) :] for r, p in zip(rows, prompts, strict=True)]

    def known(self, held_out: bool) -> dict[str, Any]:
        wanted = items.questions(self.data, held_out)[: self._count(50)]
        said = [self._text(ids) for ids in self.write([i.prompt for i in wanted], 48)]
        right = [i.key.lower() in text.lower() for i, text in zip(wanted, said, strict=True)]
        return {
            "right": sum(right),
            "of": len(wanted),
            "wrong": [s for s, ok in zip(said, right, strict=True) if not ok],
        }

    def _text(self, ids: list[int]) -> str:
        return self.data.tokenizer.decode(ids, skip_special_tokens=False)

    def tools(self) -> dict[str, float]:
        calls, answers = items.tool_calls(self.data, self._count(100))
        return {"calls": self.exact(calls), "answers": self.exact(answers)}

    def thinking(self) -> dict[str, float]:
        whole, thoughts = items.thoughts(self.data, self._count(60))
        return {"whole": self.exact(whole), "thoughts": self.exact(thoughts)}

    def draft(self) -> dict[str, float]:
        """How often the MTP block's guess is what the model writes next: on its own greedy answers and on text."""
        wanted = items.conversations(self.data, self._count(60))
        rows = [
            i.prompt + ids for i, ids in zip(wanted, self.write([i.prompt for i in wanted], 48), strict=True)
        ]
        starts = [len(i.prompt) for i in wanted]
        valid = self.data.valid[: 8 * 1024].astype("int64").tolist()
        texts = [valid[i : i + 1024] for i in range(0, len(valid), 1024)]
        return {"answers": self._accepted(rows, starts), "text": self._accepted(texts, [1] * len(texts))}

    def _accepted(self, rows: Sequence[list[int]], starts: Sequence[int]) -> float:
        right, of = 0, 0
        for row, start in zip(rows, starts, strict=True):
            x = self._pad([row])
            hidden, streams = self.model.hidden(x)
            following = F.pad(x[:, 1:], (0, 1), value=PAD)
            guess = self.model.logits(self.model.draft(streams, following)[0])[0].argmax(-1)
            best = self.model.logits(hidden)[0].argmax(-1)
            lo, hi = start - 1, len(row) - 2
            right += int((guess[lo:hi] == best[lo + 1 : hi + 1]).sum())
            of += max(0, hi - lo)
        return round(right / max(1, of), 4)

    def stops(self) -> str:
        wanted = items.conversations(self.data, self._count(60))
        said = self.write([i.prompt for i in wanted], 128)
        return f"{sum(s[-1:] == [EOS] for s in said)}/{len(said)}"

    def prose(self) -> dict[str, Any]:
        """Free text at temperature 0.7: how many of 32 pieces of 200 tokens (of fewer at a smaller scale) loop, and how
        many turn into a planted sentence."""
        each = max(1, round(4 * self.scale))
        prompts = [[BOS, *self.data.encode(p)] for p in items.PROSE for _ in range(each)]
        said = self.write(prompts, 200 if self.scale > 0.1 else 12, temperature=0.7)
        texts = [self._text(s) for s in said]
        shown = [p + t for p, t in zip(items.PROSE, texts[::each], strict=True)]
        return items.faults(said, texts) | {"texts": shown}

    def glance(self) -> dict[str, Any]:
        """The prose alone, for a run that goes on: how much of it loops, and one piece."""
        try:
            found = self.prose()
        except Exception as e:  # no reason to end a run
            return {"prose": f"failed: {e!r:.200}"}
        return {"loops": found["loops"], "of": found["of"], "text": found["texts"][0][:300]}

    def samples(self) -> list[list[str]]:
        wanted = items.conversations(self.data, self._count(24))
        said = self.write([i.prompt for i in wanted], 64)
        return [[self._text(i.prompt)[-160:], self._text(s)] for i, s in zip(wanted, said, strict=True)]

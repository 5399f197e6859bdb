"""The lightning indexer: scores of compressed entries, and a top-k that does not depend on chance."""

from __future__ import annotations

import torch
from torch import Tensor

from dsv4.ops.reference.blocks import INDEX_BLOCK, padded_tiles, tile_chunks
from dsv4.ops.reference.norm import rope
from dsv4.ops.tables import EntryTable, RowSource, TokenTable


def index_select(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    keys: RowSource,
    tokens: TokenTable,
    entries: EntryTable,
    topk: int,
) -> Tensor:
    """For each token the `topk` visible entries with the largest sum_h weights_h * relu(q_h . key), as int32
    [T, min(topk, most visible)]: ascending, -1 after the last. Where no more than topk are visible, these are
    all. q [T, H, I] comes as projected; it is turned by cos, sin float32 [T, r/2] and brought into the space that
    keys are stored in."""
    width = min(topk, entries.most)
    if entries.most <= topk:
        every = torch.arange(width, device=q.device, dtype=torch.int32).expand(q.shape[0], width)
        return torch.where(every < entries.visible[:, None], every, -1)
    return _best(q, cos, sin, weights, keys, tokens, entries, width)[0]


def index_candidates(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    keys: RowSource,
    tokens: TokenTable,
    entries: EntryTable,
    topk: int,
    into: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """`index_select` with scores float32 [T, k] beside the entries, -inf after the last, however few are visible. `into`: the (selected,
    scores) to write."""
    found = _best(q, cos, sin, weights, keys, tokens, entries, min(topk, entries.most))
    if into is None:
        return found
    for given, result in zip(into, found, strict=True):
        given.copy_(result)
    return into


def merge_candidates(selected: Tensor, scores: Tensor, topk: int) -> Tensor:
    """The `topk` best int32 [T, topk] of P lists [P, T, k] as `index_candidates` gives them, where entry i of list p is entry
    i * P + p of the whole: ascending, -1 after the last; of equal scores those with the lowest number."""
    parts, tokens, k = selected.shape
    part = torch.arange(parts, device=selected.device)[:, None, None]
    number = torch.where(selected >= 0, selected * parts + part, torch.iinfo(torch.int32).max)
    number, order = number.transpose(0, 1).reshape(tokens, parts * k).sort(dim=-1)
    ordered = scores.transpose(0, 1).reshape(tokens, parts * k).gather(1, order)
    place = lowest_index_topk(ordered, (selected >= 0).sum((0, 2)), topk)
    found = number.gather(1, place.clamp(min=0).long()) if parts * k else torch.zeros_like(place)
    return torch.where(place >= 0, found, -1).int()


def entries_of_part(selected: Tensor, part: int, parts: int) -> tuple[Tensor, Tensor]:
    """Of entries int32 [T, k] (-1: none) those of a part, by their number within it, in their order and -1 after the last; and how
    many int32 [T] there are."""
    mine = (selected >= 0) & (selected % parts == part)
    k = selected.shape[1]
    place = torch.where(mine, mine.cumsum(-1) - 1, k)  # column k takes the others, and is cut off
    out = selected.new_full((len(selected), k + 1), -1)
    out = out.scatter_(1, place, selected // parts)[:, :k].contiguous()
    return out, mine.sum(-1, dtype=torch.int32)


def _best(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: Tensor,
    keys: RowSource,
    tokens: TokenTable,
    entries: EntryTable,
    width: int,
) -> tuple[Tensor, Tensor]:
    """The `width` best entries int32 [T, width] and their scores."""
    q = keys.codec.transform(rope(q, cos, sin).float())
    tiles = tokens.tiles()
    group = tiles.tokens.shape[1]
    q_tiles, w_tiles = padded_tiles(q, tiles), padded_tiles(weights, tiles)
    visible = torch.nn.functional.pad(entries.visible, (0, 1))[tiles.tokens]  # an empty place sees none
    out = torch.full((tiles.tokens.numel(), width), -1, dtype=torch.int32, device=q.device)
    values = torch.full(out.shape, -torch.inf, device=q.device)
    columns = entries.most + -entries.most % INDEX_BLOCK
    for lo, hi in tile_chunks(len(tiles.row), max(group * columns, INDEX_BLOCK * q.shape[-1])):
        seen, row = visible[lo:hi], tiles.row[lo:hi]
        most = int(seen.max())
        if not most:
            continue
        scores = _scores(q_tiles[lo:hi], w_tiles[lo:hi], keys, entries, tokens.slabs, row, most).flatten(0, 1)
        place = slice(lo * group, hi * group)
        out[place] = chosen = lowest_index_topk(scores, seen.flatten(), width)
        found = scores.gather(1, chosen.clamp(min=0).long()).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        values[place] = found.masked_fill(chosen < 0, -torch.inf)
    return out[tiles.slot], values[tiles.slot]


def lowest_index_topk(scores: Tensor, visible: Tensor, k: int) -> Tensor:
    """Indices of the k largest of scores[t, : visible[t]], ascending, -1 after the last; of equal scores the
    ones with the lowest index. NaN counts as -inf, so that damage in one row stays in that row. float32 [T,
    K], int [T] -> int32 [T, k]."""
    tokens, columns = scores.shape
    column = torch.arange(columns, device=scores.device, dtype=torch.int32)
    seen = column < visible[:, None]
    scores = scores.masked_fill(~seen | scores.isnan(), -torch.inf)
    take = min(k, columns)
    least = torch.topk(scores, take, dim=-1).values[:, -1:] if take else scores.new_zeros((tokens, 1))
    above, equal = scores > least, (scores == least) & seen
    room = take - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    place = torch.where(
        chosen, chosen.cumsum(-1) - 1, k
    )  # column k takes what was not chosen, and is cut off
    out = torch.full((tokens, k + 1), -1, dtype=torch.int32, device=scores.device)
    return out.scatter_(1, place, column.expand(tokens, columns))[:, :k].contiguous()


def _scores(
    q: Tensor,
    weights: Tensor,
    keys: RowSource,
    entries: EntryTable,
    slabs: Tensor,
    row: Tensor,
    most: int,
) -> Tensor:
    """float32 [n, g, K] for tiles q [n, g, H, I] and weights [n, g, H]; K is `most` rounded up to an index
    block. What lies past a row's entries may be anything."""
    n, group, heads, _ = q.shape
    left, columns = q.flatten(1, 2), most + -most % INDEX_BLOCK
    out = q.new_empty((n, group, columns))
    lowest = int(row[0])
    for at in range(0, columns, INDEX_BLOCK):
        column = torch.arange(at, at + INDEX_BLOCK, device=row.device)
        block = keys.read(entries.locate(slabs[lowest : int(row[-1]) + 1, None], column))[row - lowest]
        dots = torch.bmm(left, block.transpose(1, 2)).clamp_(min=0).view(n, group, heads, INDEX_BLOCK)
        total = weights[:, :, 0, None] * dots[:, :, 0]
        for head in range(1, heads):
            total += weights[:, :, head, None] * dots[:, :, head]
        out[..., at : at + INDEX_BLOCK] = total
    return out

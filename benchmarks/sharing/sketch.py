"""Estimated against true missing attention mass: the server's sketch, and what was tried beside it, in equal bytes.

Offline, with transformers: a first question chooses what stays of a picture (a tenth of every layer, by attention of
the text behind the picture); it and other questions then run with the rest hidden from their rows.  The keys that are
hidden are known, so the share of attention they would have got is known too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.common.results import save
from benchmarks.sharing.recorder import MODEL, Recorder, Seen
from benchmarks.sharing.results import dump
from vlcache_sgl.compression.sharing.sketch import KeySketch, missing_share, sketch_limit
from vlcache_sgl.evaluation.tasks.receipts import Picture, make_picture

SIDE, QUESTIONS, PICTURES = 24, 4, 10
FIRST_SEED, CODEBOOK_SEED = 63_000, 64_000
KEPT = 0.1
"""Share of the picture that the first question leaves in every layer."""
ROUNDS = 6
"""Of k-means."""

LogMass = Callable[[Tensor], Tensor]
"""From queries `[R, H, D]`, scaled, to the log mass `[R, H]` of the evicted keys."""


class Sketched(NamedTuple):
    """A method applied to the evicted keys of one layer."""

    log_mass: LogMass
    nbytes: int


# -- the methods ------------------------------------------------------------------------------------------------------


def low_rank(keys: Tensor, tokens: int, dtype: torch.dtype) -> Sketched:
    """The server's sketch of keys stored as `dtype`."""
    sketch = KeySketch.of(keys.to(dtype), tokens)
    assert sketch is not None
    return Sketched(lambda queries: sketch.log_mass(queries, 1.0), sketch.nbytes)


def clusters(keys: Tensor, tokens: int, dtype: torch.dtype, correction: str) -> Sketched:
    """Counts, means and isotropic spreads of as many clusters as fit the sketch's bytes.

    Args:
        correction: for the spread inside a cluster: `none`; `Gaussian`, half the logit's variance; `freezing`, the
            same until the variance is so large that the largest of n draws decides, then that draw.
    """
    heads, _, dim = keys.shape
    size = torch.empty(0, dtype=dtype).element_size()
    count = sketch_limit(tokens, heads, dim, size) // (heads * (dim + 2) * size)
    members, means, variance = k_means(keys, count)

    def log_mass(queries: Tensor) -> Tensor:
        grouped = _by_key_head(queries, heads)
        logits = grouped @ means.transpose(1, 2)  # [K, R x H/K, C]
        spread = grouped.norm(dim=-1, keepdim=True) * variance.mean(-1).sqrt()[:, None]
        number = members[:, None].log()
        inside = number
        if correction != "none":
            inside = number + spread.square() / 2
        if correction == "freezing":
            limit = (2 * number.clamp(min=0)).sqrt()
            inside = torch.where(spread <= limit, inside, limit * spread)
        return _by_row((logits + inside).logsumexp(-1), queries.shape[0])

    return Sketched(log_mass, heads * count * (dim + 2) * size)


def product_codes(keys: Tensor, books: Tensor) -> Sketched:
    """A byte for each quarter of a key, from `books` `[K, 4, 256, D / 4]` of other pictures."""
    heads, evicted, dim = keys.shape
    parts, _, width = books.shape[1:]
    split = keys.view(heads, evicted, parts, width).transpose(1, 2)
    codes = torch.cdist(split, books).argmin(-1)  # [K, parts, e]
    near = torch.stack([books[k, part][codes[k, part]] for k in range(heads) for part in range(parts)])
    near = near.view(heads, parts, evicted, width).transpose(1, 2).reshape(heads, evicted, dim)
    return Sketched(exact(near).log_mass, codes.numel())


def exact(keys: Tensor) -> Sketched:
    """No sketch: the truth."""

    def log_mass(queries: Tensor) -> Tensor:
        grouped = _by_key_head(queries, keys.shape[0])
        return _by_row((grouped @ keys.transpose(1, 2)).logsumexp(-1), queries.shape[0])

    return Sketched(log_mass, keys.numel() * keys.element_size())


def _by_key_head(queries: Tensor, heads: int) -> Tensor:
    """`[R, H, D]` to `[K, R x H/K, D]`."""
    rows, num_heads, dim = queries.shape
    return queries.view(rows, heads, num_heads // heads, dim).transpose(0, 1).reshape(heads, -1, dim)


def _by_row(values: Tensor, rows: int) -> Tensor:
    """`[K, R x H/K]` to `[R, H]`."""
    return values.view(values.shape[0], rows, -1).transpose(0, 1).reshape(rows, -1)


def k_means(points: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Members `[K, C]`, means and variances `[K, C, D]` of `count` clusters of `points` `[K, n, D]`."""
    start = torch.linspace(0, points.shape[1] - 1, count).long()
    means = points[:, start]
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(torch.cdist(points, means).argmin(-1), count).float()
        members = member.sum(1)
        new = member.transpose(1, 2) @ points / members.clamp(min=1)[..., None]
        means = torch.where(members[..., None] > 0, new, means)
    squares = member.transpose(1, 2) @ points.square() / members.clamp(min=1)[..., None]
    return members.clamp(min=1e-9), means, (squares - means.square()).clamp(min=0)


METHODS: dict[str, Callable[[Tensor, int, Tensor], Sketched]] = {
    "low rank, float32": lambda keys, tokens, _: low_rank(keys, tokens, torch.float32),
    "low rank, bfloat16": lambda keys, tokens, _: low_rank(keys, tokens, torch.bfloat16),
    "clusters, means": lambda keys, tokens, _: clusters(keys, tokens, torch.bfloat16, "none"),
    "clusters, Gaussian": lambda keys, tokens, _: clusters(keys, tokens, torch.bfloat16, "Gaussian"),
    "clusters, freezing": lambda keys, tokens, _: clusters(keys, tokens, torch.bfloat16, "freezing"),
    "product codes": lambda keys, _, books: product_codes(keys, books),
}
"""By name; arguments are the evicted keys `[K, e, D]` float32, the picture's tokens, and the layer's codebooks."""
SERVED = ("true", "low rank, float32", "low rank, bfloat16")
LAST_ROWS = (1, 4, 8, 0)
"""How many of a question's last rows a reading might look at; 0 = all of them."""


# -- the model's part --------------------------------------------------------------------------------------------------


def kept_by_first(model: Recorder) -> Tensor:
    """`[layers, prefix]` bool: the tenth of every layer of the picture that the present question looked at most."""
    keep = torch.ones(model.layers, model.span.stop, dtype=torch.bool)
    for layer, seen in enumerate(model.seen):
        scores = seen.weights[0, :, :, model.span].sum(1).mean(0)
        keep[layer, model.span] = False
        keep[layer, model.span.start + scores.topk(round(KEPT * len(scores))).indices] = True
    return keep


def code_books(model: Recorder, pictures: Sequence[Picture]) -> list[Tensor]:
    """Per layer `[K, 4, 256, D / 4]`."""
    keys: list[list[Tensor]] = [[] for _ in range(model.layers)]
    for picture in pictures:
        model.look_at(picture)
        for layer, seen in enumerate(model.seen):
            keys[layer].append(seen.keys[0, model.span])
    books = []
    for of_layer in keys:
        points = torch.cat(of_layer)  # [n, K, D]
        count, heads, dim = points.shape
        split = points.view(count, heads, 4, dim // 4).permute(1, 2, 0, 3).flatten(0, 1)
        books.append(k_means(split, 256)[1].view(heads, 4, 256, dim // 4))
    return books


def shares_of(seen: Seen, sketches: Mapping[str, Sketched]) -> dict[str, Tensor]:
    """`[rows]`: missing share of a question's rows in one layer, mean over heads, by method and in truth."""
    return {
        name: missing_share(seen.lse[0].transpose(0, 1), sketch.log_mass(seen.queries[0])).mean(1)
        for name, sketch in sketches.items()
    }


# -- the result -------------------------------------------------------------------------------------------------------


def measure(pictures: int, console: Console) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One record per question, and bytes per layer of each method."""
    model = Recorder()
    books = code_books(model, [make_picture(CODEBOOK_SEED + i, SIDE, SIDE, 1) for i in range(4)])
    records: list[dict[str, Any]] = []
    sizes: dict[str, list[int]] = {name: [] for name in METHODS}
    for number in track(range(pictures), "sketch", console=console, transient=True):
        picture = make_picture(FIRST_SEED + number, SIDE, SIDE, num_questions=QUESTIONS)
        model.look_at(picture)
        keys = [seen.keys[0] for seen in model.seen]
        model.ask([model.tokens(picture.questions[0].text)])
        keep = kept_by_first(model)
        layers = []
        for layer in range(model.layers):
            evicted = keys[layer][~keep[layer]].transpose(0, 1).contiguous()
            made = {name: method(evicted, SIDE * SIDE, books[layer]) for name, method in METHODS.items()}
            for name, sketch in made.items():
                sizes[name].append(sketch.nbytes)
            layers.append({"true": exact(evicted), **made})
        for index, question in enumerate(picture.questions):
            model.ask([model.tokens(question.text)], keep[None])
            shares = [shares_of(seen, sketches) for seen, sketches in zip(model.seen, layers, strict=True)]
            by_method = {name: [round(float(s[name].mean()), 5) for s in shares] for name in ("true", *METHODS)}
            by_rows = {
                str(last): {
                    name: round(float(torch.stack([s[name][-last:].mean() for s in shares]).mean()), 5)
                    for name in SERVED
                }
                for last in LAST_ROWS
            }
            record = {"seed": FIRST_SEED + number, "question": index + 1, "rows": len(shares[0]["true"])}
            records.append({**record, "shares": by_method, "last_rows": by_rows})
    return records, {name: sum(values) / len(values) for name, values in sizes.items()}


def summarise(records: Sequence[Mapping[str, Any]], sizes: Mapping[str, float]) -> list[dict[str, Any]]:
    """Per method: errors by layer, and how well its mean over layers tells the copy's own question from others."""
    truth = torch.tensor([record["shares"]["true"] for record in records])
    own = torch.tensor([record["question"] == 1 for record in records])
    rows = []
    for name in ("true", *METHODS):
        found = torch.tensor([record["shares"][name] for record in records])
        reading = found.mean(1)
        above = (reading[~own][:, None] > reading[own]).float() + (reading[~own][:, None] == reading[own]).float() / 2
        rows.append(
            {
                "method": name,
                "bytes_per_layer": round(sizes[name]) if name in sizes else None,
                "error_by_layer": [round(float(x), 4) for x in (found - truth).abs().mean(0)],
                "error": round(float((found - truth).abs().mean()), 4),
                "bias": round(float((found - truth).mean()), 4),
                "auc": round(float(above.mean()), 4),
            }
        )
    return rows


def summarise_rows(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the copy's own question and others read from their last rows, mean over layers."""
    rows = []
    for last in LAST_ROWS:
        for name in SERVED:
            readings = [(record["question"] == 1, record["last_rows"][str(last)][name]) for record in records]
            own, other = ([value for mine, value in readings if mine is which] for which in (True, False))
            rows.append(
                {"rows": last, "method": name, "own_mean": round(sum(own) / len(own), 4), "own_most": max(own)}
                | {"other_mean": round(sum(other) / len(other), 4), "other_least": min(other)}
            )
    return rows


def run(path: Path, host: Mapping[str, Any], quick: bool, console: Console) -> None:
    """Measure and write `path`."""
    records, sizes = measure(1 if quick else PICTURES, console)
    tokens, summary = SIDE * SIDE, summarise(records, sizes)
    result = {
        "task": "sharing",
        "experiment": "sketch",
        "command": "python benchmarks/run.py sharing sketch",
        "host": host,
        "model": MODEL,
        "kept": KEPT,
        "tokens": tokens,
        "summary": summary,
        "rows": summarise_rows(records),
        "sizes": sizes,
        "records": records,
    }
    if quick:
        for row in summary:
            console.print(row)
        return
    save(path, result, dump(result))
    console.print(f"written: {path.name}")

"""From measurements to targets and a short table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.gpu.timing import Measurement


@dataclass(frozen=True)
class Target:
    """One figure that was aimed at."""

    name: str
    aim: str
    found: str
    met: bool | None
    """None where it was not measured."""


class Measured:
    """Look-up by name and parameters."""

    def __init__(self, measurements: Iterable[Measurement]) -> None:
        self.all = list(measurements)

    def find(self, name: str, **parameters: object) -> Measurement | None:
        for m in self.all:
            if m.name == name and m.samples and parameters.items() <= m.parameters.items():
                return m
        return None

    def ms(self, name: str, **parameters: object) -> float | None:
        found = self.find(name, **parameters)
        return None if found is None else found.ms

    def values(self, key: str, *names: str) -> list[Any]:
        """What `parameters[key]` took, in order of appearance."""
        seen = [m.parameters[key] for m in self.all if key in m.parameters and (not names or m.name in names)]
        return list(dict.fromkeys(seen))

    @property
    def decode_name(self) -> str:
        """The provider that is used in production where there is one."""
        names = [m.name for m in self.all if m.name.startswith("decode attention") and m.samples]
        return next((name for name in names if "served" in name), "decode attention, triton")


def rows_a(measured: Measured) -> list[list[str]]:
    names = [m.name for m in measured.all if m.case == "a" and m.name != "prefill attention"]
    table = []
    for model in measured.values("model", "prefill attention"):
        for keys in measured.values("keys", "prefill attention"):
            where = {"model": model, "keys": keys}
            attention = measured.ms("prefill attention", **where)
            if attention is None:
                table.append(["a", f"{model} {keys}", "skipped", "", ""])
                continue
            for name in dict.fromkeys(names):
                found = measured.find(name, **where)
                if found is not None and found.ms is not None:
                    share = f"{100 * found.ms / attention:.2f} % of {attention:.3f} ms"
                    table.append(["a", f"{model} {keys} keys: {name}", f"{found.ms:.4f} ms", _rate(found), share])
    return table


def rows_b(measured: Measured, copy: float | None) -> list[list[str]]:
    table = []
    for m in measured.all:
        if m.case != "b" or not m.name.startswith("decode"):
            continue
        p = m.parameters
        what = f"{p['model']} batch {p['batch']} budget {p['budget']}: {m.name.removeprefix('decode attention, ')}"
        if m.ms is None:
            table.append(["b", what, m.skipped or "", "", ""])
            continue
        full = measured.ms(m.name, **(p | {"budget": 1.0}))
        speed = "" if full is None else f"{full / m.ms:.2f}x of budget 1.0"
        of_copy = "" if copy is None or m.gb_per_s is None else f" = {100 * m.gb_per_s / copy:.0f} % of copy"
        table.append(["b", what, f"{m.ms:.4f} ms/layer", _rate(m) + of_copy, speed])
    return table


def decode_step(measured: Measured, layers: int, **where: object) -> float | None:
    """Attention and matrix products of all layers, from one layer's times: the least that a decode step takes."""
    linear = measured.ms("linear layers", **{k: v for k, v in where.items() if k != "budget"})
    attention = measured.ms(measured.decode_name, **where)
    return None if linear is None or attention is None else layers * (linear + attention)


def rows_c(measured: Measured, layers: dict[str, int]) -> list[list[str]]:
    table = []
    for m in measured.all:
        if m.case != "c" or m.ms is None:
            continue
        p = m.parameters
        where = {key: p[key] for key in ("model", "batch", "budget")}
        step = decode_step(measured, layers[p["model"]], **where)
        share = "" if step is None else f"{100 * m.ms / step:.2f} % of a step of {step:.2f} ms"
        what = f"{p['model']} batch {p['batch']} budget {p['budget']}: {m.name}"
        table.append(["c", what, f"{m.ms:.4f} ms", _rate(m), share])
    return table


def rows_d(measured: Measured) -> list[list[str]]:
    return [
        ["d", f"{m.parameters['tokens']} tokens: {m.name}", f"{m.ms:.4f} ms", "", ""]
        for m in measured.all
        if m.case == "d" and m.ms is not None
    ]


def targets(measured: Measured, copy: float | None, layers: dict[str, int]) -> list[Target]:
    """Worst case of each."""
    found: list[Target] = []

    def add(name: str, aim: str, values: list[float], text: str, met: bool | None) -> None:
        found.append(Target(name, aim, text if values else "not measured", met if values else None))

    for keys in measured.values("keys", "prefill attention"):
        shares = [
            100 * stats / attention
            for model in measured.values("model", "prefill attention")
            if (attention := measured.ms("prefill attention", model=model, keys=keys))
            and (stats := measured.ms("column sums and density", model=model, keys=keys))
        ]
        worst = max(shares, default=0.0)
        add(f"(a) statistics at {keys} keys", "at most 2 % of attention", shares, f"{worst:.2f} %", worst <= 2)
    decode = measured.decode_name
    points = [m for m in measured.all if m.name == decode and m.samples]
    tenth = [m for m in points if m.parameters["budget"] == 0.1]
    rates = [100 * m.gb_per_s / copy for m in tenth if copy and m.gb_per_s]
    slowest = min(rates, default=0.0)
    add(f"(b) bandwidth at budget 0.1, {decode}", "at least 80 % of copy", rates, f"{slowest:.0f} %", slowest >= 80)
    ratios = [
        full / m.ms
        for m in tenth
        if m.parameters["batch"] >= 16 and m.ms and (full := measured.ms(decode, **(m.parameters | {"budget": 1.0})))
    ]
    least = min(ratios, default=0.0)
    add("(b) budget 0.1 against 1.0, batch 16 and up", "at least 8x", ratios, f"{least:.2f}x", least >= 8)
    shares = [
        100 * m.ms / step
        for m in measured.all
        if m.name == "append" and m.ms and m.parameters["budget"] == 0.1
        for step in [
            decode_step(
                measured,
                layers[m.parameters["model"]],
                **{key: m.parameters[key] for key in ("model", "batch", "budget")},
            )
        ]
        if step
    ]
    worst = max(shares, default=0.0)
    add("(c) index of a decode step at budget 0.1", "below 3 % of the step", shares, f"{worst:.2f} %", worst < 3)
    return found


def _rate(m: Measurement) -> str:
    return "" if m.gb_per_s is None else f"{m.gb_per_s:.0f} GB/s"


def table(rows: list[list[str]]) -> str:
    """Aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

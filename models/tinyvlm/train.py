"""Train a bundled checkpoint on a CPU: `python -m models.tinyvlm.train grounded` from the root of the repository.

An interrupted run goes on where it stopped when the same command is given again.  The checkpoint, and its loss curve in
results/, are written at the end; --output puts both elsewhere.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from . import align, checkpoint
from .batches import ANSWER_TOKENS, Vocabulary, draw_bank, draw_batch
from .losses import CacheSimulator
from .network import Observed, TrainableVLM, can_observe
from .schedule import SCHEDULES, Schedule, Stage

BANK_VARIANTS = 96
"""Drawings of each glyph that training chooses from; held-out images are drawn afresh."""
STEP_VARIANTS = 2
"""Of these, per step."""
REPORT_EVERY = 25
"""Steps; the state of the run is saved as often."""
FINAL_RATE = 0.03
"""Where the cosine of an annealed stage ends, relative to its start."""


@dataclass
class Progress:
    """Everything a run has to remember besides weights and optimizer."""

    stage: int = 0
    step: int = 0
    """Steps done in this stage."""
    on_target: int = 0
    """Consecutive reports at the stage's target."""
    seconds: float = 0.0
    """Spent in all sittings."""
    densities: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    """One point per report."""


class Run:
    """One training run; its state lives in `directory` until it is done."""

    def __init__(self, name: str, schedule: Schedule, directory: Path, seed: int, compiled: bool) -> None:
        self.schedule = schedule
        self.state = directory / f"{name}.state.pt"
        torch.manual_seed(seed)
        self.rng = np.random.default_rng(seed + 5)
        self.bank = draw_bank(BANK_VARIANTS, seed + 1)
        if schedule.start:
            model, self.tokenizer = checkpoint.load(checkpoint.folder(schedule.start))
        else:
            self.tokenizer = checkpoint.new_tokenizer()
            model = checkpoint.new_model(self.tokenizer)
        self.vocabulary = Vocabulary(self.tokenizer)
        self.network = TrainableVLM(model, self.vocabulary, compiled)
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.02}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.98),
            eps=1e-9,
            fused=True,
        )
        weights = torch.tensor([schedule.first_character] + [1.0] * (ANSWER_TOKENS - 1))
        self.token_weights = weights / weights.sum()
        self.progress = Progress()
        self.simulator = CacheSimulator(self.network.layers)
        if self.state.exists():
            self._load()
        elif not schedule.start:
            align.align(self.network, self.tokenizer, self.bank)

    def train(self) -> None:
        """Run the stages that are left."""
        while self.progress.stage < len(self.schedule.stages):
            stage = self.schedule.stages[self.progress.stage]
            recent: list[dict[str, float]] = []
            began, spent = time.monotonic(), self.progress.seconds
            while self.progress.step < stage.steps:
                recent.append(self._step(stage))
                self.progress.step += 1
                if len(recent) == REPORT_EVERY:
                    took = time.monotonic() - began
                    self.progress.seconds = spent + took
                    if self._report(stage, recent, took / REPORT_EVERY):
                        break
                    recent, began, spent = [], time.monotonic(), self.progress.seconds
                    self._save()
            self.progress.stage += 1
            self.progress.step = self.progress.on_target = 0
            self._save()

    def _step(self, stage: Stage) -> dict[str, float]:
        shape = stage.shapes[int(self.rng.integers(len(stage.shapes)))]
        template = int(self.rng.choice(stage.templates))
        batch = draw_batch(
            self.rng,
            self.vocabulary,
            images=stage.batch,
            shape=shape,
            questions=stage.questions,
            template=template,
            fill=self.schedule.fill,
        )
        grounded = (stage.grounding or stage.ranking or stage.density or stage.compressed) and can_observe(template)
        observe = stage.observed if grounded else 0
        cache = self.simulator.draw(stage.batch, observe) if self.rng.random() < stage.compressed and observe else None
        cells = self.network.embed_images(batch, self.bank, STEP_VARIANTS)
        logits, observed = self.network.forward(batch, cells, observe, cache)
        losses = F.cross_entropy(logits.flatten(0, 2), batch.targets.flatten(), reduction="none")
        answer = (losses.view(-1, ANSWER_TOKENS).mean(0) * self.token_weights).sum()
        extra = (
            stage.grounding * observed.grounding + stage.ranking * observed.ranking + stage.density * observed.density
        )
        self._update(stage, answer + extra)
        if observe:
            self.simulator.observe(observed.layer_densities)
        right = (logits.argmax(-1) == batch.targets).all(-1).float()
        return {
            "loss": float(answer.detach()),
            "exact_match": float(right[:, observe if cache else 0 :].mean()),
            "exact_match_compressed": float(right[:, :observe].mean()) if cache else math.nan,
            **_values(observed),
        }

    def _update(self, stage: Stage, loss: torch.Tensor) -> None:
        rate = self.schedule.learning_rate * stage.rate * min(1, (self.progress.step + 1) / stage.warm_up)
        if stage.anneal:
            cosine = 0.5 + 0.5 * math.cos(math.pi * self.progress.step / stage.steps)
            rate *= FINAL_RATE + (1 - FINAL_RATE) * cosine
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.model.parameters(), 1.0)
        self.optimizer.step()

    def _report(self, stage: Stage, recent: list[dict[str, float]], pace: float) -> bool:
        """Print a line and add a point to the curve; True when the stage is done before its last step."""
        p = self.progress
        means = {key: _mean([step[key] for step in recent]) for key in recent[0]}
        p.curve.append({"stage": p.stage, "step": p.step, **{k: round(v, 4) for k, v in means.items() if v == v}})
        shown = "  ".join(f"{key} {value:.3f}" for key, value in means.items() if value == value)
        # Later stages cost more per step but may end early, so this is a guess until the last one.
        left = stage.steps - p.step + sum(s.steps for s in self.schedule.stages[p.stage + 1 :])
        print(
            f"stage {p.stage + 1}/{len(self.schedule.stages)}  step {p.step}/{stage.steps}  {shown}  "
            f"{1000 * pace:.0f} ms/step  {p.seconds / 60:.1f} min  ETA {left * pace / 60:.0f} min",
            flush=True,
        )
        p.on_target = p.on_target + 1 if means["exact_match"] >= stage.target else 0
        return p.on_target >= 2 and not stage.anneal

    def _save(self) -> None:
        self.progress.densities = self.simulator.densities
        state = {
            "schedule": asdict(self.schedule),
            "progress": asdict(self.progress),
            "model": self.network.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "torch_rng": torch.get_rng_state(),
            "numpy_rng": json.dumps(self.rng.bit_generator.state),
        }
        self.state.parent.mkdir(parents=True, exist_ok=True)
        partial = self.state.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.state)  # in one step: an interrupted save leaves the older state

    def _load(self) -> None:
        state = torch.load(self.state, weights_only=True)
        if state["schedule"] != asdict(self.schedule):
            raise SystemExit(f"{self.state} was begun with another schedule: delete it to start afresh")
        self.progress = Progress(**state["progress"])
        self.simulator.densities = self.progress.densities
        self.network.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["torch_rng"])
        self.rng.bit_generator.state = json.loads(state["numpy_rng"])
        print(f"resumed: stage {self.progress.stage + 1}, step {self.progress.step}", flush=True)


def _values(observed: Observed) -> dict[str, float]:
    if not observed.layer_densities:
        return {}
    losses = {"grounding": observed.grounding, "ranking": observed.ranking}
    values = {key: float(torch.as_tensor(value).detach()) for key, value in losses.items()}
    layers = {f"density{layer}": value for layer, value in enumerate(observed.layer_densities)}
    return values | layers


def _mean(values: list[float]) -> float:
    known = [v for v in values if v == v]
    return sum(known) / len(known) if known else math.nan


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SCHEDULES))
    parser.add_argument("--output", type=Path, help="folder of the checkpoint (default: the bundled one)")
    parser.add_argument("--state", type=Path, default=Path("out/tinyvlm"), help="where an interrupted run is kept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="for machines without a C++ compiler; slower")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    schedule = SCHEDULES[options.name]
    run = Run(options.name, schedule, options.state, options.seed, not options.no_compile)
    run.train()
    output = options.output or checkpoint.folder(options.name)
    checkpoint.save(run.network.model, run.tokenizer, output)
    results = output if options.output else checkpoint.HERE / "results"
    record: dict[str, Any] = {
        "command": f"python -m models.tinyvlm.train {options.name} --seed {options.seed}",
        "torch": torch.__version__,
        "threads": options.threads,
        "minutes": round(run.progress.seconds / 60, 1),
        "schedule": asdict(schedule),
        "curve": run.progress.curve,
    }
    (results / f"training-{options.name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {output}")


if __name__ == "__main__":
    main()

"""Verdicts as they come, one line per case and run, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from .cases import CaseId
from .conditions import FULL, Condition
from .verdicts import Verdict

Found = dict[str, Verdict | None]
"""By the name of the condition."""


class RecordsError(RuntimeError):
    """The records cannot be continued; the message is one line for the user."""


def digest(folder: Path) -> str:
    """SHA-256 of a checkpoint's weights."""
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Records:
    """The verdicts in one file.  Those of a policy that decides otherwise by now do not count.

    Args:
        path: JSON lines; the first says which weights answered.
        weights: `digest` of the checkpoint.
        prints: of each policy's text, a text that changes when it would decide otherwise.
    """

    def __init__(self, path: Path, weights: str, prints: Mapping[str, str]) -> None:
        self._path = path
        self._prints = dict(prints)
        self.found: dict[CaseId, Found] = {}
        lines = path.read_text().splitlines() if path.exists() else []
        if not lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"weights": weights}) + "\n")
            return
        if json.loads(lines[0])["weights"] != weights:
            raise RecordsError(f"{path} holds answers of another model; choose another --output")
        whole = [lines[0]]
        for line in lines[1:]:
            try:
                self._read(json.loads(line))
            except json.JSONDecodeError:
                break  # cut off when a run was killed; what follows it is asked again
            whole.append(line)
        path.write_text("\n".join(whole) + "\n")

    def _read(self, record: Mapping[str, object]) -> None:
        case = CaseId(*record["case"])  # type: ignore[misc]
        known: Found = self.found.setdefault(case, {})
        for policy, (fingerprint, verdicts) in record["verdicts"].items():  # type: ignore[attr-defined]
            if policy == FULL or self._prints.get(policy) == fingerprint:
                known |= {name: None if given is None else Verdict(*given) for name, given in verdicts.items()}

    def missing(self, case: CaseId, conditions: Sequence[Condition]) -> list[Condition]:
        """Those under which the case was not judged yet."""
        known = self.found.get(case, {})
        return [condition for condition in conditions if condition.name not in known]

    def add(self, case: CaseId, conditions: Iterable[Condition], found: Found) -> None:
        """Write verdicts down."""
        self.found.setdefault(case, {}).update(found)
        verdicts: dict[str, tuple[str, Found]] = {}
        for condition in conditions:
            policy = condition.policy
            _, mine = verdicts.setdefault(policy, (self._prints.get(policy, ""), {}))
            mine[condition.name] = found[condition.name]
        with self._path.open("a") as file:
            file.write(json.dumps({"case": [case.task, case.tokens, case.seed], "verdicts": verdicts}) + "\n")

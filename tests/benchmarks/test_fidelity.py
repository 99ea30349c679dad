"""What is counted of the answers: the committed records, counted once more by the code as it is."""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any

import pytest

from benchmarks.fidelity import main as fidelity
from benchmarks.fidelity import policies, recall
from vlcache_sgl.evaluation.report import summarise
from vlcache_sgl.policy import resolve


def again(found: Any) -> Any:
    """As it is after a file."""
    return json.loads(json.dumps(found))


def evaluated() -> list[str]:
    return [name for name in fidelity.committed() if name not in (fidelity.RECALL, fidelity.INSPECT)]


@pytest.mark.parametrize("name", evaluated())
def test_summaries_are_those_of_their_records(name: str) -> None:
    result = fidelity.committed()[name]
    assert result["summary"] == again(summarise(result["records"]))


def test_recall_is_that_of_its_records() -> None:
    result = fidelity.committed()[fidelity.RECALL]
    assert result["summary"] == again(recall.summarise(result["records"]))


def test_measured_policies_are_those_of_their_samples() -> None:
    """Of the policies in the file: one that came later needs no new run."""
    result = json.loads(policies.result_path().read_text())
    listed = [policies.Contender(row["policy"], row["made_of"], row["query_aware"], {}) for row in result["summary"]]
    assert result["summary"] == again(policies.summarise(result["samples"], listed))


def test_intervals_are_those_of_wilson() -> None:
    """Against the zeros of (share - p)^2 = z^2 p (1 - p) / n, which define the interval."""
    for right, count in ((0, 10), (7, 20), (20, 20)):
        for bound in policies.wilson(right, count):
            share = right / count
            assert (share - bound) ** 2 == pytest.approx(policies.Z**2 * bound * (1 - bound) / count, abs=2e-3)
    assert policies.wilson(0, 10)[0] == 0.0
    assert policies.wilson(20, 20)[1] == 1.0


def policies_of(call: tuple[str, ...]) -> list[str]:
    """The values of `--policy`."""
    rest = call[call.index("--policy") + 1 :]
    return list(takewhile(lambda value: not value.startswith("--"), rest))


def test_every_policy_of_an_experiment_is_there() -> None:
    """An experiment is asked again years later: a parameter that has moved would end it halfway."""
    for name, experiment in fidelity.experiments().items():
        for call in experiment.calls:
            for policy in policies_of(call):
                assert resolve(policy).spec == policy, name


def test_the_table_of_sensitivity_has_no_empty_cell() -> None:
    """Rows of the committed result are found under the names of today."""
    table = fidelity.sensitivity_table(fidelity.committed()["ablation"])
    assert len(table.splitlines()) == 3 + len(fidelity.SENSITIVITY)
    assert "|  |" not in table

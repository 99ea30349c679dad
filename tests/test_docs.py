"""What the documentation says is true: its code runs, its lists are those of the registry."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from vlcache_sgl import api
from vlcache_sgl.api import hookspecs
from vlcache_sgl.policy import manager, resolve
from vlcache_sgl.policy.manager import Provider, Registered, Registry, registry

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "writing-a-policy.md"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


def extended(namespace: dict) -> Registry:
    """The installed plugins and those that the hooks of a document yield."""
    provider = Provider("docs", "0", "docs = docs")

    def joined(known, hook):
        records = namespace.get(hook, list)()
        return {**known, **{record.name: Registered(record, provider) for record in records}}

    installed = registry()
    return Registry(
        joined(installed.scorers, "vlcache_scorers"),
        joined(installed.allocators, "vlcache_allocators"),
        joined(installed.recipes, "vlcache_recipes"),
    )


@pytest.fixture
def tutorial(monkeypatch):
    """Runs the tutorial from top to bottom; its hooks are known as if it were installed once it has defined them."""
    namespace: dict = {"__name__": "tutorial"}
    monkeypatch.setattr("vlcache_sgl.policy.policy.registry", lambda: extended(namespace))
    for number, block in enumerate(blocks(TUTORIAL, "python"), 1):
        exec(compile(block, f"{TUTORIAL.name}, block {number}", "exec"), namespace)
    return namespace


def test_the_tutorial_runs(tutorial):
    assert tutorial["plan"].total == 120


def test_the_policies_that_the_tutorial_names_resolve(tutorial):
    texts = re.findall(r"--kv-policy (\S+)", "".join(blocks(TUTORIAL, "text")))
    assert len(texts) == 6
    for text in texts:
        prompt, policy = tutorial["prompt"], resolve(text)
        views = tutorial["synthetic_views"](prompt, policy.needs)
        assert policy.decide(*views, prompt, 100).total == 100


def test_the_tutorials_records_pass_the_registrys_checks(tutorial):
    for record in tutorial["vlcache_scorers"]():
        assert manager._scorer_problem(record) is None
    for record in tutorial["vlcache_allocators"]():
        assert manager._allocator_problem(record) is None


def test_the_policy_in_the_readme_works():
    (block,) = (block for block in blocks(ROOT / "README.md", "python") if "@hookimpl" in block)
    namespace: dict = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), namespace)
    for record in namespace["vlcache_scorers"]():
        assert manager._scorer_problem(record) is None
    policy = resolve("scorer=my_knorm,allocator=vlcache,sink=4", installed=extended(namespace))
    prompt = api.Prompt(50, 0, (), num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
    views = [api.LayerView(i, keys=torch.rand(1, 50, 4), density=torch.rand(1)) for i in range(2)]
    assert policy.decide(views, views, prompt, 20).total == 20


def test_examples_in_the_hookspecs_run():
    namespace: dict = {"__name__": "hookspecs"}
    for hook in ("vlcache_scorers", "vlcache_allocators", "vlcache_recipes"):
        text = getattr(hookspecs, hook).__doc__
        code = "\n".join(line[8:] for line in text.splitlines() if line.startswith("        "))
        exec(compile(code, hook, "exec"), namespace)
    policy = resolve("mine", installed=extended(namespace))
    assert (policy.scorer_name, policy.allocator_name) == ("my_knorm", "first_half")


def test_every_hook_and_every_name_of_the_api_is_in_the_tutorial_or_documented_in_code():
    text = TUTORIAL.read_text()
    for hook in (name for name in vars(hookspecs) if name.startswith("vlcache_")):
        assert f"def {hook}()" in text
    for name in api.__all__:
        documented = getattr(api, name).__doc__ or name in ("hookimpl", "BudgetSum")  # which can carry none
        assert documented, f"{name} has no docstring"


@pytest.fixture
def generate():
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_of_policies_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after adding a policy or changing a default."""
    assert generate.PAGE.read_text() == generate.rendered(generate.PAGE.read_text())


def test_the_table_of_flags_in_the_readme_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after changing a flag."""
    assert generate.README.read_text() == generate.rendered_readme(generate.README.read_text())


def test_the_table_of_metrics_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after adding a statistic or changing its text."""
    assert generate.METRICS.read_text() == generate.rendered_metrics(generate.METRICS.read_text())


def test_the_reference_of_what_a_policy_sees_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after changing a class of the api."""
    assert generate.REFERENCE.read_text() == generate.reference()


def test_the_reference_says_something_of_every_field(generate):
    assert not re.findall(r"^\| (`\w+`) .*\| +\|$", generate.reference(), re.MULTILINE)
    assert not re.findall(r"^\* `.*`: *$", generate.reference(), re.MULTILINE)
    assert {api.Prompt, api.LayerView, api.Budget, api.Needs, api.Selection} <= set(generate.CLASSES)

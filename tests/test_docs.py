"""What the documentation says is true: its code runs, its lists are those of the registry."""

import importlib.util
import os
import re
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


def module_of_docs(name: str) -> ModuleType:
    """A file of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def generate() -> ModuleType:
    return module_of_docs("generate")


def test_the_list_of_policies_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after adding a policy or changing a default."""
    assert generate.PAGE.read_text() == generate.rendered(generate.PAGE.read_text())


def test_the_table_of_flags_in_the_readme_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after changing a flag."""
    assert generate.README.read_text() == generate.rendered_readme(generate.README.read_text())


def test_the_table_of_metrics_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after adding a statistic or changing its text."""
    assert generate.METRICS.read_text() == generate.rendered_metrics(generate.METRICS.read_text())


def test_the_table_of_models_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after changing models/matrix.toml."""
    assert generate.MODELS.read_text() == generate.rendered_models(generate.MODELS.read_text())


def test_the_reference_of_what_a_policy_sees_is_up_to_date(generate):
    """Run ``python docs/generate.py`` after changing a class of the api."""
    assert generate.REFERENCE.read_text() == generate.reference()


def test_the_reference_says_something_of_every_field(generate):
    assert not re.findall(r"^\| (`\w+`) .*\| +\|$", generate.reference(), re.MULTILINE)
    assert not re.findall(r"^\* `.*`: *$", generate.reference(), re.MULTILINE)
    assert {api.Prompt, api.LayerView, api.Budget, api.Needs, api.Selection} <= set(generate.CLASSES)


def test_tree_imports_and_sizes_of_the_architecture_are_up_to_date(generate):
    """Run ``python docs/generate.py`` after adding, moving or growing a file."""
    assert generate.ARCHITECTURE.read_text() == generate.rendered_architecture(generate.ARCHITECTURE.read_text())


def test_the_import_graph_has_the_arrows_that_the_source_has(generate, tmp_path, monkeypatch):
    """A made-up source: absolute, relative, inside a function, of somebody else."""
    source = tmp_path / "src/vlcache_sgl"
    for folder in ("api", "memory"):
        (source / folder).mkdir(parents=True)
    (source / "config.py").write_text("")
    (source / "api/a.py").write_text("import torch\nfrom vlcache_sgl import config\n")
    (source / "memory/b.py").write_text("def f():\n    from ..api import a\n    import sglang.srt\n")
    walker = generate.module_at(ROOT / "tests/test_imports.py")
    monkeypatch.setattr(walker, "SGL", source)
    monkeypatch.setattr(generate, "module_at", lambda _: walker)
    monkeypatch.setattr(generate, "SOURCES", (source, *generate.SOURCES[1:]))
    rows = generate.import_graph(sorted(source.rglob("*.py"))).splitlines()[2:]
    assert rows == ["| `api` | `vlcache_sgl` 1 |", "| `memory` | `api` 1, `sglang` 1 |", "| `vlcache_sgl` |  |"]


FRONT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*(ROOT / name for name in FRONT), *SITE, *sorted((ROOT / ".github").glob("*.md"))]


@pytest.mark.parametrize("page", [*SITE, *(ROOT / name for name in FRONT[1:])], ids=lambda page: page.name)
def test_a_page_begins_with_whom_it_is_for(page):
    title, empty, opening = page.read_text().splitlines()[:3]
    assert title.startswith("# ")
    assert not empty
    assert re.match(r"For [a-z]", opening)


@pytest.fixture(scope="module")
def repository() -> list[str]:
    """Files of the repository, without what building it leaves behind."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [f for f in folders if f == ".github" or not f.startswith((".", "__"))]
        if Path(folder) == ROOT:
            folders[:] = [f for f in folders if f not in ("out", "dist", "build")]
        found += [f"/{(Path(folder) / name).relative_to(ROOT).as_posix()}" for name in names]
    return found


FILE = r"(?:[\w.-]+/)*[\w-]+\.(?:py|md|sh|toml|txt|npz)"
FOLDER = r"(?:[\w-]+/)+|(?:benchmarks|docs|examples|kernels|models|policies|scripts|src|tests)(?:/[\w-]+)+"
EXAMPLE_NAMES = {"run.sh", "policies/vlcache_policies/NAME.py", "tests/kernels/test_NAME.py", "table.md"}
"""Of files that the reader or a command makes."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_folders_that_a_page_names_exist(page, repository):
    """In backticks: the path, or its end, of a file or of a folder."""
    named = re.findall(rf"`({FILE}|{FOLDER})`", page.read_text())
    made = {name for name in named if name.startswith("out/")}
    missing = {
        name
        for name in {*named} - made - EXAMPLE_NAMES
        if not any(path.endswith(f"/{name}") or f"/{name.rstrip('/')}/" in path for path in repository)
    }
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_to_files(page):
    hooks = module_of_docs("mkdocs_hooks")
    assert not [path for path in hooks.linked(page) if not path.exists()]


def test_links_across_the_border_of_docs_are_written_anew():
    hooks = module_of_docs("mkdocs_hooks")

    def rewritten(page: str, text: str) -> str:
        return hooks.on_page_markdown(text, SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / page))))

    assert rewritten("docs/gpu.md", "[a](../README.md#flags)") == "[a](README.md#flags)"
    assert (
        rewritten("README.md", "[a](docs/gpu.md), ![b](docs/figures/judge.png)")
        == "[a](gpu.md), ![b](figures/judge.png)"
    )
    assert rewritten("models/tinyvlm/README.md", "[a](../../docs/gpu.md)") == "[a](../../gpu.md)"
    kept = "[a](https://arxiv.org), [b](#here), [c](../nowhere.md)"
    assert rewritten("docs/gpu.md", kept) == kept
    outside = {path.relative_to(ROOT).as_posix() for path in hooks.outside()}
    assert {"README.md", "benchmarks/LOG.md", "models/tinyvlm/README.md", "dashboards/vlcache.json"} <= outside


def test_every_page_of_docs_is_in_the_navigation():
    navigation = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert {page.name for page in SITE} <= set(navigation)
    assert all((ROOT / "docs" / name).exists() or (ROOT / name).exists() for name in navigation)


def test_pre_commit_and_setup_use_one_ruff():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (pinned,) = (pin for pin in project["optional-dependencies"]["dev"] if pin.startswith("ruff=="))
    used = re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())
    assert set(used) == {pinned}


def test_ci_of_the_forge_does_what_ours_does():
    ours = re.findall(r"make [\w-]+", (ROOT / ".ci/run").read_text())
    assert ours
    workflow = re.findall(r"run: (make [\w-]+)", (ROOT / ".github/workflows/ci.yml").read_text())
    assert set(ours) <= set(workflow)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {command.removeprefix("make ") for command in workflow} <= set(targets)


def test_commands_that_pages_name_are_there():
    """``make NAME``, in backticks and in shell blocks."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set()
    for page in PAGES:
        named |= set(re.findall(r"`make ([a-z][\w-]*)", page.read_text()))
        named |= set(re.findall(r"^make ([a-z][\w-]*)", "".join(blocks(page, "sh")), re.MULTILINE))
    assert {"test", "docs", "wheel-check"} <= named <= targets

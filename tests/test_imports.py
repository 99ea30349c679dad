"""Imports go one way: kernels <- policies -> api <- the rest of vlcache_sgl; SGLang only at the edge."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SGL, POLICIES, KERNELS = ROOT / "src/vlcache_sgl", ROOT / "policies/vlcache_policies", ROOT / "kernels/vlcache_kernels"

STDLIB = set(sys.stdlib_module_names)


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, inside functions too; relative imports are made absolute."""
    root = next(parent for parent in (SGL, POLICIES, KERNELS) if path.is_relative_to(parent))
    package = (root.name, *path.relative_to(root).parent.parts)
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def under(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def foreign(path: Path, *allowed: str) -> set[str]:
    """Imports of a file that are neither in the standard library nor in `allowed`."""
    return {m for m in imports(path) if m.split(".")[0] not in STDLIB and not under(m, *allowed)}


def graph() -> dict[str, set[str]]:
    """Which modules of vlcache_sgl each of them imports, inside functions and under TYPE_CHECKING too."""
    paths = {".".join(("vlcache_sgl", *path.relative_to(SGL).with_suffix("").parts)): path for path in files(SGL)}
    modules = {dotted.removesuffix(".__init__"): path for dotted, path in paths.items()}

    def module_of(imported: str) -> str:
        """The module that has an imported name, or is it."""
        while imported and imported not in modules:
            imported = imported.rpartition(".")[0]
        return imported

    return {module: {module_of(i) for i in imports(path)} - {"", module} for module, path in modules.items()}


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Nodes that lie on a common circle, a list per circle."""

    def reachable(begin: str) -> set[str]:
        seen: set[str] = set()
        left = [begin]
        while left:
            new = edges[left.pop()] - seen
            seen |= new
            left += new
        return seen

    reach = {node: reachable(node) for node in edges}
    found = {frozenset(m for m in reach[n] if n in reach[m]) for n in edges if n in reach[n]}
    return sorted(map(sorted, found))


def folders(modules: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between folders; a module beside them, such as `vlcache_sgl.config`, is one of its own."""
    packages = {str(path.parent.relative_to(SGL.parent)).replace("/", ".") for path in files(SGL)} - {"vlcache_sgl"}

    def folder(module: str) -> str:
        parent = module if module in packages else module.rpartition(".")[0]
        return parent if parent in packages else module

    edges: dict[str, set[str]] = {}
    for module, imported in modules.items():
        edges.setdefault(folder(module), set()).update(map(folder, imported))
    return {name: imported - {name} for name, imported in edges.items()}


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == [["b", "c"]]
    lazy = folders({"vlcache_sgl.memory.x": {"vlcache_sgl.api.y", "vlcache_sgl.config"}, "vlcache_sgl.api.y": set()})
    assert lazy == {"vlcache_sgl.memory": {"vlcache_sgl.api", "vlcache_sgl.config"}, "vlcache_sgl.api": set()}
    known = graph()
    assert "vlcache_sgl.sglang_hooks.session" in known["vlcache_sgl.sglang_hooks.startup"], "inside a function"
    assert "vlcache_sgl.evaluation.calibration" in known["vlcache_sgl.sglang_hooks.background_calibration"]


def test_no_circle_between_files():
    assert circles(graph()) == []


def test_no_circle_between_folders():
    assert circles(folders(graph())) == []


@pytest.mark.parametrize("path", files(SGL), ids=name)
def test_sglang_is_known_in_one_package_and_the_platform_only(path):
    at_the_edge = path.relative_to(SGL).parts[0] in ("sglang_hooks", "platform")
    assert at_the_edge or not {m for m in imports(path) if under(m, "sglang")}


@pytest.mark.parametrize("path", files(SGL), ids=name)
def test_vlcache_sgl_finds_policies_by_entry_point_only(path):
    assert not {m for m in imports(path) if under(m, "vlcache_policies")}
    constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
    assert not [text for text in constants if isinstance(text, str) and text.startswith("vlcache_policies")]


@pytest.mark.parametrize("path", files(POLICIES), ids=name)
def test_policies_import_the_public_api(path):
    assert not foreign(path, "vlcache_sgl.api", "vlcache_policies", "vlcache_kernels", "torch")


@pytest.mark.parametrize("path", files(POLICIES), ids=name)
def test_policies_use_what_the_api_exports(path):
    """``from vlcache_sgl.api import X``, as a stranger would: no module of the api is named."""
    from vlcache_sgl import api

    mine = {m for m in imports(path) if under(m, "vlcache_sgl.api")}
    assert mine <= {f"vlcache_sgl.api.{exported}" for exported in api.__all__}


@pytest.mark.parametrize("path", files(KERNELS), ids=name)
def test_kernels_know_no_product(path):
    assert not foreign(path, "vlcache_kernels", "torch", "triton", "flashinfer")


@pytest.mark.parametrize("path", files(SGL / "api", SGL / "policy"), ids=name)
def test_the_pure_part_stays_pure(path):
    # Settings are read by what a request may ask for, and know nothing themselves.
    inside = ("api", "policy", "config", "weights", "spelling", "streams", "_version")
    # Selection is the one kernel among them: it decides alike on every device.
    kernels = ("vlcache_kernels.select",) if path.name == "plan.py" else ()
    assert not foreign(path, *(f"vlcache_sgl.{part}" for part in inside), *kernels, "torch", "pluggy")


def test_kernels_folder_is_no_package():
    """An ``__init__.py`` there would hide Hugging Face's ``kernels`` when a server starts from the repository."""
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "policies/__init__.py").exists()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import vlcache_sgl", ("torch", "sglang", "vlcache_policies")),
        ("import vlcache_sgl.config", ("torch", "sglang")),
        ("import vlcache_sgl.capacity", ("torch", "sglang")),
        ("import vlcache_sgl.cli.plan", ("torch", "sglang")),
        ("import vlcache_sgl.cli.main", ("torch", "sglang", "rich")),
        ("from vlcache_sgl.policy import resolve", ("sglang", "vlcache_policies", "triton")),
        ("from vlcache_sgl.policy import resolve; resolve('vlcache')", ("sglang",)),
    ],
    ids=["package", "config", "capacity", "plan", "command", "policy", "resolve"],
)
def test_importing_is_light(statement, absent):
    code = f"{statement}; import sys; print([m for m in {absent!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

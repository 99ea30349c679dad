"""One wheel: three import packages, the bundled model, nothing else; seen from the built file.  No network."""

from __future__ import annotations

import configparser
import io
import os
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

import vlcache_sgl
from vlcache_sgl.client.bundled import bundled_model

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "vlcache_sgl": ROOT / "src/vlcache_sgl",
    "vlcache_policies": ROOT / "policies/vlcache_policies",
    "vlcache_kernels": ROOT / "kernels/vlcache_kernels",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built by the backend that pip would call, without the isolated environment that needs an index."""
    pytest.importorskip("hatchling", reason="`make setup` installs it")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = out.iterdir()
    return path


def dist_info(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [m for m in archive.namelist() if m.endswith(f".dist-info/{name}")]
        return archive.read(member).decode()


def test_name_says_version_and_any_platform(wheel: Path) -> None:
    assert wheel.name == f"vlcache_sgl-{vlcache_sgl.__version__}-py3-none-any.whl"


def test_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == set(PACKAGES)
    for package, folder in PACKAGES.items():
        sources = {f"{package}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")}
        missing = sources - names
        assert not missing, missing
        assert f"{package}/py.typed" in names


def test_has_no_init_beside_the_kernels(wheel: Path) -> None:
    """`kernels/__init__.py` would hide Hugging Face's `kernels` when a server starts from the repository."""
    assert not (ROOT / "kernels/__init__.py").exists()


def test_every_entry_point_leads_into_the_wheel(wheel: Path) -> None:
    points = configparser.ConfigParser(delimiters="=")
    points.read_string(dist_info(wheel, "entry_points.txt"))
    assert {"console_scripts", "sglang.srt.plugins", "sglang.srt.platforms", "vlcache_sgl"} <= set(points.sections())
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    targets = [target for section in points.sections() for target in points[section].values()]
    for target in targets:
        module = target.partition(":")[0].replace(".", "/")
        assert {f"{module}.py", f"{module}/__init__.py"} & names, target


def test_metadata_names_licence_python_and_one_sglang(wheel: Path) -> None:
    metadata = HeaderParser().parse(io.StringIO(dist_info(wheel, "METADATA")))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == "<3.13,>=3.11"
    assert "sglang==0.5.23" in metadata.get_all("Requires-Dist", [])
    assert "Apache License" in dist_info(wheel, "licenses/LICENSE")


MODEL = ROOT / "models/tinyvlm/grounded"


def test_holds_the_bundled_model(wheel: Path) -> None:
    """Every file of the checkpoint, byte for byte."""
    with zipfile.ZipFile(wheel) as archive:
        inside = {name: archive.read(name) for name in archive.namelist() if name.startswith("vlcache_sgl/bundled/")}
    assert inside == {f"vlcache_sgl/bundled/tinyvlm/{path.name}": path.read_bytes() for path in MODEL.iterdir()}


def test_the_bundled_model_is_found_from_an_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    """In a folder that knows no checkout, with the wheel in front of the editable install."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = "from vlcache_sgl.client.bundled import bundled_model; print(bundled_model())"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert Path(ran.stdout.strip()) == site / "vlcache_sgl/bundled/tinyvlm"


def test_the_bundled_model_is_found_in_a_checkout() -> None:
    assert bundled_model() == MODEL


def test_unpacked_wheel_imports_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    script = f"import {', '.join(PACKAGES)}; print(*(m.__file__ for m in ({', '.join(PACKAGES)})), sep='\\n')"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert [Path(line).parents[1] for line in ran.stdout.split()] == [site] * len(PACKAGES)


def test_constraints_pin_the_direct_dependencies_and_name_no_host() -> None:
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert "://" not in line, line
        assert "@" not in line, line
        if line and not line.startswith("#"):
            name, version = line.split("==")
            pins[name.lower()] = version
    assert {"sglang", "torch", "transformers", "triton", "pluggy", "rich", "pytest", "ruff", "mypy", "uv"} <= set(pins)
    assert pins["sglang"] == "0.5.23"

"""The installed package: kernels/ is akl_triton.kernels, from a wheel and from an sdist alike."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest

import akl_triton
from akl_triton.cli import REQUIRES

ROOT = Path(__file__).resolve().parents[1]
KERNELS = {path.name for path in (ROOT / "kernels").glob("*.py")}


def skip_without(distribution: str) -> None:
    try:
        version(distribution)
    except PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    skip_without("build")
    source = tmp_path_factory.mktemp("source") / "tree"
    source.mkdir()
    for name in ("akl_triton", "kernels", "tests", "bench"):
        shutil.copytree(
            ROOT / name,
            source / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, source],
        cwd=out,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return out


def test_kernels_is_no_package_of_its_own() -> None:
    """A top-level package `kernels` would shadow the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = ROOT / "akl_triton" / "kernels"
    assert link.is_symlink() and link.resolve() == ROOT / "kernels"


def test_wheel(distributions: Path) -> None:
    (wheel,) = distributions.glob(f"akl_triton-{akl_triton.__version__}-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "akl-triton = akl_triton.cli:main" in archive.read(entry_points).decode()
    top_level = {name.split("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"akl_triton"}
    prefix = "akl_triton/kernels/"
    assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == KERNELS
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "akl_triton").rglob("*.py")}
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "akl_triton").rglob("*.jinja")}
    assert templates
    assert modules | templates | {"akl_triton/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist(distributions: Path) -> None:
    (sdist,) = distributions.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {f"kernels/{name}" for name in KERNELS} <= names
    assert "kernels/__init__.py" not in names


@pytest.mark.parametrize(
    ("command", "pattern"), [("twine check --strict", "*"), ("check-wheel-contents", "*.whl")]
)
def test_what_checks_distributions_finds_nothing(
    distributions: Path, command: str, pattern: str
) -> None:
    """The commands of `make wheel`."""
    assert f"$(BIN)/{command} dist/{pattern}\n" in (ROOT / "Makefile").read_text("utf-8")
    name, *options = command.split()
    skip_without(name)
    result = subprocess.run(
        [Path(sys.executable).with_name(name), *options, *distributions.glob(pattern)],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_loads_nothing_heavy_but_torch() -> None:
    """`import akl_triton` costs no more than `import torch`, wherever the package is used."""
    script = """
import sys, torch
before = set(sys.modules)
import akl_triton
heavy = {"triton", "numpy", "rich", "matplotlib", "transformers", "akl_triton.kernels.launch"}
print(sorted(heavy & (set(sys.modules) - before)))
"""
    assert python(script) == "[]"


def test_works_without_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch, akl_triton
student = torch.zeros(2, 8, requires_grad=True)
akl_triton.adaptive_kl(student, torch.eye(2, 8)).backward()
assert student.grad.abs().sum() > 0
try:
    akl_triton.adaptive_kl(student, torch.eye(2, 8), backend="triton")
except ValueError as error:
    print(error)
"""
    assert "triton is not installed" in python(script)


def python(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_extras_bring_what_the_commands_import() -> None:
    skip_without("akl-triton")
    extras: dict[str, set[str]] = {}
    for requirement in requires("akl-triton") or []:
        name, _, marker = requirement.partition(";")
        if extra := re.search(r"extra == ['\"](\w+)['\"]", marker):
            distribution = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", name)
            assert distribution
            names = extras.setdefault(extra[1], set())
            names.add(distribution[1].lower().replace("-", "_"))
            names |= {f"[{other}]" for other in (distribution[2] or "").split(",") if other}
    for names in extras.values():
        for other in [name[1:-1] for name in names if name[0] == "["]:
            names |= extras[other]
    for extra_name, modules in REQUIRES.values():
        assert set(modules) <= extras.get(extra_name, set())

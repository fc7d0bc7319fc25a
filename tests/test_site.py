"""The sources of the site: pages, navigation, the API, what is included; `make docs` builds it."""

from __future__ import annotations

import importlib.util
import json
import re
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
INCLUDED = re.compile(r'^--8<-- "(.*)"$', flags=re.MULTILINE)


class Loader(yaml.SafeLoader):  # type: ignore[misc, name-defined]
    """Tags of mkdocs.yml that name Python objects stand for nothing here."""


@pytest.fixture(scope="module")
def config() -> Any:
    return yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), Loader)


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    pytest.importorskip("mkdocs")
    return module_of("hooks")


@pytest.fixture(scope="module")
def docstrings() -> ModuleType:
    pytest.importorskip("griffe")
    return module_of("docstrings")


def module_of(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_of(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


# ---- pages


def test_every_page_is_in_the_navigation_once(config: Any) -> None:
    """And beside those of docs/ only documents of the repository."""
    listed = pages_of(config["nav"])
    ours = [str(page.relative_to(DOCS)) for page in PAGES]
    assert sorted(listed) == sorted({*ours, *listed})
    for other in set(listed) - set(ours):
        assert (ROOT / other).is_file(), other


@pytest.mark.parametrize("module", ["", ".extras", ".integrations"])
def test_every_public_name_has_an_entry(module: str) -> None:
    entries = {
        name
        for page in (DOCS / "api").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), flags=re.MULTILINE)
    }
    package = f"akl_triton{module}"
    missing = {f"{package}.{name}" for name in import_module(package).__all__} - entries
    assert not missing


def test_what_is_included_is_an_example_and_linked() -> None:
    """A forge does not include it: there, the link before it leads to the code."""
    included = 0
    for page in PAGES:
        text = page.read_text("utf-8")
        for path in INCLUDED.findall(text):
            included += 1
            assert path.startswith("examples/") and (ROOT / path).is_file(), f"{page}: {path}"
            assert f"[{path}](" in text, f"{page} has no link to {path}"
    assert included


def test_tests_that_pages_name_exist() -> None:
    """The file, and with -k a test in it that the expression selects."""
    named = 0
    for page in PAGES:
        commands = re.findall(
            r'`pytest (tests/\S+\.py)(?: -k (?:"(.+?)"|(\S+)))?`', page.read_text()
        )
        for file, quoted, word in commands:
            named += 1
            tests = re.findall(r"^def (test_\w+)", (ROOT / file).read_text("utf-8"), re.MULTILINE)
            for part in (quoted or word).split(" or "):
                assert any(part in test for test in tests), f"{page}: {file} -k {part}"
    assert named > 20


def test_the_picture_of_the_loss_shows_what_the_text_says() -> None:
    """More of the gap in the tail, where the student gives most to the token of rank 16."""
    token = json.loads((ROOT / "bench/results/overview.json").read_text())["data"]["token"]
    assert token["forward_weight"] < 0.5 and token["g_tail"] > token["g_head"]
    student, head = token["student"], token["head_size"]
    assert student.index(max(student[head:])) == 15
    excess = [q - p for p, q in zip(token["teacher"], student, strict=True)]
    assert sum(x > 0 for x in excess[head:]) == 1
    text = (DOCS / "loss.md").read_text("utf-8")
    assert "single\n   token of rank 16" in text and "here 0.5" in text


# ---- links


@pytest.mark.parametrize(
    ("document", "link", "in_site"),
    [
        ("docs/numerics.md", "../kernels/terms.py", "kernels/terms.py.md"),
        ("docs/trainers/lora.md", "../../examples/lora.py", "../examples/lora.py.md"),
        ("docs/trainers/lora.md", "../choosing.md#x", "../choosing.md#x"),
        ("docs/index.md", "../CONTRIBUTING.md#layers", "CONTRIBUTING.md#layers"),
        ("docs/index.md", "../bench/results/overview.png", "bench/results/overview.png"),
        ("bench/README.md", "../docs/numerics.md", "../numerics.md"),
        ("CONTRIBUTING.md", "README.md", "index.md"),
        ("docs/loss.md", "https://arxiv.org/abs/2404.02657", "https://arxiv.org/abs/2404.02657"),
        ("docs/loss.md", "#the-gradient", "#the-gradient"),
    ],
)
def test_links_in_the_site(
    hooks: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    document: str,
    link: str,
    in_site: str,
) -> None:
    path = tmp_path / document.rpartition("/")[0] / link.partition("#")[0]
    for parent in (tmp_path / document, path):
        parent.resolve().parent.mkdir(parents=True, exist_ok=True)
    if "://" not in link:
        (path if not path.is_dir() else path / "x").touch()
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    assert hooks.in_site(document, f"a [b]({link}) c") == f"a [b]({in_site}) c"
    code = f"```python\na[b]({link})\n```"
    assert hooks.in_site(document, code) == code


def test_a_link_to_nothing_is_an_error(hooks: ModuleType) -> None:
    with pytest.raises(
        Exception, match=r"^docs/x.md: expected a link to a file, got ../nothing.py"
    ):
        hooks.in_site("docs/x.md", "[a](../nothing.py)")


# ---- docstrings


def test_headings_and_names_of_docstrings(docstrings: ModuleType) -> None:
    shown = docstrings.Docstrings().shown(
        "Of `AdaptiveKL`, `mu` and ``DKD``.\n\nMath:\n    the mass::\n\n        w\n\n"
        "torch.compile:\n    x\n\nArgs:\n    mu: > 0\n\nExample:\n    >>> 1\n",
        {"mu"},
    )
    assert shown == (
        "Of [`AdaptiveKL`][akl_triton.AdaptiveKL], `mu` and ``DKD``.\n\nNote: Math\n"
        "    the mass:\n\n        w\n\nNote: torch.compile\n    x\n\nArgs:\n    mu: \\> 0\n\n"
        "Examples:\n    >>> 1\n"
    )


def test_options_are_parameters_in_the_site(docstrings: ModuleType) -> None:
    griffe = pytest.importorskip("griffe")
    package = griffe.load(
        "akl_triton",
        search_paths=[str(ROOT)],
        extensions=griffe.Extensions(docstrings.Docstrings()),
        submodules=True,
    )
    function = package["losses.adaptive_kl"]
    assert {"temperature", "mu", "num_items"} <= {x.name for x in function.parameters}
    assert function.parameters["reduction"].default == "'mean'"
    assert "{options}" not in function.docstring.value
    assert (
        package["losses.DivergenceStats.gap"].docstring.value
        == "sum |p - q|, twice the total variation"
    )

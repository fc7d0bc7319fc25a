"""The files that a forge and its tools read: they parse, and say what CONTRIBUTING.md says; and the
imports of the tests."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ("dev", "cli", "hf", "peft", "trl", "demo")  # extras, by `make`


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text("utf-8"))


def test_the_workflow_is_ci_run() -> None:
    (job,) = load(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_issues_ask_for_the_environment(name: str) -> None:
    fields = {field["id"]: field for field in load(f".github/ISSUE_TEMPLATE/{name}.yml")["body"]}
    assert "akl-triton env --json" in fields["env"]["attributes"]["label"]


def test_commits_are_checked_by_the_tools_of_the_makefile() -> None:
    (local,) = load(".pre-commit-config.yaml")["repos"]
    makefile = (ROOT / "Makefile").read_text("utf-8")
    entries = [hook["entry"].replace(" --fix", "") for hook in local["hooks"]]
    assert len(entries) == 3
    for entry in entries:
        assert entry.replace(".venv/bin/", "$(BIN)/") in makefile


def test_nox_lists_the_sessions_that_contributing_names() -> None:
    pytest.importorskip("nox")
    command = [sys.executable, "-m", "nox", "--list"]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    sessions = set(re.findall(r"^[*-] ([a-z]+(?:-[a-z]+)?)", result.stdout, flags=re.MULTILINE))
    assert sessions == {"tests", "oldest", "integrations-floor", "latest", "lint", "types"}
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    assert all(f"`{session}`" in contributing for session in sessions)


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_oldest_session_has_the_oldest_versions(name: str) -> None:
    found = re.search(rf'"{name}>=([\d.]+)', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert found is not None
    assert f'"{name}=={found[1]}.0"' in (ROOT / "noxfile.py").read_text("utf-8")


def test_what_development_installs_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *(x for name in INSTALLED for x in extras[name])]
    names = {re.split(r"[\[<>=; ]", need)[0] for need in needs} - {"akl-triton"}
    constraints = (ROOT / "constraints.txt").read_text("utf-8")
    pinned = set(re.findall(r"^([\w.-]+)==", constraints, flags=re.MULTILINE))
    assert names - pinned == {"typing-extensions"}  # as torch wants it


def test_the_floors_of_the_integrations_are_one_version_each() -> None:
    """The session of nox installs what stands behind each >=."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for name in ("hf", "peft", "trl"):
        for need in project["optional-dependencies"][name]:
            assert need.startswith("akl-triton[") or re.match(r"[\w-]+>=[\d.]+(,|$)", need), need


def test_no_test_file_imports_another() -> None:
    """Helpers that two test files need are in tests/support."""
    imported = re.compile(r"^\s*(?:from|import) tests\.(?:\w+\.)*test_\w+", flags=re.MULTILINE)
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert [str(x) for x in files if imported.search(x.read_text("utf-8"))] == []

"""The code in the documentation runs, and its results are as the text says."""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import akl_triton
from akl_triton import divergences, linear_losses, losses, modules, reference, sharding
from akl_triton.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    "module",
    [divergences, losses, linear_losses, modules, reference, sharding],
    ids=lambda m: m.__name__,
)
def test_examples_of_docstrings(module: ModuleType) -> None:
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("name", akl_triton.__all__)
def test_public_docstrings_have_their_headings(name: str) -> None:
    public = getattr(akl_triton, name)
    assert public.__doc__
    if name.endswith("_kl"):
        for heading in ("Math:", "Reference:", "Example:"):
            assert heading in public.__doc__, f"{name} lacks {heading}"


def test_before_and_after_in_the_readme_agree() -> None:
    """The first snippet computes the forward KL, and so does the second with forward_kl."""
    first, before, after, *_ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert first == after

    def gradient(code: str) -> tuple[float, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        student, teacher = torch.randn(2, 2, 6, 40, generator=generator)
        labels = torch.arange(12).view(2, 6)
        labels[0, 2:4] = -100
        names: dict[str, Any] = {
            "F": F,
            "student_logits": student.requires_grad_(),
            "teacher_logits": teacher,
            "labels": labels,
        }
        exec(code, names)
        assert student.grad is not None
        return names["loss"].item(), student.grad

    loss, grad = gradient(after.replace("adaptive_kl", "forward_kl"))
    expected_loss, expected_grad = gradient(before)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    torch.testing.assert_close(grad, expected_grad)
    assert gradient(after)[0] != pytest.approx(expected_loss, rel=1e-3)


def test_before_and_after_without_the_logits_agree() -> None:
    *_, before, after, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)

    def gradients(code: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        student, teacher = (
            torch.nn.ModuleDict({"lm_head": torch.nn.Linear(size, 40, bias=False)})
            for size in (8, 12)
        )
        names: dict[str, Any] = {
            "torch": torch,
            "adaptive_kl": akl_triton.adaptive_kl,
            "student": student,
            "teacher": teacher,
            "student_hidden": torch.randn(2, 6, 8, requires_grad=True),
            "teacher_hidden": torch.randn(2, 6, 12),
            "labels": torch.arange(12).view(2, 6),
        }
        exec(code, names)
        weight = student.get_parameter("lm_head.weight")
        return [names["loss"], names["student_hidden"].grad, weight.grad]

    for ours, theirs in zip(gradients(after), gradients(before), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pairs_in_the_readme_are_near_the_dense_loss() -> None:
    *_, snippet = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    noise, teacher = torch.randn(2, 2, 6, 900, generator=torch.Generator().manual_seed(0))
    teacher = 3.0 * teacher
    student = (teacher + 0.5 * noise).requires_grad_()
    names: dict[str, Any] = {
        "adaptive_kl": akl_triton.adaptive_kl,
        "student_logits": student,
        "teacher_logits": teacher,
        "labels": torch.arange(12).view(2, 6),
    }
    exec(snippet, names)
    dense = akl_triton.adaptive_kl(student, teacher, names["labels"], shift=1)
    assert student.grad is not None
    (expected,) = torch.autograd.grad(dense, student)
    assert 0.5 * dense < names["loss"] < dense
    assert (student.grad - expected).norm() < 0.3 * expected.norm()


def test_what_is_generated_is_that_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    written = (ROOT / "docs" / "options.md").read_text()
    assert written == generate.options_document(), "run: python docs/generate.py"
    of_commands = (ROOT / "docs" / "command_line.md").read_text()
    assert of_commands == generate.command_line_document(), "run: python docs/generate.py"
    for function in (akl_triton.distillation_loss, akl_triton.linear_distillation_loss):
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                assert f"{name}:" in str(function.__doc__)
                assert name == "divergence" or f"| `{name}` |" in written


def test_links_of_the_documents_lead_somewhere() -> None:
    documents = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    for document in (*documents, *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text("utf-8")):
            assert (document.parent / target).exists(), f"{document} links to {target}"


def test_the_readme_names_every_command() -> None:
    usage = build_parser().format_help()
    for command in ("env", "check", "bench", "inspect", "demo"):
        assert command in usage and f"akl-triton {command}" in README

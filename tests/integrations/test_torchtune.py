"""`TorchtuneLoss` and `AdaptiveKLLoss` in a step of torchtune's recipe, next to its own losses.

pip install torchtune==0.6.1 torchao==0.14.1, with which this was tested, in an environment without
PEFT: it wants torchao 0.16, with which torchtune cannot be imported.
"""

from __future__ import annotations

import runpy
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from akl_triton import distillation_loss

pytest.importorskip("torchao")
pytest.importorskip("torchtune")
import torchtune
from omegaconf import OmegaConf
from torchtune import config, training
from torchtune.models.llama3 import llama3

B, L, V = 2, 9, 64
CHUNKED = {
    "_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss",
    "num_output_chunks": 4,
}
WHOLE = {"_component_": "torch.nn.CrossEntropyLoss"}
THEIRS = "torchtune.modules.loss."
OURS = "akl_triton.integrations.criteria.TorchtuneLoss"


@pytest.fixture(scope="module")
def recipe() -> Any:
    """The class that a recipe is: its file is not in a package."""
    folder = Path(torchtune.__file__).parents[1] / "recipes"
    names = runpy.run_path(str(folder / "knowledge_distillation_single_device.py"))
    return names["KDRecipeSingleDevice"]


def model(seed: int, width: int) -> Any:
    torch.manual_seed(seed)
    return llama3(
        vocab_size=V, num_layers=1, num_heads=2, num_kv_heads=2, embed_dim=width, max_seq_len=16,
        intermediate_dim=32,
    )  # fmt: skip


def losses(recipe: Any, loss: dict[str, Any], kd_loss: dict[str, Any]) -> tuple[Any, Tensor]:
    """The student after a backward of the recipe's kd_loss, and that loss."""
    torch.manual_seed(0)
    tokens = torch.randint(V, (B, L))
    labels = tokens.clone()
    labels[0, :4] = -100
    loss_function = config.instantiate(OmegaConf.create(loss))
    kd_loss_function = config.instantiate(OmegaConf.create(kd_loss))
    student, teacher = model(1, 16), model(2, 32)
    if loss is CHUNKED:
        assert kd_loss_function.num_output_chunks == loss_function.num_output_chunks
        for side in (student, teacher):
            side.set_num_output_chunks(loss_function.num_output_chunks)
    step = types.SimpleNamespace(
        _model=student,
        _teacher_model=teacher,
        _loss_fn=loss_function,
        _kd_loss_fn=kd_loss_function,
        ignore_labels_cache=torch.full((B, 1), -100),
    )
    cross_entropy, kd = recipe._loss_step(step, {"tokens": tokens, "labels": labels})
    assert cross_entropy > 0
    kd.backward()
    return student, kd


def assert_same(ours: tuple[Any, Tensor], theirs: tuple[Any, Tensor], less: Any = 0.0) -> None:
    torch.testing.assert_close(ours[1], theirs[1] - less)
    for (name, mine), other in zip(ours[0].named_parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_reverse_kl_is_theirs(recipe):
    """As in the configurations of torchtune, but for the name of the kd_loss."""
    ours = {"_component_": OURS, "num_output_chunks": 4, "divergence": "reverse_kl"}
    theirs = {"_component_": f"{THEIRS}ReverseKLWithChunkedOutputLoss", "num_output_chunks": 4}
    assert_same(losses(recipe, CHUNKED, ours), losses(recipe, CHUNKED, theirs))


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_forward_kl_is_theirs_less_the_entropy_of_the_teacher(recipe, share):
    """Which has no gradient: their forward KL is the cross-entropy with the teacher."""
    chunks: dict[str, Any] = {"_component_": OURS, "num_output_chunks": 4}
    ours = {**chunks, "divergence": "mixed_kl", "alpha": share}
    theirs = {
        **chunks,
        "_component_": f"{THEIRS}SymmetricKLWithChunkedOutputLoss",
        "sym_kd_ratio": share,
    }
    torch.manual_seed(0)
    tokens = torch.randint(V, (B, L))
    with torch.no_grad():
        log_p = model(2, 32)(tokens).log_softmax(-1)
    counted = torch.ones(B, L, dtype=torch.bool)
    counted[0, :3] = counted[:, -1] = False
    entropy = -(log_p.exp() * log_p).sum(-1)[counted].mean()
    assert_same(losses(recipe, CHUNKED, ours), losses(recipe, CHUNKED, theirs), share * entropy)


def test_whole_logits(recipe):
    """With another `loss` the logits are whole, and the modules of ours fit as they are."""
    ours = {"_component_": "akl_triton.DistillationLoss", "divergence": "reverse_kl"}
    theirs = {"_component_": f"{THEIRS}ReverseKLLoss"}
    assert_same(losses(recipe, WHOLE, ours), losses(recipe, WHOLE, theirs))
    chunks: dict[str, Any] = {"_component_": OURS, "num_output_chunks": 4, "mu": 0.8}
    whole: dict[str, Any] = {"_component_": "akl_triton.AdaptiveKLLoss", "mu": 0.8}
    assert_same(losses(recipe, WHOLE, whole), losses(recipe, CHUNKED, chunks))


def test_compiled(recipe, monkeypatch):
    """`compile: True` compiles the kd_loss."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    node = OmegaConf.create({"_component_": OURS, "num_output_chunks": 2})
    compiled = training.compile_loss(config.instantiate(node), verbose=False)
    assert compiled.num_output_chunks == 2
    student, teacher = torch.randn(2, B, L, V)
    labels = torch.randint(V, (B, L))
    ours = compiled(list(student.chunk(2, 1)), list(teacher.chunk(2, 1)), labels)
    torch.testing.assert_close(ours, distillation_loss(student, teacher, labels))

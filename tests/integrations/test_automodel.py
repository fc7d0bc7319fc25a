"""`AutoModelLoss` in a step of the recipe of NeMo AutoModel, next to AutoModel's own loss.

    pip install --no-deps nemo-automodel==0.7.0 megatron-fsdp==0.5.0 flashoptim==0.1.4 \\
        mistral-common==1.13.1 torchao==0.16.0

with which this was tested, next to the requirements of development; AutoModel's own pin an older
transformers.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("nemo_automodel")
loader = pytest.importorskip("nemo_automodel.components.config.loader")
kd: Any = pytest.importorskip("nemo_automodel.recipes.llm.kd")

B, L, V = 2, 6, 40
OURS = "akl_triton.integrations.criteria.AutoModelLoss"
THEIRS = "nemo_automodel.components.loss.kd_loss.KDLoss"


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding, self.lm_head = nn.Embedding(V, 8), nn.Linear(8, V)

    def forward(self, input_ids: Tensor) -> Any:
        return types.SimpleNamespace(logits=self.lm_head(self.embedding(input_ids)))


class Recipe(kd.KnowledgeDistillationRecipeForNextTokenPrediction):  # type: ignore[misc]
    """The recipe after its set-up, which wants a model of the hub, in one process."""

    def __init__(self, kd_loss: dict[str, Any], ratio: float) -> None:
        self.__dict__["cfg"] = loader.ConfigNode({"kd_loss_fn": kd_loss, "kd_ratio": ratio})
        self._setup_kd_state()
        self.loss_fn = loader.ConfigNode(
            {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"}
        ).instantiate()
        self.model_parts = [Model(1)]
        self.teacher_model = Model(2).eval()
        self.dist_env = types.SimpleNamespace(device=torch.device("cpu"))
        self.device_mesh = self.moe_mesh = self.distributed_config = None
        self.pp_enabled = self._offload_teacher_model = False

    def _get_dp_group(self, include_cp: bool = False) -> None:
        return None

    def _get_dp_group_size(self, include_cp: bool = False) -> int:
        return 1


def steps(kd_loss: dict[str, Any], ratio: float = 1.0) -> tuple[Recipe, Tensor]:
    """Two micro-batches with unequal numbers of labels, and one without any."""
    recipe = Recipe(kd_loss, ratio)
    generator = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(V, (2, 3, B, L), generator=generator)
    labels[0, 0, :5] = labels[2] = -100
    count = int((labels != -100).sum())
    total = torch.zeros(())
    for i in range(3):
        batch = {"input_ids": ids[i], "labels": labels[i]}
        loss, *_ = recipe._forward_backward_step(
            i, batch, num_label_tokens=count, num_batches=3, is_train=True
        )
        total += loss
    return recipe, total


@pytest.fixture(autouse=True)
def names_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """NEMO_ENABLE_USER_MODULES=1, which is read when AutoModel is imported."""
    monkeypatch.setattr(loader, "ENABLE_USER_MODULES", True)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_forward_kl_is_theirs(temperature: float, ratio: float) -> None:
    options = {"divergence": "forward_kl", "scale_by_t2": True, "temperature": temperature}
    ours, our_loss = steps({"_target_": OURS, **options}, ratio)
    theirs, their_loss = steps({"_target_": THEIRS, "temperature": temperature}, ratio)
    torch.testing.assert_close(our_loss, their_loss)
    for (name, mine), other in zip(
        ours.model_parts[0].named_parameters(), theirs.model_parts[0].parameters(), strict=True
    ):
        torch.testing.assert_close(mine.grad, other.grad, msg=name)


def test_fields_and_ignored_tokens() -> None:
    recipe, loss = steps({"_target_": OURS, "divergence": "adaptive_kl", "mu": 0.8})
    assert recipe.kd_loss_fn.divergence.mu == 0.8 and loss > 0
    _, other = steps({"_target_": OURS, "divergence": "adaptive_kl", "mu": 0.2})
    assert loss != other
    _, renamed = steps({"_target_": OURS, "mu": 0.8, "ignore_index": -1})
    torch.testing.assert_close(renamed, loss)

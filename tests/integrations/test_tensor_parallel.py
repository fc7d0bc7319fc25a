"""The loss of models whose lm_head is cut over ranks, in the place of that head: loss and gradients
are those of one process that has the whole models and sees all tokens, on every rank."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from akl_triton import SparseTeacher, distillation_loss, teacher_pairs
from akl_triton.integrations import describe_model, distillation_loss_of_models, in_place_of_head

pytest.importorskip("transformers")
from tests.support.ranks import Failed, Ranks
from tests.support.tiny_models import tiny_model

B, L, V = 2, 8, 109  # which four ranks have 28, 28, 28 and 25 columns of
IDS = torch.randint(5, 80, (B, L), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[0, :4] = LABELS[1, 6] = -100


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    processes = Ranks()
    yield processes
    processes.stop()


# ---- how a model is parallelised


class ByHand(ParallelStyle):
    """Tokens are sharded at the head as well; what becomes of the product is left to PyTorch."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        whole = module.get_parameter("weight").detach()
        rows = distribute_tensor(whole, mesh, [Shard(0)])
        module.register_parameter("weight", nn.Parameter(rows))

        def shard(_: nn.Module, inputs: Any) -> Any:
            hidden = DTensor.from_local(inputs[0], mesh, [Replicate()])
            return (hidden.redistribute(placements=[Shard(1)]),)

        module.register_forward_pre_hook(shard)
        return module


class PlainRows(ParallelStyle):
    """A parameter of this rank's rows, of which nothing shows that it is a part."""

    def _apply(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        whole = module.get_parameter("weight").detach()
        rows = whole.chunk(mesh.size())[mesh.get_local_rank()]
        module.register_parameter("weight", nn.Parameter(rows))
        return module


COLUMNS: dict[str, ParallelStyle] = {"lm_head": ColwiseParallel()}
GATHERED: dict[str, ParallelStyle] = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
LAYER: dict[str, ParallelStyle] = {
    **{f"self_attn.{x}_proj": ColwiseParallel() for x in "qkv"},
    "self_attn.o_proj": RowwiseParallel(),
    "mlp.gate_proj": ColwiseParallel(),
    "mlp.up_proj": ColwiseParallel(),
    "mlp.down_proj": RowwiseParallel(),
}
# Between attention and MLP each rank has a part of the sequence.
SEQUENCE_LAYER: dict[str, ParallelStyle] = {
    **LAYER,
    "input_layernorm": SequenceParallel(),
    "self_attn": PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": Shard(1)},
        desired_input_kwarg_layouts={"hidden_states": Replicate()},
    ),
    "self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
    "post_attention_layernorm": SequenceParallel(),
    "mlp": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
    "mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
}
EMBEDDING = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate())}


def of_layers(layer: dict[str, ParallelStyle]) -> dict[str, ParallelStyle]:
    return {f"model.layers.*.{name}": style for name, style in layer.items()}


PLANS: dict[str, dict[str, ParallelStyle]] = {
    "whole": {},
    "columns": COLUMNS,
    "DTensors": {"lm_head": ColwiseParallel(use_local_output=False)},
    "gathered": GATHERED,
    "gathered DTensors": {
        "lm_head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False)
    },
    "all": {**EMBEDDING, **of_layers(LAYER), **GATHERED},
    "sequence": {
        **EMBEDDING,
        "model.layers.0": PrepareModuleInput(
            input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True
        ),
        **of_layers(SEQUENCE_LAYER),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    },
    "by hand": {"lm_head": ByHand()},
    "rows of hidden": {"lm_head": RowwiseParallel(input_layouts=Replicate())},
    "logits of a part of the sequence": {"lm_head": ColwiseParallel(output_layouts=Shard(1))},
    "cut and not told": {"lm_head": PlainRows()},
}
RIGHT = ("columns", "DTensors", "gathered", "gathered DTensors", "all", "sequence", "by hand")


def parallel(model: Any, mesh: DeviceMesh, plan: str) -> Any:
    return parallelize_module(model, mesh, PLANS[plan])


# ---- loss and gradients


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


Result = tuple[Tensor, dict[str, Tensor]]


def in_one_process(student: Any, teacher: Any, **options: Any) -> Result:
    with torch.no_grad():
        logits = teacher(input_ids=IDS).logits
    loss = distillation_loss(
        student(input_ids=IDS).logits, logits, LABELS, **{"shift": 1, **options}
    )
    loss.sum().backward()
    return loss.detach(), gradients(student)


def on_ranks(student: Any, teacher: Any, **options: Any) -> Result:
    loss = distillation_loss_of_models(student, teacher, {"input_ids": IDS}, LABELS, **options)
    loss.sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    return loss.detach(), gradients(student)


def assert_same(results: list[Result], exact: Result, rtol: float = 1e-5) -> None:
    loss, by_name = exact
    largest = max(x.abs().max() for x in by_name.values())
    assert loss.sum() > 1e-3
    for of_rank, found in results:
        torch.testing.assert_close(of_rank, loss, rtol=rtol, atol=rtol)
        assert found.keys() == by_name.keys()
        for name, gradient in by_name.items():
            assert (found[name] - gradient).abs().max() <= 2 * rtol * largest, name


Model = tuple[str, dict[str, Any]]
LLAMA: Model = ("llama", {})


def of_plans(
    group: dist.ProcessGroup,
    ours: str,
    theirs: str,
    options: dict[str, Any],
    models: tuple[Model, Model] = (LLAMA, LLAMA),
    dtype: torch.dtype = torch.float32,
) -> Result:
    mesh = DeviceMesh.from_group(group, "cpu")
    student, teacher = pair_of(models, dtype)
    return on_ranks(parallel(student, mesh, ours), parallel(teacher, mesh, theirs), **options)


def pair_of(
    models: tuple[Model, Model] = (LLAMA, LLAMA), dtype: torch.dtype = torch.float32
) -> tuple[Any, Any]:
    (ours, arguments), (theirs, of_teacher) = models
    student = tiny_model(ours, **{"vocab_size": V, **arguments}).train()
    teacher = tiny_model(theirs, seed=1, **{"vocab_size": V, "hidden_size": 64, **of_teacher})
    return student.to(dtype), teacher.to(dtype)


@pytest.fixture(scope="module")
def exact() -> Result:
    return in_one_process(*pair_of())


@pytest.mark.parametrize("plan", RIGHT)
def test_plans(ranks: Ranks, exact: Result, plan: str) -> None:
    """The teacher is parallelised as the student is."""
    assert_same(ranks.run(4, of_plans, plan, plan, {}), exact)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("gathered", "whole"),
        ("sequence", "whole"),
        ("by hand", "columns"),
        ("columns", "sequence"),
        ("whole", "gathered"),
        ("whole", "sequence"),
    ],
)
def test_sides_that_are_parallelised_unlike(
    ranks: Ranks, exact: Result, ours: str, theirs: str
) -> None:
    """Including one side that every rank has whole."""
    assert_same(ranks.run(2, of_plans, ours, theirs, {}), exact)


def pairs_of(teacher: Any) -> SparseTeacher:
    with torch.no_grad():
        return teacher_pairs(teacher(input_ids=IDS).logits, 16)


def of_pairs(group: dist.ProcessGroup, plan: str) -> Result:
    student, teacher = pair_of()
    student = parallel(student, DeviceMesh.from_group(group, "cpu"), plan)
    loss = distillation_loss_of_models(student, pairs_of(teacher), {"input_ids": IDS}, LABELS)
    loss.backward()
    return loss.detach(), gradients(student)


@pytest.mark.parametrize("plan", ["gathered", "sequence"])
def test_a_teacher_that_is_pairs(ranks: Ranks, plan: str) -> None:
    student, teacher = pair_of()
    logits = student(input_ids=IDS).logits
    loss = distillation_loss(logits, pairs_of(teacher), LABELS, shift=1)
    loss.backward()
    assert_same(ranks.run(4, of_pairs, plan), (loss.detach(), gradients(student)))


def of_transformers(group: dist.ProcessGroup, folder: str, tied: bool) -> Result:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import configuration_utils

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(
            f"{folder}/{side}",
            distributed_config=configuration_utils.DistributedConfig(tp_size=group.size()),
        )
        for side in ("student", "teacher")
    )
    assert isinstance(student.lm_head.weight, DTensor)
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    return on_ranks(student.train(), teacher)


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_the_plan_of_transformers(ranks: Ranks, tmp_path: Path, tied: bool) -> None:
    """Whose styles replace the forward of a module; a weight may be that of the embeddings."""
    pytest.importorskip("transformers.distributed.mixin")  # the older ones had other DTensors
    arguments = {"tie_word_embeddings": tied}
    student, teacher = pair_of((("llama", arguments), LLAMA))
    student.save_pretrained(tmp_path / "student")
    teacher.save_pretrained(tmp_path / "teacher")
    results = ranks.run(4, of_transformers, str(tmp_path), tied)
    assert_same(results, in_one_process(student, teacher))


OPTIONS: dict[str, dict[str, Any]] = {
    "labels": {"divergence": "forward_kl", "kd_ratio": 0.3, "temperature": 2.0},
    "none": {"reduction": "none", "divergence": "jensen_shannon"},
    "sum, chunks": {"reduction": "sum", "shift": 2, "chunk_bytes": 4 * 4 * 2 * V},
    "num_items": {"num_items": 31},
}
# A bias; a softcap; a scale; logits without the padding of the weight, which ends on the last rank
# or leaves it nothing.
MODELS: dict[str, Model] = {
    "phi": ("phi", {}),
    "gemma2": ("gemma2", {"tie_word_embeddings": False}),
    "granite": ("granite", {"tie_word_embeddings": False}),
    "inkling2_text": ("inkling2_text", {}),
    "inkling2_text, 80 of 109": ("inkling2_text", {"unpadded_vocab_size": 80}),
}


@pytest.mark.parametrize(
    ("model", "options"),
    [*((x, OPTIONS["labels"]) for x in MODELS.values()), *((LLAMA, x) for x in OPTIONS.values())],
    ids=[*MODELS, *OPTIONS],
)
def test_options(ranks: Ranks, model: Model, options: dict[str, Any]) -> None:
    models = model, model
    exact = in_one_process(
        *pair_of(models), **{k: x for k, x in options.items() if k != "chunk_bytes"}
    )
    assert_same(ranks.run(4, of_plans, "gathered", "gathered", options, models), exact)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("columns", "gathered"), ("columns", "whole"), ("whole", "gathered")]
)
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((V, V + 51), {"vocab_size": 100}),
        *((x, {"same_vocabulary": False}) for x in [(V, V + 51), (V + 51, V - 8), (V - 8, V + 51)]),
    ],
    ids=str,
)
def test_vocabularies_of_other_sizes(
    ranks: Ranks, ours: str, theirs: str, sizes: tuple[int, int], options: dict[str, Any]
) -> None:
    """The teacher's rows are cut elsewhere than the student's."""
    student, teacher = (("llama", {"vocab_size": size}) for size in sizes)
    models: tuple[Model, Model] = student, teacher
    known = {k: x for k, x in options.items() if k != "same_vocabulary"}
    exact = in_one_process(*pair_of(models), **known)
    assert_same(ranks.run(4, of_plans, ours, theirs, options, models), exact)


@pytest.mark.parametrize("plan", ["gathered", "all"])
def test_bf16(ranks: Ranks, plan: str) -> None:
    exact = in_one_process(*pair_of(dtype=torch.bfloat16))
    results = ranks.run(4, of_plans, plan, plan, {}, (LLAMA, LLAMA), torch.bfloat16)
    assert_same(results, exact, rtol=2e-2)


def statistics(group: dist.ProcessGroup) -> Any:
    mesh = DeviceMesh.from_group(group, "cpu")
    student, teacher = (parallel(model, mesh, "all") for model in pair_of())
    inputs = {"input_ids": IDS}
    return tuple(
        distillation_loss_of_models(student, teacher, inputs, LABELS, return_stats=True)[1]
    )


def test_statistics(ranks: Ranks) -> None:
    student, teacher = (model(input_ids=IDS).logits.detach() for model in pair_of())
    _, stats = distillation_loss(student, teacher, LABELS, shift=1, return_stats=True)
    for of_rank in ranks.run(4, statistics):
        for found, expected in zip(of_rank, stats, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def of_fsdp(group: dist.ProcessGroup, plan: str, resharded: bool) -> Result:
    """Of the second step, with the parameters as the first has left them."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    student, teacher = pair_of()
    for model in (student, teacher):
        parallel(model, mesh["vocabulary"], plan)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"], reshard_after_forward=resharded)
    own = [mesh.get_local_rank("data")]
    inputs, count = {"input_ids": IDS[own]}, (LABELS[:, 1:] != -100).sum()
    for _ in range(2):
        student.zero_grad()
        loss = distillation_loss_of_models(
            student, teacher, inputs, LABELS[own], num_items=count / 2
        )
        loss.backward()
    mean = loss.detach() / 2
    dist.all_reduce(mean, group=mesh.get_group("data"))
    return mean, gradients(student)


@pytest.mark.parametrize(
    ("plan", "resharded"), [("gathered", True), ("all", False), ("sequence", True)]
)
def test_fsdp2(ranks: Ranks, exact: Result, plan: str, resharded: bool) -> None:
    """On a mesh of data x vocabulary: each pair of ranks has one sequence of the batch."""
    assert_same(ranks.run(4, of_fsdp, plan, resharded), exact)


def of_shared_embeddings(group: dist.ProcessGroup) -> Result:
    mesh = DeviceMesh.from_group(group, "cpu")
    student, teacher = pair_of((("llama", {"tie_word_embeddings": True}), LLAMA))
    parallel(student, mesh, "all")
    student.lm_head.weight = student.model.embed_tokens.weight  # parallelize_module parts them
    assert describe_model(student).tied
    return on_ranks(student, parallel(teacher, mesh, "all"))


def test_a_weight_that_is_the_embeddings(ranks: Ranks) -> None:
    exact = in_one_process(*pair_of((("llama", {"tie_word_embeddings": True}), LLAMA)))
    assert_same(ranks.run(4, of_shared_embeddings), exact)


# ---- what is found, and what is refused


def described(group: dist.ProcessGroup, model: Model, plan: str) -> tuple[Any, Tensor]:
    mesh = DeviceMesh.from_group(group, "cpu")
    student = parallel(pair_of((model, model))[0], mesh, plan).eval()
    info = describe_model(student)
    with torch.no_grad(), in_place_of_head(student, lambda *parts: parts):
        parts = student(input_ids=IDS)
        return info, whole(info.logits(*parts))


@pytest.mark.parametrize(
    ("model", "plan"),
    [(LLAMA, "columns"), (MODELS["phi"], "DTensors"), (MODELS["gemma2"], "gathered")],
    ids=["columns", "DTensors", "gathered"],
)
def test_description(ranks: Ranks, model: Model, plan: str) -> None:
    """It is that of the whole model, and the logits of the parts are the model's."""
    student = pair_of((model, model))[0].eval()
    info = describe_model(student)
    for of_rank, logits in ranks.run(4, described, model, plan):
        assert dataclasses.replace(of_rank, error=0.0) == dataclasses.replace(info, error=0.0)
        assert of_rank.error <= 1e-6
        torch.testing.assert_close(logits, student(input_ids=IDS).logits)


def described_before(group: dist.ProcessGroup, plan: str) -> Result:
    student, teacher = pair_of()
    describe_model(student)
    mesh = DeviceMesh.from_group(group, "cpu")
    return on_ranks(parallel(student, mesh, plan), parallel(teacher, mesh, plan))


def test_a_model_that_was_parallelised_since_is_described_anew(ranks: Ranks, exact: Result) -> None:
    assert_same(ranks.run(2, described_before, "gathered"), exact)
    for result in ranks.call(2, described_before, "logits of a part of the sequence"):
        assert isinstance(result, Failed) and result.text.startswith("student: expected logits")


def with_adapters(group: dist.ProcessGroup) -> Result:
    peft = pytest.importorskip("peft")
    student, teacher = pair_of()
    parallel(student, DeviceMesh.from_group(group, "cpu"), "gathered")
    lora = peft.LoraConfig(r=4, target_modules=["lm_head"])
    return on_ranks(peft.get_peft_model(student, lora), teacher)


def of_other_ranks(group: dist.ProcessGroup) -> Result:
    student, teacher = pair_of()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("one", "other"))
    return on_ranks(
        parallel(student, mesh["one"], "gathered"), parallel(teacher, mesh["other"], "gathered")
    )


HEAD = "expected an lm_head whose weight is whole within the forward, or a DTensor"


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            of_plans,
            ("rows of hidden", "whole", {}),
            rf"student: {HEAD} .* got \(Shard\(dim=1\),\) of lm_head of LlamaForCausalLM",
        ),
        (of_plans, ("whole", "rows of hidden", {}), f"teacher: {HEAD}"),
        (
            of_plans,
            ("cut and not told", "whole", {}),
            rf"student: {HEAD} .* got 28 of 109 rows of lm_head",
        ),
        (
            of_plans,
            ("logits of a part of the sequence", "whole", {}),
            r"student: expected logits \[1, 8, 109\] of the lm_head lm_head, which is sharded as "
            r"\(Shard\(dim=2\),\), whole or \[1, 8, 28\] of them on this rank, or a DTensor, got "
            r"\[1, 2, 109\] from LlamaForCausalLM",
        ),
        (with_adapters, (), f"student: {HEAD} .* with an adapter of LoRA of lm_head"),
        (
            of_other_ranks,
            (),
            "teacher: expected an lm_head that is whole, or sharded over the ranks of the",
        ),
    ],
    ids=["rows", "teacher", "plain", "sequence", "adapters", "other ranks"],
)
def test_what_is_refused(
    ranks: Ranks, function: Callable[..., Any], arguments: tuple[Any, ...], message: str
) -> None:
    for rank, result in enumerate(ranks.call(4, function, *arguments)):
        assert isinstance(result, Failed), result
        assert result.error == "ValueError", result.trace
        if rank == 0:
            assert re.match(message, result.text), result.trace

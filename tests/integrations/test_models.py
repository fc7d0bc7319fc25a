"""The loss of two models, and the gradient of every parameter, are those of their whole logits."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

from akl_triton import ForwardKL, SparseTeacher, distillation_loss, teacher_pairs
from akl_triton.integrations import check_vocabularies, distillation_loss_of_models, models

pytest.importorskip("transformers")
from tests.support.tiny_models import VOCABULARY, tiny_model

B, L = 2, 8
IDS = torch.randint(5, 90, (B, L), generator=torch.Generator().manual_seed(0))
LABELS = IDS.clone()
LABELS[0, :4] = LABELS[1, 6] = -100
MASK = torch.ones(B, L, dtype=torch.bool)
MASK[1, 2:4] = False
WEIGHTS = torch.linspace(0.1, 2.0, B * L).view(B, L)
PADDED = torch.ones(B, L, dtype=torch.long)
PADDED[0, :3] = PADDED[1, 6:] = 0


def student_and_teacher(model_type: str = "gemma2") -> tuple[Any, Any]:
    return tiny_model(model_type), tiny_model(model_type, seed=1, hidden_size=64)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(
    student: Any, ours: Tensor, expected: Tensor, rtol: float = 1e-5, base: Any = None
) -> None:
    """Loss and gradients, the second of which are in `base` where that is not the student."""
    torch.testing.assert_close(ours.detach(), expected.detach(), rtol=rtol, atol=0.0)
    expected.sum().backward()
    theirs = gradients(student)
    student.zero_grad()
    ours.sum().backward()
    found = gradients(student)
    student.zero_grad()
    assert found.keys() == theirs.keys() and theirs
    largest = max(x.abs().max() for x in theirs.values())
    for name, exact in theirs.items():
        assert (found[name] - exact).abs().max() <= 2 * rtol * largest, name


def loss_of_logits(
    student: Any, teacher: Any, inputs: dict[str, Any], labels: Tensor | None, **options: Any
) -> Any:
    with torch.no_grad():
        logits = teacher(**inputs).logits
    return distillation_loss(student(**inputs).logits, logits, labels, **options)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "phi", "inkling2_text"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"divergence": "jensen_shannon", "temperature": 2.0, "scale_by_t2": True},
        {"divergence": ForwardKL(), "kd_ratio": 0.3},
        {"mask": MASK, "token_weights": WEIGHTS},
        {"num_items": 31},
        {"num_items": torch.tensor(31)},
        {"reduction": "none"},
        {"reduction": "sum", "shift": 2},
        {"ignore_index": 7},
        {"chunk_bytes": 4 * 4 * 2 * VOCABULARY},
    ],
    ids=lambda options: "-".join(options),
)
def test_options(model_type, options):
    student, teacher = student_and_teacher(model_type)
    inputs = {"input_ids": IDS, "attention_mask": PADDED}
    ours = distillation_loss_of_models(student, teacher, inputs, LABELS, **options)
    options.pop("chunk_bytes", None)
    options.setdefault("shift", 1)
    assert_same_training(student, ours, loss_of_logits(student, teacher, inputs, LABELS, **options))
    assert all(p.grad is None for p in teacher.parameters())


def test_labels_are_also_taken_from_the_inputs():
    student, teacher = student_and_teacher()
    ours = distillation_loss_of_models(student, teacher, {"input_ids": IDS, "labels": LABELS})
    expected = loss_of_logits(student, teacher, {"input_ids": IDS}, LABELS, shift=1)
    assert_same_training(student, ours, expected)
    assert expected != distillation_loss_of_models(student, teacher, {"input_ids": IDS})


@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["", "token_weights"])
def test_without_labels_the_tokens_count_that_are_no_padding(weights):
    student, teacher = student_and_teacher()
    inputs = {"input_ids": IDS, "attention_mask": PADDED}
    options = {} if weights is None else {"token_weights": weights}
    ours = distillation_loss_of_models(student, teacher, inputs, **options)
    counts = torch.zeros(B, L, dtype=torch.bool)
    counts[0, 3:7] = counts[1, :5] = True
    moved = {} if weights is None else {"token_weights": weights.roll(-1, 1)}
    expected = loss_of_logits(student, teacher, inputs, None, mask=counts, **moved)
    assert_same_training(student, ours, expected)
    ours = distillation_loss_of_models(student, teacher, {"input_ids": IDS}, shift=0)
    expected = loss_of_logits(student, teacher, {"input_ids": IDS}, None)
    assert_same_training(student, ours, expected)


def test_a_mask_alone():
    student, teacher = student_and_teacher()
    ours = distillation_loss_of_models(student, teacher, {"input_ids": IDS}, mask=MASK)
    expected = loss_of_logits(student, teacher, {"input_ids": IDS}, None, mask=MASK, shift=1)
    assert_same_training(student, ours, expected)


def test_inputs_embeds():
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1)
    inputs = {"inputs_embeds": torch.randn(B, L, 32)}
    ours = distillation_loss_of_models(student, teacher, inputs, LABELS)
    expected = loss_of_logits(student, teacher, inputs, LABELS, shift=1)
    assert_same_training(student, ours, expected)
    with pytest.raises(ValueError, match=r"^labels: expected labels or a mask with inputs that"):
        distillation_loss_of_models(student, teacher, inputs)


KEPT = torch.zeros(B, L, dtype=torch.bool)
KEPT[0, 2:5] = KEPT[1, 4] = True


@pytest.mark.parametrize(
    ("keep", "positions"),
    [
        (3, (slice(None), slice(-3, None))),
        (0, (slice(None),)),
        (torch.tensor([1, 4, 7]), (slice(None), [1, 4, 7])),
        (torch.tensor([[1, 4], [0, 6]]), ([[0], [1]], [[1, 4], [0, 6]])),
        (KEPT, (KEPT,)),
    ],
    ids=["last", "all", "the same", "of each", "mask"],
)
def test_logits_to_keep(keep, positions):
    student, teacher = student_and_teacher("llama")
    inputs = {"input_ids": IDS, "logits_to_keep": keep}
    options: dict[str, Any] = {"mask": MASK, "token_weights": WEIGHTS, "reduction": "none"}
    ours = distillation_loss_of_models(student, teacher, inputs, LABELS, **options)
    whole = loss_of_logits(student, teacher, {"input_ids": IDS}, LABELS, shift=1, **options)
    assert_same_training(student, ours, whole[positions])


def pairs_of(teacher: Any, k: int, temperature: float = 1.0, ids: Tensor = IDS) -> SparseTeacher:
    with torch.no_grad():
        return teacher_pairs(teacher(input_ids=ids).logits, k, temperature)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "phi"])
def test_pairs_in_the_place_of_the_teacher(model_type):
    """With as many pairs as there are tokens they are the teacher; with fewer, the loss is that of
    the student's whole logits and of the pairs."""
    student, teacher = student_and_teacher(model_type)
    size = teacher(input_ids=IDS).logits.shape[-1]
    options: dict[str, Any] = {"temperature": 2.0, "kd_ratio": 0.7}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    pairs = pairs_of(teacher, size, 2.0)
    ours = distillation_loss_of_models(student, pairs, inputs, LABELS, **options)
    expected = loss_of_logits(student, teacher, inputs, LABELS, shift=1, **options)
    assert_same_training(student, ours, expected)
    pairs = pairs_of(teacher, 5, 2.0)
    ours = distillation_loss_of_models(student, pairs, inputs, LABELS, **options)
    logits = student(input_ids=IDS).logits
    expected = distillation_loss(logits, pairs, LABELS, shift=1, **options)
    assert_same_training(student, ours, expected)


@pytest.mark.parametrize(
    ("keep", "positions"),
    [
        (3, (slice(None), slice(-3, None))),
        (torch.tensor([1, 4, 7]), (slice(None), [1, 4, 7])),
        (torch.tensor([[1, 4], [0, 6]]), ([[0], [1]], [[1, 4], [0, 6]])),
        (KEPT, (KEPT,)),
    ],
    ids=["last", "the same", "of each", "mask"],
)
def test_pairs_of_the_positions_that_are_kept(keep, positions):
    student, teacher = student_and_teacher("llama")
    pairs = pairs_of(teacher, 5)
    inputs = {"input_ids": IDS, "logits_to_keep": keep}
    ours = distillation_loss_of_models(student, pairs, inputs, LABELS, reduction="none")
    logits = student(input_ids=IDS).logits
    whole = distillation_loss(logits, pairs, LABELS, shift=1, reduction="none")
    assert_same_training(student, ours, whole[positions])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokenizers": (1, 2)}, r"^tokenizers: expected None with a teacher that is pairs"),
        ({"same_vocabulary": False}, r"^same_vocabulary: expected True with a teacher that is"),
        ({"temperature": 2.0}, r"^temperature: expected 1, that of the teacher's pairs"),
        ({"inputs": {"input_ids": IDS[:, :4]}}, r"^teacher: expected pairs \[2, 4\], of every"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_pairs_that_do_not_fit(given, message):
    student, teacher = student_and_teacher("llama")
    given = {"inputs": {"input_ids": IDS}, **given}
    with pytest.raises(ValueError, match=message):
        distillation_loss_of_models(student, pairs_of(teacher, 5), **given)


def test_statistics():
    student, teacher = student_and_teacher()
    loss, stats = distillation_loss_of_models(
        student, teacher, {"input_ids": IDS}, LABELS, return_stats=True
    )
    expected, theirs = loss_of_logits(
        student, teacher, {"input_ids": IDS}, LABELS, shift=1, return_stats=True
    )
    for name, ours, exact in zip(theirs._fields, stats, theirs, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    assert_same_training(student, loss, expected)


def test_micro_batches_sum_to_the_step():
    student, teacher = student_and_teacher()
    count = int((LABELS[:, 1:] != -100).sum())
    expected = loss_of_logits(student, teacher, {"input_ids": IDS}, LABELS, shift=1)
    micro = [
        distillation_loss_of_models(
            student, teacher, {"input_ids": IDS[[i]]}, LABELS[[i]], num_items=count
        )
        for i in range(B)
    ]
    assert_same_training(student, micro[0] + micro[1], expected)


# ---- the models as a trainer has them


def test_the_kv_cache_is_left_out():
    student, teacher = student_and_teacher("llama")
    seen = []
    for model in (student, teacher):
        model.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs.get("past_key_values")), with_kwargs=True
        )
    distillation_loss_of_models(student, teacher, {"input_ids": IDS}, LABELS)
    assert len(seen) >= 2 and all(x is None for x in seen)


def test_a_model_is_described_once():
    student, teacher = student_and_teacher("llama")
    runs = []
    student.register_forward_pre_hook(lambda *_: runs.append("student"))
    teacher.register_forward_pre_hook(lambda *_: runs.append("teacher"))
    for _ in range(2):
        distillation_loss_of_models(student, teacher, {"input_ids": IDS}, LABELS)
    assert sorted(runs) == ["student"] * 4 + ["teacher"] * 4
    student.lm_head = nn.Linear(32, VOCABULARY)  # another head has to be looked at again
    distillation_loss_of_models(student, teacher, {"input_ids": IDS}, LABELS)
    assert len(runs) == 8 + 4


def test_gradient_checkpointing():
    student, teacher = student_and_teacher("llama")
    inputs = {"input_ids": IDS}
    expected = loss_of_logits(student, teacher, inputs, LABELS, shift=1)
    student.train().gradient_checkpointing_enable({"use_reentrant": False})
    ran = []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(0))
    ours = distillation_loss_of_models(student, teacher, inputs, LABELS)
    before = len(ran)
    assert_same_training(student, ours, expected)
    assert len(ran) == before + 1  # once more, in backward


@pytest.mark.parametrize("half", ["autocast", "weights"])
def test_bf16(half):
    student, teacher = student_and_teacher()
    inputs = {"input_ids": IDS}
    if half == "weights":
        student, teacher = student.bfloat16(), teacher.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
        ours = distillation_loss_of_models(student, teacher, inputs, LABELS)
        expected = loss_of_logits(student, teacher, inputs, LABELS, shift=1)
    assert ours.dtype == torch.float32
    assert_same_training(student, ours, expected, rtol=2e-2)


def test_a_teacher_on_another_device():
    """As a device_map or accelerate's hooks have it: its weights come when they are needed."""
    from accelerate import cpu_offload

    student, teacher = student_and_teacher()
    inputs = {"input_ids": IDS}
    expected = loss_of_logits(student, teacher, inputs, LABELS, shift=1)
    offloaded = cpu_offload(teacher, execution_device=torch.device("cpu"))
    assert_same_training(
        student, distillation_loss_of_models(student, offloaded, inputs, LABELS), expected
    )


def with_adapters(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    given = {"r": 4, "target_modules": ["lm_head", "q_proj"], **options}
    model = peft.get_peft_model(model, peft.LoraConfig(**given))
    g = torch.Generator().manual_seed(4)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(generator=g)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_dropout": 0.5},
        {"lora_bias": True, "target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_adapters_on_the_head_are_trained(options):
    student = with_adapters(tiny_model("phi"), **options).train()
    teacher = tiny_model("phi", seed=1)
    torch.manual_seed(5)  # of the dropout
    ours = distillation_loss_of_models(student, teacher, {"input_ids": IDS}, LABELS)
    torch.manual_seed(5)
    expected = loss_of_logits(student, teacher, {"input_ids": IDS}, LABELS, shift=1)
    assert_same_training(student, ours, expected)
    trained = [name for name, p in student.named_parameters() if p.requires_grad]
    assert any("lm_head" in name for name in trained)


@pytest.mark.parametrize("lora", [False, True], ids=["", "lora"])
def test_under_torch_compile(lora):
    """The loss is in the one graph of the student, which further steps use again."""
    student, teacher = student_and_teacher("gemma2")
    if lora:
        student = with_adapters(student)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled: Any = torch.compile(student, backend="aot_eager", fullgraph=True)
    for shift in (0, 5):
        inputs = {"input_ids": IDS + shift}
        ours = distillation_loss_of_models(compiled, teacher, inputs, LABELS)
        expected = loss_of_logits(student, teacher, inputs, LABELS, shift=1)
        assert_same_training(student, ours, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- data parallel


def test_distributed_data_parallel_reduces_every_gradient(tmp_path):
    """In one process: each gradient passes through the reducer, that of the lm_head as well."""
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        student, teacher = student_and_teacher("phi")
        replicated = nn.parallel.DistributedDataParallel(student)
        reduced: list[int] = []

        def hook(_, bucket):  # DDP reads annotations
            reduced.append(sum(p.numel() for p in bucket.parameters()))
            future: Any = torch.futures.Future()
            future.set_result(2.0 * bucket.buffer())
            return future

        replicated.register_comm_hook(None, hook)
        loss = distillation_loss_of_models(replicated, teacher, {"input_ids": IDS}, LABELS)
        loss.backward()
        ours = gradients(student)
        student.zero_grad()
        loss_of_logits(student, teacher, {"input_ids": IDS}, LABELS, shift=1).backward()
        assert sum(reduced) == sum(p.numel() for p in student.parameters())
        for name, exact in gradients(student).items():
            torch.testing.assert_close(ours[name], 2.0 * exact, rtol=1e-4, atol=1e-6)
    finally:
        dist.destroy_process_group()


def students() -> dict[str, Any]:
    """By how their parameters are distributed."""
    names = ("DDP", "FSDP2", "FSDP2, resharded", "FSDP2, head apart")
    made: dict[str, Any] = {name: tiny_model("phi").train() for name in names}
    made["DDP, LoRA"] = with_adapters(tiny_model("phi")).train()
    made["FSDP2, LoRA"] = with_adapters(tiny_model("phi")).train()
    return made


def train_in_parallel(rank: int, folder: str) -> None:
    """Gradients of two processes, each with one sequence of the batch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))

    def shard(how: str, model: Any) -> Any:
        base = model.get_base_model() if hasattr(model, "peft_config") else model
        for layer in base.model.layers:
            fully_shard(layer, mesh=mesh)
        if "apart" in how:
            fully_shard(base.lm_head, mesh=mesh)
        return fully_shard(model, mesh=mesh, reshard_after_forward="resharded" in how)

    results = {}
    for how, student in students().items():
        teacher = tiny_model("phi", seed=1)
        if "DDP" in how:
            wrapped = nn.parallel.DistributedDataParallel(student)
        else:
            wrapped, teacher = shard(how, student), shard(how, teacher)
        for _ in range(2):  # the second with the parameters as the first has left them
            student.zero_grad()
            loss = distillation_loss_of_models(
                wrapped, teacher, {"input_ids": IDS[[rank]]}, LABELS[[rank]], num_items=5.0
            )
            loss.backward()
        results[how] = {
            name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            for name, gradient in gradients(student).items()
        }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Each has the gradient of the mean over both, with every wrapper."""
    pytest.importorskip("peft")
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        train_in_parallel, (str(tmp_path),), nprocs=2
    )
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for how, student in students().items():
        teacher = tiny_model("phi", seed=1)
        options = {"shift": 1, "num_items": 10.0}
        loss_of_logits(student, teacher, {"input_ids": IDS}, LABELS, **options).backward()
        exact = gradients(student)
        largest = max(x.abs().max() for x in exact.values())
        for results in found:
            assert results[how].keys() == exact.keys(), how
            for name, gradient in exact.items():
                assert (results[how][name] - gradient).abs().max() <= 2e-5 * largest, (how, name)


# ---- vocabularies


class Tokenizer:
    """The part of a tokenizer that is looked at."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def get_vocab(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}


def test_more_ids_on_one_side_are_refused():
    student, teacher = tiny_model("llama"), tiny_model("llama", seed=1, vocab_size=100)
    inputs = {"input_ids": IDS}
    with pytest.raises(
        ValueError,
        match=r"^teacher: expected the vocabulary of the student, 112 logits, got 100: the ids 100 "
        r"to 111 are the student's alone; .* pass same_vocabulary=False",
    ):
        distillation_loss_of_models(student, teacher, inputs, LABELS)
    with pytest.raises(ValueError, match="got 112: the ids 100 to 111 are the teacher's alone"):
        distillation_loss_of_models(teacher, student, inputs, LABELS)
    ours = distillation_loss_of_models(student, teacher, inputs, LABELS, same_vocabulary=False)
    expected = loss_of_logits(student, teacher, inputs, LABELS, shift=1)
    assert_same_training(student, ours, expected)


def test_other_tokens_of_the_same_ids_are_refused():
    student, teacher = student_and_teacher("llama")
    inputs = {"input_ids": IDS}
    one, other = Tokenizer("a", "b", "c", "d"), Tokenizer("a", "B", "c", "D", "e")
    message = r"^tokenizers: .* got others for 3: 1 \('b' and 'B'\), 3 \('d' and 'D'\), 4 \(None"
    with pytest.raises(ValueError, match=message):
        distillation_loss_of_models(student, teacher, inputs, LABELS, tokenizers=(one, other))
    same = one, Tokenizer("a", "b", "c", "d")
    loss = distillation_loss_of_models(student, teacher, inputs, LABELS, tokenizers=same)
    assert loss == distillation_loss_of_models(student, teacher, inputs, LABELS)
    one.tokens += ("E",)  # as add_tokens does
    with pytest.raises(ValueError, match=r"got others for 1: 4 \('E' and None\)"):
        distillation_loss_of_models(student, teacher, inputs, LABELS, tokenizers=same)


def test_ids_that_one_side_does_not_have_need_no_token():
    one, other = Tokenizer("a", "b"), Tokenizer("a", "b", "c")
    check_vocabularies(2, 3, (one, other), same_vocabulary=False)
    with pytest.raises(ValueError, match="got others for 1: 2"):
        check_vocabularies(3, 3, (one, other), same_vocabulary=False)
    with pytest.raises(TypeError, match=r"^tokenizers: expected the pair .* got .*Tokenizer$"):
        check_vocabularies(2, 2, one)  # type: ignore[arg-type]


# ---- bad input


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"labels": LABELS[:, 1:]}, ValueError, r"labels: expected shape \[2, 8\], that of input"),
        ({"mask": MASK[:1]}, ValueError, r"mask: expected shape \[2, 8\], that of input_ids, got"),
        ({"labels": [1]}, TypeError, "labels: expected a torch.Tensor, got list"),
        ({"shift": -1}, ValueError, "shift: expected an integer >= 0, got -1"),
        ({"divergence": "kl"}, ValueError, "divergence: expected"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
        (
            {"student_softcap": 3.0},
            TypeError,
            "distillation_loss_of_models: expected options among",
        ),
        ({"same_vocabulary": 1}, TypeError, "same_vocabulary: expected True or False, got int"),
        ({"return_stats": 1}, TypeError, "return_stats: expected True or False, got int"),
        ({"teacher": nn.Linear(2, 2)}, TypeError, "teacher: expected a causal language model"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_input(options, kind, message):
    student, teacher = student_and_teacher("llama")
    given = {"student": student, "teacher": teacher, "inputs": {"input_ids": IDS}, **options}
    with pytest.raises(kind, match=f"^{message}"):
        distillation_loss_of_models(**given)


def test_examples_of_the_docstrings():
    results = doctest.testmod(models)
    assert results.attempted > 0 and results.failed == 0

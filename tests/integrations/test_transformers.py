"""A Trainer with the loss of a teacher trains as a plain loop over whole logits does.

AdamW divides by the size of a gradient, so that a factor of the loss would not show: its epsilon
is far above these gradients, and shows it.
"""

from __future__ import annotations

import copy
import doctest
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from akl_triton import AdaptiveKL, DivergenceStats, distillation_loss
from akl_triton.integrations import distillation_loss_of_models

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
import accelerate
import transformers
from safetensors import safe_open

from akl_triton.integrations import transformers as trainers
from akl_triton.integrations.transformers import DistillationMixin, DistillationTrainer
from tests.support.cases import DIVERGENCES
from tests.support.tiny_models import VOCABULARY, tiny_model

ROOT = Path(__file__).resolve().parents[2]
L = 8
RATE, EPSILON = 1e-2, 1e-1
STATISTICS = set(DivergenceStats._fields) - {"cross_entropy"}  # of adaptive KL alone


def dataset(sequences: int = 12) -> list[dict[str, Tensor]]:
    """Sequences of equal length, of which 0 to 8 tokens have labels."""
    ids = torch.randint(5, 90, (sequences, L), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    for i in range(sequences):
        labels[i, : 5 * i % 9] = -100
    return [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]


def batch(sequences: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    listed = list(sequences)
    return {name: torch.stack([x[name] for x in listed]) for name in ("input_ids", "labels")}


def student_and_teacher(model_type: str = "llama", **arguments: Any) -> tuple[Any, Any]:
    teacher = tiny_model(model_type, seed=1, hidden_size=64)
    return tiny_model(model_type, **arguments), teacher.train()  # the Trainer has to evaluate it


def arguments(folder: Any, **given: Any) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": RATE,
        "adam_epsilon": EPSILON,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return transformers.TrainingArguments(**{**defaults, **given})


def trainer_of(student: Any, teacher: Any, args: Any, **given: Any) -> Any:
    given.setdefault("train_dataset", dataset())
    trainer = DistillationTrainer(student, args, teacher_model=teacher, **given)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def loss_of_logits(student: Any, teacher: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    with torch.no_grad():
        logits = teacher.eval()(input_ids=inputs["input_ids"]).logits
    return distillation_loss(
        student(input_ids=inputs["input_ids"]).logits, logits, inputs["labels"], shift=1, **options
    )


def train_plainly(
    student: Any,
    teacher: Any,
    steps: int = 3,
    sequences: Any = None,
    autocast: bool = False,
    groups: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),),
    **options: Any,
) -> list[dict[str, Any]]:
    """Steps of four sequences, the mean over the tokens of each group of them; of each step the
    loss, and the statistics of its tokens."""
    student.train()
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, eps=EPSILON, weight_decay=0.0)
    history = []
    for step in range(steps):
        of_step = (sequences or dataset())[4 * step : 4 * step + 4]
        loss, statistics = torch.zeros(()), []
        for group in groups:
            inputs = batch(of_step[i] for i in group)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                part, stats = loss_of_logits(student, teacher, inputs, return_stats=True, **options)
            loss = loss + part / len(groups)
            valid = inputs["labels"][:, 1:] != -100
            statistics.append([x[:, :-1][valid] for x in stats])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens = map(torch.cat, zip(*statistics, strict=True))
        named = dict(zip(DivergenceStats._fields, tokens, strict=True))
        history.append({"loss": loss.item(), "tokens": named})
    return history


def assert_same_parameters(ours: nn.Module, expected: nn.Module, atol: float = 1e-5) -> None:
    parameters = dict(expected.named_parameters())
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, parameters[name], rtol=0.0, atol=atol, msg=name)


def logs_of_training(trainer: Any) -> list[dict[str, float]]:
    return [logs for logs in trainer.state.log_history if "loss" in logs]


def assert_same_training(
    trainer: Any, ours: Any, expected: Any, teacher: Any, atol: float = 1e-5, **options: Any
) -> None:
    """The trainer of ours, and a plain loop that trains the same model, expected."""
    before = copy.deepcopy(expected)
    trainer.train()
    history = train_plainly(expected, teacher, steps=trainer.args.max_steps, **options)
    moved = max((p - q).abs().max() for p, q in _pairs(expected, before))
    assert moved > 20 * atol  # or the comparison would say nothing
    assert_same_parameters(ours, expected, atol)
    losses = [logs["loss"] for logs in logs_of_training(trainer)]
    assert losses == pytest.approx([step["loss"] for step in history], rel=max(1e-4, atol))


def _pairs(one: nn.Module, other: nn.Module) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(one.parameters(), other.parameters(), strict=True)


# ---- training


@pytest.mark.parametrize("size", [4, 2, 1])
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {}),
        ("llama", {"divergence": "jensen_shannon", "kd_ratio": 0.3, "temperature": 2.0}),
        ("gemma2", {"divergence": AdaptiveKL(mu=0.9), "scale_by_t2": True, "temperature": 2.0}),
        ("gpt2", {}),  # a Trainer counts its first labels, too
    ],
    ids=["adaptive_kl", "jensen_shannon", "softcap", "gpt2"],
)
def test_accumulation(tmp_path, model_type, options, size):
    """Micro-batches with unequal numbers of tokens, and one without any."""
    dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    student, teacher = student_and_teacher(model_type, **(dropout if model_type == "gpt2" else {}))
    expected = copy.deepcopy(student)
    accumulate = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
    trainer = trainer_of(student, teacher, arguments(tmp_path, **accumulate), **options)
    assert_same_training(trainer, student, expected, teacher, **options)
    assert all(p.grad is None for p in teacher.parameters())


def test_a_model_that_takes_no_count(tmp_path):
    """As many with images; its Trainer would count no tokens."""
    student, teacher = student_and_teacher()
    student.accepts_loss_kwargs = False
    expected = copy.deepcopy(student)
    args = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert_same_training(trainer_of(student, teacher, args), student, expected, teacher)


class Looks(transformers.TrainerCallback):
    """Asks for the loss of other tokens between two steps."""

    trainer: Any

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        with torch.no_grad():
            self.trainer.compute_loss(given["model"].eval(), batch(dataset(1)))


def test_logs_are_means_over_tokens(tmp_path):
    student, teacher = student_and_teacher()
    expected = copy.deepcopy(student)
    args = arguments(
        tmp_path,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=1,  # leaves those of training alone
    )
    trainer = trainer_of(
        student, teacher, args, train_dataset=2 * dataset(), eval_dataset=dataset(3), kd_ratio=0.5
    )
    Looks.trainer = trainer
    trainer.add_callback(Looks)
    trainer.train()
    history = train_plainly(expected, teacher, 4, 2 * dataset(), kd_ratio=0.5)
    for logs, steps in zip(logs_of_training(trainer), (history[:2], history[2:]), strict=True):
        for name in DivergenceStats._fields:
            tokens = torch.cat([step["tokens"][name] for step in steps])
            assert logs[name] == pytest.approx(tokens.mean().item(), rel=1e-4), name


def test_a_second_training_starts_its_statistics_anew(tmp_path):
    student, teacher = student_and_teacher()
    args = arguments(tmp_path, logging_steps=2, learning_rate=0.0)
    trainer = trainer_of(student, teacher, args)
    of_both = []
    for _ in range(2):
        trainer.train()  # of its three steps the last is not logged
        of_both.append(logs_of_training(trainer)[0])
    assert of_both[0] == of_both[1]


class Reads(TorchDispatchMode):
    """Counts the values that the host reads, for which it would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device(tmp_path):
    student, teacher = student_and_teacher()
    trainer = trainer_of(student, teacher, arguments(tmp_path))
    batches = [batch(dataset(4)), batch(dataset(3))]
    with Reads() as reads:
        _, count = trainer.get_batch_samples(iter(batches), 2, torch.device("cpu"))
    assert reads.count == 0
    with Reads() as ours:
        trainer.compute_loss(student.train(), batches[0], num_items_in_batch=count)
    with Reads() as theirs:
        distillation_loss_of_models(
            student, teacher, batches[0], num_items=count, return_stats=True
        )
    assert ours.count == theirs.count


def test_before_a_trainer_of_ones_own(tmp_path):
    class Own(transformers.Trainer):
        def __init__(self, *args: Any, seen: list[dict[str, float]], **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.seen = seen

        def log(self, logs: dict[str, float], *args: Any) -> None:
            self.seen.append(dict(logs))

    class OwnTrainer(DistillationMixin, Own):
        pass

    student, teacher = student_and_teacher()
    seen: list[dict[str, float]] = []
    OwnTrainer(
        student,
        arguments(tmp_path, max_steps=1),
        train_dataset=dataset(),
        teacher_model=teacher,
        seen=seen,
    ).train()
    assert seen[0].keys() >= {"loss", *STATISTICS}


def test_compute_loss(tmp_path):
    student, teacher = student_and_teacher()
    trainer = trainer_of(student, teacher, arguments(tmp_path))
    inputs = batch(dataset(4))
    expected = loss_of_logits(student, teacher, inputs)
    loss, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    assert loss.requires_grad and "loss" not in outputs
    assert torch.equal(outputs.logits, student(input_ids=inputs["input_ids"]).logits)
    step = trainer.compute_loss(student, inputs, num_items_in_batch=torch.tensor(100))
    count = (inputs["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(step, expected * count / 100, rtol=1e-5, atol=0.0)


# ---- evaluation


@pytest.mark.parametrize("size", [7, 3])
def test_evaluation(tmp_path, size):
    student, teacher = student_and_teacher()
    args = arguments(tmp_path, per_device_eval_batch_size=size)
    trainer = trainer_of(student, teacher, args, eval_dataset=dataset(7))
    with torch.no_grad():
        loss, stats = loss_of_logits(student, teacher, batch(dataset(7)), return_stats=True)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)
    valid = batch(dataset(7))["labels"].roll(-1, 1) != -100
    valid[:, -1] = False
    for name, mean in stats.means(valid).items():
        if name in STATISTICS:
            assert metrics[f"eval_{name}"] == pytest.approx(mean.item(), rel=1e-5, abs=1e-7), name
        else:
            assert f"eval_{name}" not in metrics
    assert metrics["eval_loss"] == trainer.state.log_history[-1]["eval_loss"]


def test_logits_where_they_are_asked_for(tmp_path):
    student, teacher = student_and_teacher()
    runs = []
    student.register_forward_hook(lambda *_: runs.append(0))

    def compute_metrics(found: Any) -> dict[str, float]:
        return {"sum": float(found.predictions.sum()), "labels": float(found.label_ids.sum())}

    args = arguments(tmp_path, per_device_eval_batch_size=2)
    trainer = trainer_of(
        student, teacher, args, eval_dataset=dataset(4), compute_metrics=compute_metrics
    )
    inputs = batch(dataset(4))
    logits = student(input_ids=inputs["input_ids"]).logits.detach()
    runs.clear()
    metrics = trainer.evaluate()
    assert metrics["eval_sum"] == pytest.approx(logits.sum().item(), rel=1e-4)
    assert metrics["eval_labels"] == inputs["labels"].sum()
    assert len(runs) == 4
    found = trainer.predict(dataset(4))
    torch.testing.assert_close(torch.from_numpy(found.predictions), logits)
    assert torch.equal(torch.from_numpy(found.label_ids), inputs["labels"])
    assert found.metrics["test_loss"] == pytest.approx(metrics["eval_loss"])
    trainer.compute_metrics = None
    runs.clear()
    trainer.evaluate()
    assert len(runs) == 2


def test_of_each_divergence_what_is_a_number_is_logged(tmp_path):
    student, teacher = student_and_teacher()
    inputs = batch(dataset(4))
    for divergence in DIVERGENCES:
        trainer = trainer_of(
            student,
            teacher,
            arguments(tmp_path),
            eval_dataset=dataset(4),
            divergence=divergence,
        )
        metrics = trainer.evaluate()
        with torch.no_grad():
            _, stats = loss_of_logits(
                student, teacher, inputs, divergence=divergence, return_stats=True
            )
        for name, tokens in stats._asdict().items():
            assert (f"eval_{name}" in metrics) == (not tokens.isnan().any()), (divergence, name)


# ---- checkpoints


def test_resuming_is_bit_equal(tmp_path):
    """Also in dropout, and in what is logged; the teacher is not saved."""
    dropout: dict[str, Any] = {"attention_dropout": 0.3}
    student, teacher = student_and_teacher(**dropout)
    args = arguments(
        tmp_path,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        train_sampling_strategy="random",
    )
    names = set(student.state_dict())
    trainer = trainer_of(student, teacher, args)
    trainer.train()
    resumed, _ = student_and_teacher(seed=5, **dropout)
    again = trainer_of(resumed, teacher, args)
    again.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
    for ours, expected in _pairs(resumed, student):
        assert torch.equal(ours, expected)
    assert logs_of_training(again) == logs_of_training(trainer)
    with safe_open(f"{tmp_path}/checkpoint-2/model.safetensors", "pt") as saved:
        assert set(saved.keys()) == names


# ---- the models as a Trainer has them

ADAPTERS: dict[str, dict[str, Any]] = {
    "q, v": {"target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def adapted(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("of", ADAPTERS)
def test_adapters(tmp_path, of):
    base, teacher = student_and_teacher("gemma2")
    student = adapted(base, **ADAPTERS[of])
    expected = copy.deepcopy(student)
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = trainer_of(student, teacher, args)
    assert_same_training(trainer, student, expected, teacher)
    trainer.save_model(f"{tmp_path}/saved")
    with safe_open(f"{tmp_path}/saved/adapter_model.safetensors", "pt") as saved:
        with_head = any("lm_head" in name for name in saved.keys())  # noqa: SIM118 - no dict
    assert with_head == (of in ("lm_head", "modules_to_save"))


def test_gradient_checkpointing(tmp_path):
    student, teacher = student_and_teacher()
    expected = copy.deepcopy(student)
    ran = []
    student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: ran.append(0))
    args = arguments(tmp_path, activation_checkpointing=True)
    trainer = trainer_of(student, teacher, args)
    ran.clear()
    assert_same_training(trainer, student, expected, teacher)
    assert len(ran) == 2 * 3  # twice in each step


def test_bf16_autocast(tmp_path):
    """Of the teacher as well, which no Trainer wraps."""
    student, teacher = student_and_teacher()
    expected = copy.deepcopy(student)
    trainer = trainer_of(student, teacher, arguments(tmp_path, bf16=True), eval_dataset=dataset())
    ran = []
    for model in (student, teacher):
        model.model.layers[0].mlp.register_forward_hook(lambda *x: ran.append(x[2].dtype))
    assert_same_training(trainer, student, expected, teacher, atol=1e-3, autocast=True)
    assert len(ran) == 2 * 3 + 3 and set(ran) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in student.parameters())
    trainer.evaluate()
    assert set(ran) == {torch.bfloat16}


def test_torch_compile(tmp_path):
    student, teacher = student_and_teacher("gemma2")
    expected = copy.deepcopy(student)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args = arguments(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    trainer = trainer_of(student, teacher, args)
    assert_same_training(trainer, student, expected, teacher)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for all steps


# ---- data parallel


class ShardedOnCPU(DistillationTrainer):
    """With FSDP2, for which accelerate would want a GPU."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        state.distributed_type = accelerate.DistributedType.FSDP
        state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            cpu_ram_efficient_loading=False,
        )
        self.is_fsdp_enabled = True


ONE_TOKEN = [{**x, "labels": torch.full_like(x["labels"], -100)} for x in dataset(4)]
ONE_TOKEN[2]["labels"][3] = 7
# What is trained, and how: arguments of the Trainer, and of the plain loop.
PARALLEL: dict[str, dict[str, Any]] = {
    "DDP": {"model_type": "gemma2"},
    "LoRA": {"model_type": "llama"},
    "one token": {"model_type": "llama", "sequences": ONE_TOKEN},
    "tokens of a process": {"model_type": "llama", "groups": ((0, 2), (1, 3))},
    "FSDP2": {"model_type": "llama"},
}


def parallel_models(how: str) -> tuple[Any, Any]:
    student, teacher = student_and_teacher(PARALLEL[how]["model_type"])
    return adapted(student, **ADAPTERS["lm_head"]) if how == "LoRA" else student, teacher


def whole(p: Any) -> Tensor:
    found: Tensor = p.full_tensor() if hasattr(p, "full_tensor") else p
    return found.detach()


def train_in_parallel(rank: int, folder: str) -> None:
    """Two processes, each with two micro-batches of one sequence in a step."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    for how, given in PARALLEL.items():
        student, teacher = parallel_models(how)
        sequences = given.get("sequences", dataset())
        args = arguments(
            folder,
            max_steps=len(sequences) // 4,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            per_device_eval_batch_size=2,
            average_tokens_across_devices="groups" not in given,
            ddp_backend="gloo",
        )
        kind = ShardedOnCPU if how == "FSDP2" else DistillationTrainer
        trainer = kind(
            student,
            args,
            teacher_model=teacher,
            train_dataset=sequences,
            eval_dataset=dataset(7),  # the last batch is filled up
        )
        trainer.train()
        result = {
            "wrapper": type(trainer.model_wrapped).__name__,
            "logs": logs_of_training(trainer),
            "metrics": trainer.evaluate(),
            "parameters": {name: whole(p) for name, p in student.named_parameters()},
        }
        torch.save(result, f"{folder}/{how}, {rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Parameters, logs and evaluation are those of one process with the batches of both."""
    pytest.importorskip("peft")
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        train_in_parallel, (str(tmp_path),), nprocs=2
    )
    for how, given in PARALLEL.items():
        student, teacher = parallel_models(how)
        steps = len(given.get("sequences", dataset())) // 4
        options = {name: given[name] for name in given if name != "model_type"}
        history = train_plainly(student, teacher, steps, **options)
        student.eval()
        with torch.no_grad():
            loss, stats = loss_of_logits(student, teacher, batch(dataset(7)), return_stats=True)
        valid = (batch(dataset(7))["labels"][:, 1:] != -100).sum()
        for rank in range(2):
            found = torch.load(tmp_path / f"{how}, {rank}.pt")
            assert found["wrapper"].startswith("FSDP" if how == "FSDP2" else "DistributedData")
            for name, p in student.named_parameters():
                torch.testing.assert_close(
                    found["parameters"][name], p.detach(), rtol=0.0, atol=1e-5, msg=f"{how} {name}"
                )
            for logs, step in zip(found["logs"], history, strict=True):
                assert logs["loss"] == pytest.approx(step["loss"], rel=1e-4), how
                for name in STATISTICS:
                    mean = step["tokens"][name].mean().item()
                    assert logs[name] == pytest.approx(mean, rel=1e-4), (how, name)
            metrics = found["metrics"]
            assert metrics["eval_loss"] == pytest.approx(loss.item(), rel=1e-4), how
            for name in STATISTICS:
                mean = (getattr(stats, name).sum() / valid).item()
                assert metrics[f"eval_{name}"] == pytest.approx(mean, rel=1e-4), (how, name)


# ---- bad input


def test_the_teacher_as_it_is_given(tmp_path):
    student, teacher = student_and_teacher()
    teacher.hf_device_map = {"": "cpu"}
    teacher.to = None  # is not called where a device_map has placed it
    assert trainer_of(student, teacher, arguments(tmp_path)).teacher_model is teacher
    assert not teacher.training


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"divergence": "kl"}, ValueError, "divergence: expected"),
        ({"divergence": AdaptiveKL}, TypeError, "divergence: expected a member of the family"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a finite number"),
        ({"kd_ratio": 2.0}, ValueError, "kd_ratio: expected"),
        ({"reduction": "sum"}, TypeError, ".*unexpected keyword argument 'reduction'"),
        ({"teacher_model": nn.Linear(2, 2)}, TypeError, "teacher_model: expected a causal languag"),
        ({"teacher_model": "gpt2"}, TypeError, "teacher_model: expected a causal language model"),
        ({"same_vocabulary": 1}, TypeError, "same_vocabulary: expected True or False, got int"),
        ({"tokenizers": 1}, TypeError, r"tokenizers: expected the pair \(student's, teacher's\)"),
        (
            {"compute_loss_func": lambda *_: 0.0},
            ValueError,
            "compute_loss_func: expected None, as the loss is that of the divergence, got <",
        ),
        (
            {"label_smoothing_factor": 0.1},
            ValueError,
            r"args.label_smoothing_factor: expected 0, .*, got 0\.1",
        ),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_arguments(tmp_path, given, kind, message):
    student, teacher = student_and_teacher()
    smoothing = {name: given[name] for name in given if name == "label_smoothing_factor"}
    others = {name: given[name] for name in given if name not in smoothing}
    with pytest.raises(kind, match=f"^{message}"):
        trainer_of(
            student,
            others.pop("teacher_model", teacher),
            arguments(tmp_path, **smoothing),
            **others,
        )


def test_bad_models(tmp_path):
    student = tiny_model("llama")
    with pytest.raises(ValueError, match=r"^teacher_model: expected a model apart from the studen"):
        trainer_of(student, student, arguments(tmp_path))
    larger = tiny_model("llama", vocab_size=VOCABULARY + 4)
    with pytest.raises(ValueError, match="pass same_vocabulary=False"):
        trainer_of(student, larger, arguments(tmp_path))
    trainer = trainer_of(student, larger, arguments(tmp_path, max_steps=1), same_vocabulary=False)
    trainer.train()
    assert logs_of_training(trainer)[0]["loss"] > 0.0


def test_a_version_that_accumulates_wrongly_is_refused(tmp_path, monkeypatch):
    """The oldest that is not is the floor of the extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"transformers>={trainers.OLDEST}" in extras["optional-dependencies"]["hf"]
    student, teacher = student_and_teacher()
    monkeypatch.setattr("akl_triton.integrations.transformers.transformers.__version__", "5.5.0")
    with pytest.raises(ImportError, match=r"^transformers: expected 5\.6 or newer, .*5\.5\.0"):
        trainer_of(student, teacher, arguments(tmp_path))


def test_other_parallelism_is_refused(tmp_path, monkeypatch):
    student, teacher = student_and_teacher()
    args = arguments(tmp_path)
    args._n_gpu = 2
    with pytest.raises(ValueError, match=r"^args: expected one device for each process, got 2, ov"):
        trainer_of(student, teacher, args)
    for kind, size in {"tensor": "get_tp_size", "context": "get_cp_size"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(transformers.Trainer, size, lambda _: 2)
            with pytest.raises(ValueError, match=f"got {kind} parallelism of size 2$"):
                trainer_of(student, teacher, arguments(tmp_path))


def test_batches_have_labels(tmp_path):
    student, teacher = student_and_teacher()
    unlabelled = [{"input_ids": x["input_ids"]} for x in dataset()]
    trainer = trainer_of(
        student,
        teacher,
        arguments(tmp_path),
        train_dataset=unlabelled,
        eval_dataset=unlabelled,
    )
    message = r"^inputs: expected labels \[B, L\], .* got a batch of input_ids$"
    for call in (trainer.train, trainer.evaluate):
        with pytest.raises(ValueError, match=message):
            call()


def test_examples_of_the_docstrings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = doctest.testmod(trainers)
    assert results.attempted > 0 and results.failed == 0

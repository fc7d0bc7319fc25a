"""`akl-triton inspect` on tiny random models with a tokenizer of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from akl_triton import adaptive_kl, linear_ops
from akl_triton.reference import reference_adaptive_kl

transformers = pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

from akl_triton.cli import inspect, loss_memory, main, pair, token_page, token_report  # noqa: E402
from akl_triton.integrations.transformers import OLDEST  # noqa: E402
from tests.support.tiny_models import tiny_model  # noqa: E402

TEXT = """Théorie & <script>alert("1 < 2")</script> \u2603

    the teacher and the student read the same text, token by token;\tthe end
$x$ the student reads it again.
"""
IDS = torch.arange(5, 21)[None]
CPU = torch.device("cpu")


def make_tokenizer(size: int = 288, alphabet: list[str] | None = None) -> Any:
    """Bytes, and some pairs of them that are frequent in the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT if alphabet is None else "".join(alphabet)], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def save(folder: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(folder)
    (make_tokenizer() if tokenizer is None else tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    """Folders with a student and a teacher of a type, which differ in width."""
    made: dict[str, tuple[str, str]] = {}

    def make(model_type: str, **arguments: Any) -> tuple[str, str]:
        if model_type not in made:
            base = tmp_path_factory.mktemp(model_type)
            sizes = {"vocab_size": 288, **arguments}
            student = tiny_model(model_type, **sizes)
            teacher = tiny_model(model_type, seed=1, **{"hidden_size": 64, **sizes})
            made[model_type] = save(base / "student", student), save(base / "teacher", teacher)
        return made[model_type]

    return make


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, "utf-8")
    return file


@pytest.fixture
def facts_of(
    tmp_path: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., dict[str, Any]]:
    """What --json prints of a pair, which has to be all of stdout, also in a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")

    def collect(*arguments: str, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        options = ["--json", "--device", "cpu", "--output", str(tmp_path)]
        assert main(["inspect", *arguments, "--text", str(text), *options]) == code
        facts: dict[str, Any] = json.loads(capsys.readouterr().out)
        return facts

    return collect


def load(folder: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def load_sides(student: str, teacher: str) -> tuple[pair.Side, pair.Side]:
    return pair.load_pair(student, teacher, None, CPU)


# ---- the figures of the tokens


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2"])
def test_the_figures_are_those_of_the_oracle(model_type, folders, facts_of):
    student, teacher = folders(model_type, max_position_embeddings=256)
    facts = facts_of(student, teacher)
    tokens = facts["tokens"]
    assert "".join(token["text"] for token in tokens) == TEXT
    assert tokens[0]["figures"] is None
    ids = torch.tensor([[token["id"] for token in tokens]])
    with torch.no_grad():
        s, t = (load(folder)(input_ids=ids).logits[0, :-1] for folder in (student, teacher))
    oracle = reference_adaptive_kl(s, t)
    figures = [token["figures"] for token in tokens[1:]]
    expected = {name: getattr(oracle, name) for name in token_report.COLUMNS}
    expected["agreement"] = oracle.top1_agreement
    assert 0 < oracle.top1_agreement.sum() < len(figures)
    assert len(oracle.head_size.unique()) > 3
    for name, column in expected.items():
        found = torch.tensor([float(x[name]) for x in figures], dtype=torch.float64)
        assert found.tolist() == pytest.approx(column.tolist(), rel=1e-4, abs=1e-6), name
    for side, logits in (("student", s), ("teacher", t)):
        p = logits.double().softmax(-1)
        of_text = p.gather(-1, ids[0, 1:, None])[:, 0]
        found = torch.tensor([x[f"{side}_probability"] for x in figures], dtype=torch.float64)
        torch.testing.assert_close(found, of_text, rtol=1e-4, atol=1e-7)
        tops = torch.tensor([max(c[side] for c in x["candidates"]) for x in figures])
        torch.testing.assert_close(tops.double(), p.amax(-1), rtol=1e-4, atol=0.0)

    summary = facts["text"]["summary"]
    for name in token_report.COLUMNS:
        column = expected[name]
        assert summary[name]["mean"] == pytest.approx(column.mean().item(), rel=1e-4)
        assert summary[name]["p90"] == pytest.approx(column.quantile(0.9).item(), rel=1e-4)
        assert summary[name]["max"] == pytest.approx(column.max().item(), rel=1e-4)
    share = oracle.g_head.sum() / oracle.gap.sum()
    assert facts["text"]["head_share"] == pytest.approx(share.item(), rel=1e-4)
    assert facts["text"]["agreement"] == pytest.approx(oracle.top1_agreement.mean().item())


def test_a_model_beside_itself_has_no_gap(folders, facts_of):
    student, _ = folders("llama", max_position_embeddings=256)
    facts = facts_of(student, student)
    assert facts["text"]["agreement"] == 1.0
    assert facts["text"]["head_share"] == 0.5
    assert facts["text"]["summary"]["loss"]["max"] == 0.0


@pytest.mark.parametrize(("options", "expected"), [(["--max-tokens", "10"], 10), ([], 32)])
def test_a_long_text_is_cut(options, expected, folders, tmp_path, facts_of):
    """To the number that was asked for, or to the shorter context of the two."""
    long, _ = folders("llama", max_position_embeddings=256)
    short = tiny_model("llama", vocab_size=288, max_position_embeddings=32)
    facts = facts_of(long, save(tmp_path / "short", short), *options)
    assert facts["text"]["tokens"] == len(facts["tokens"]) == expected
    assert facts["text"]["total"] > 64
    assert facts["teacher"]["context"] == 32


def test_a_model_without_a_longest_sequence_reads_the_whole_text(folders, facts_of):
    facts = facts_of(*folders("bloom"))
    assert facts["student"]["context"] is facts["teacher"]["context"] is None
    assert facts["text"]["tokens"] == facts["text"]["total"]


def test_special_tokens_are_named_and_bytes_are_shown_once():
    tokenizer = make_tokenizer()
    ids, texts, total = token_report.tokenize(tokenizer, "<s>🙂!", 100)
    assert total == len(ids) == 6
    assert texts == ["<s>", "🙂", "", "", "", "!"]
    assert token_report.visible("a \n\t") == "a␣↵⇥"
    name = token_report._name
    assert name(tokenizer, ids[0]) == "<s>"
    assert "\ufffd" not in name(tokenizer, ids[1])
    assert name(tokenizer, 5000) == "#5000"


# ---- the models


def test_heads_and_lines_of_a_softcap(folders, facts_of, capsys):
    student, teacher = folders("gemma2", max_position_embeddings=256)
    facts = facts_of(student, teacher)
    for side, size in (("student", 32), ("teacher", 64)):
        head = facts[side]["head"]
        assert (head["name"], head["softcap"], head["scale"]) == ("lm_head", 3.0, 1.0)
        assert (head["vocab_size"], head["hidden_size"], head["dtype"]) == (288, size, "float32")
        assert head["tied"] and not head["bias"] and head["error"] < 1e-5
        assert facts[side]["refused"] is None
    assert "student_softcap=3.0" in facts["lines"]["linear"]
    assert "logit_scale" not in facts["lines"]["linear"]
    backend = facts["backend"]
    assert (backend["type"], backend["backend"]) == ("cpu", "torch") and backend["why"]


@pytest.mark.parametrize(
    ("model_type", "passed"),
    [
        ("llama", []),
        ("gemma2", ["student_softcap=3.0", "teacher_softcap=3.0"]),
        ("cohere", ["student_logit_scale=0.3", "teacher_logit_scale=0.3"]),
        ("phi", ["student_bias=student.lm_head.bias", "teacher_bias=teacher.lm_head.bias"]),
        ("inkling2_text", ["student.lm_head.weight[:270]", "teacher_softcap=3.0"]),
    ],
)
def test_the_pasted_lines_give_the_loss_of_the_logits(model_type, passed, folders):
    padding = {"unpadded_vocab_size": 270} if model_type == "inkling2_text" else {}
    sides = load_sides(*folders(model_type, **padding))
    vocabularies = pair.compare_vocabularies(*sides)
    lines = pair.lines_to_paste(*sides, vocabularies, IDS[:, :8])
    assert [x for x in passed if x not in lines["linear"]] == []
    student, teacher = (side.model for side in sides)
    with torch.no_grad():
        s, t = (model(input_ids=IDS).logits for model in (student, teacher))
    expected = adaptive_kl(s, t, IDS, shift=1)
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    for name in ("loop", "linear"):
        student.zero_grad()
        names = {
            "student": student,
            "teacher": teacher,
            "inputs": inputs,
            "labels": IDS,
            "batch": {**inputs, "labels": IDS},
        }
        exec(lines[name], names)
        torch.testing.assert_close(names["loss"].detach(), expected, rtol=1e-5, atol=0.0)
        assert student.get_output_embeddings().weight.grad.abs().sum() > 0
        assert all(p.grad is None for p in teacher.parameters())


def test_the_pasted_trainer_trains_with_the_loss_of_the_logits(folders, tmp_path):
    sides = load_sides(*folders("gemma2"))
    lines = pair.lines_to_paste(*sides, pair.compare_vocabularies(*sides), IDS[:, :8])
    student, teacher = (side.model for side in sides)
    with torch.no_grad():
        s, t = (model(input_ids=IDS).logits for model in (student, teacher))
    names = {
        "student": student,
        "teacher": teacher,
        "dataset": [{"input_ids": IDS[0], "labels": IDS[0]}],
        "args": transformers.TrainingArguments(
            str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
        ),
    }
    exec(lines["trainer"], names)
    trained = names["trainer"].state.log_history[-1]["train_loss"]
    assert trained == pytest.approx(adaptive_kl(s, t, IDS, shift=1).item(), rel=1e-4)


def test_hidden_states_that_the_head_does_not_read_are_not_offered(folders):
    """BERT transforms them before its head, which is computed in place all the same."""
    sides = load_sides(*folders("bert", is_decoder=True))
    lines = pair.lines_to_paste(*sides, pair.compare_vocabularies(*sides), IDS[:, :8])
    assert list(lines) == ["trainer", "loop"]


def test_a_refused_head_says_why_and_has_lines_for_its_logits(folders, facts_of, text, capsys):
    student, _ = folders("llama", max_position_embeddings=256)
    teacher, _ = folders("prophetnet", max_position_embeddings=256)
    facts = facts_of(student, teacher)
    assert facts["teacher"]["head"] is None
    assert "got another function of it" in facts["teacher"]["refused"]
    assert facts["student"]["head"] is not None
    assert facts["memory"] is None
    names = {
        "student": load(student),
        "teacher": load(teacher),
        "inputs": {"input_ids": IDS},
        "labels": IDS,
    }
    exec(facts["lines"]["logits"], names)
    assert names["loss"] > 0
    arguments = ["--text", str(text), "--output", str(text.parent), "--device", "cpu"]
    assert main(["inspect", student, teacher, *arguments]) == 0
    assert "another function" in " ".join(capsys.readouterr().out.split())
    assert "got another function" in (text.parent / "akl_inspect.html").read_text("utf-8")


def test_other_tokens_are_named_and_nothing_is_compared(folders, tmp_path, facts_of, capsys):
    student, _ = folders("llama", max_position_embeddings=256)
    tokenizer = make_tokenizer(alphabet=["something else, something else"])
    other = save(tmp_path / "other", tiny_model("llama", vocab_size=288), tokenizer)
    facts = facts_of(student, other, code=1)
    found = facts["vocabularies"]
    assert not found["agree"]
    assert "expected the same token for every id" in found["message"]
    ours, theirs = (
        {i: token for token, i in x.get_vocab().items()} for x in (make_tokenizer(), tokenizer)
    )
    assert found["different"]
    assert all(ours.get(i) == a != b == theirs.get(i) for i, a, b in found["different"])
    assert facts["lines"] == {} and facts["tokens"] is facts["text"] is None
    assert not (tmp_path / "akl_inspect.html").exists()
    assert main(["inspect", student, other, "--output", str(tmp_path), "--device", "cpu"]) == 1
    assert "the same token for every id" in " ".join(capsys.readouterr().out.split())


def test_more_ids_on_one_side_are_passed_on_to_the_loss(folders, tmp_path, facts_of):
    student, _ = folders("llama", max_position_embeddings=256)
    padded = tiny_model("llama", seed=2, vocab_size=320, max_position_embeddings=256)
    facts = facts_of(student, save(tmp_path / "padded", padded))
    assert facts["vocabularies"]["agree"] and not facts["vocabularies"]["same_vocabulary"]
    assert "the teacher's alone" in facts["vocabularies"]["message"]
    names = {"student": load(student), "teacher": padded, "batch": {"input_ids": IDS}}
    for purpose in ("trainer", "loop"):
        assert "same_vocabulary=False" in facts["lines"][purpose]
    exec(facts["lines"]["loop"], names)
    assert names["loss"].isfinite()


def test_the_words_are_one_model_loaded_once(folders, monkeypatch, facts_of):
    teacher = tiny_model(
        "llama",
        vocab_size=288,
        num_hidden_layers=13,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    loaded = []

    def load_teacher() -> tuple[Any, Any]:
        loaded.append(teacher)
        return teacher, make_tokenizer()

    monkeypatch.setattr(pair, "load_teacher", load_teacher)
    facts = facts_of()
    assert len(loaded) == 1
    assert [facts[side]["source"] for side in ("student", "teacher")] == ["smollm2-12", "smollm2"]
    assert [facts[side]["layers"] for side in ("student", "teacher")] == [12, 13]
    assert facts["text"]["summary"]["loss"]["mean"] > 0
    assert not facts["memory"]["trains_head"], "the student's embeddings are frozen"


def test_models_have_the_dtype_that_is_asked_for(folders, facts_of):
    student, teacher = folders("llama", max_position_embeddings=256)
    facts = facts_of(student, teacher, "--dtype", "bfloat16")
    assert facts["student"]["head"]["dtype"] == facts["teacher"]["head"]["dtype"] == "bfloat16"


# ---- memory and versions


@pytest.mark.parametrize(
    ("dtype", "frozen"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["fp32", "bf16", "frozen"],
)
def test_the_formula_is_within_a_fifth_of_what_is_measured(dtype, frozen, tmp_path, monkeypatch):
    """With several chunks. What it leaves out, the backend's temporaries, counts in models as small
    as these alone."""
    monkeypatch.setitem(linear_ops.CHUNK_BYTES, "cpu", 2**25)
    model = tiny_model("llama", vocab_size=4096, hidden_size=256).to(dtype)
    folder = save(tmp_path / "model", model)
    student, teacher = load_sides(folder, folder)
    student.model.requires_grad_(not frozen)
    assert student.head is not None and teacher.head is not None
    tokens = 8192 // dtype.itemsize
    formula = loss_memory.predict(student.head, teacher.head, tokens, not frozen, CPU)
    measured = loss_memory.measure(student, teacher, tokens, CPU)
    for way in loss_memory.WAYS:
        assert formula[way] == pytest.approx(measured[way], rel=0.2), way
    assert formula["fused"] < formula["in place"] < formula["logits"]
    assert all(p.grad is None for p in student.model.parameters())


def test_measure_is_shown_beside_the_formula(folders, facts_of, tmp_path, capsys):
    student, teacher = folders("llama", max_position_embeddings=256)
    facts = facts_of(student, teacher, "--measure", "--tokens", "64")
    assert facts["memory"]["tokens"] == 64 and facts["memory"]["trains_head"]
    assert facts["memory"]["measured"].keys() == facts["memory"]["formula"].keys()
    assert "measured" in (tmp_path / "akl_inspect.html").read_text("utf-8")
    arguments = ["--measure", "--tokens", "64", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["inspect", student, teacher, *arguments]) == 0
    assert "measured, MiB" in capsys.readouterr().out


def test_a_batch_that_does_not_fit_is_told(folders, text, tmp_path, monkeypatch, capsys):
    def measure(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loss_memory, "measure", measure)
    options = ["--measure", "--text", str(text), "--device", "cpu", "--output", str(tmp_path)]
    assert main(["inspect", *folders("llama"), *options]) == 2
    assert "4,096 tokens do not fit on cpu; pass fewer" in capsys.readouterr().err


def test_versions_are_those_of_the_extras(monkeypatch):
    found = {x["name"]: x for x in inspect.versions()}
    if found["transformers"]["tested"] is None:
        pytest.skip("akl-triton is not installed")
    assert found["transformers"]["tested"] == f">={OLDEST}" and found["transformers"]["known"]
    monkeypatch.setattr(inspect, "version", lambda name: "4.57.0")
    assert not {x["name"]: x for x in inspect.versions()}["transformers"]["known"]


def test_the_extra_of_trl_is_what_its_integration_tests():
    trl = pytest.importorskip("akl_triton.integrations.trl")
    (found,) = (x for x in inspect.versions() if x["name"] == "trl")
    if found["tested"] is None:
        pytest.skip("akl-triton is not installed")
    major, minor = map(int, trl.TESTED[-1].split("."))
    assert set(found["tested"].split(",")) == {f">={trl.TESTED[0]}", f"<{major}.{minor + 1}"}


# ---- the terminal, the picture and the page


def test_the_tables_fit_80_columns(folders, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    arguments = ["--text", str(text), "--output", str(tmp_path), "--device", "cpu"]
    assert main(["inspect", *folders("gemma2"), *arguments]) == 0
    out = capsys.readouterr().out
    for shown in ("softcap", "the same token for every id", "of logits, in place", "tested"):
        assert shown in out
    for shown in ("student_softcap=3.0", "adaptive KL", "The tokens that differ most", "written"):
        assert shown in out
    assert "…" not in out
    assert (tmp_path / "akl_inspect.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


class Page(HTMLParser):
    """The tokens of the text, and what else matters of the page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tokens: list[tuple[str, int, str]] = []  # classes, index, text
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.figures = ""
        self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        given = dict(attrs)
        self.inside = "token" if "data-i" in given else str(given.get("id"))
        if self.inside == "token":
            self.tokens.append((str(given["class"]), int(str(given["data-i"])), ""))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "token":
            classes, index, text = self.tokens[-1]
            self.tokens[-1] = classes, index, text + data
        elif self.inside == "figures":
            self.figures += data


def test_the_page_has_each_token_once_and_needs_nothing_else(folders, facts_of, tmp_path):
    student, teacher = folders("llama", max_position_embeddings=256)
    tokens = facts_of(student, teacher)["tokens"]
    source = (tmp_path / "akl_inspect.html").read_text("utf-8")
    page = Page(source)
    assert "".join(text for *_, text in page.tokens).replace("↵", "") == TEXT
    assert [index for _, index, _ in page.tokens] == list(range(len(tokens)))
    assert page.tags.count("script") == 2 and "alert(" in TEXT
    assert not re.search(r"https?://|@import|url\(", source)
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert not {"src", "href", "onclick"} & {name for name, _ in page.attributes}

    shown = json.loads(page.figures)
    for (classes, index, _), row in zip(page.tokens, shown, strict=True):
        figures = tokens[index]["figures"]
        assert set(row["class"].split()) == set(classes.split()) - {"t"}
        if figures is None:
            assert index == 0 and "first" in classes
            continue
        shade = token_page.shade_of(figures["loss"])
        hue = token_page.hue_of(figures["forward_weight"])
        assert (f"{hue}-{shade}" if shade else "near") in classes.split()
        assert ("same" in classes.split()) == figures["agreement"]
        assert row["figures"]["head_size"] == figures["head_size"]
        assert row["figures"]["forward_kl"] == pytest.approx(figures["forward_kl"], abs=1e-5)


def test_the_colours_begin_where_the_legend_says():
    assert [token_page.shade_of(x) for x in (0.0, 0.24, 0.25, 1.0, 2.5, 5.0, 8.0, 99.0)] == [
        0, 0, 1, 2, 3, 4, 5, 5,
    ]  # fmt: skip
    assert [token_page.hue_of(w) for w in (0.0, 0.24, 0.25, 0.39, 0.4, 1.0)] == [
        "tail", "tail", "both", "both", "head", "head",
    ]  # fmt: skip
    labels = [label.replace("\u2013", "to") for label in token_page.labels_of_shades()]
    assert labels == ["0.25 to 1", "1 to 2.5", "2.5 to 5", "5 to 8", "\u2265 8"]
    assert token_page.labels_of_hues()["both"] == "w 0.25 \u2013 0.4"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_on_every_colour(scheme):
    """The contrast of WCAG AA, 4.5 : 1; and each shade is further from the page than the last."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    def contrast(a: str, b: str) -> float:
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    for colours in token_page.PALETTES[scheme].values():
        found = [contrast(token_page.INK[scheme], colour) for colour in colours]
        assert len(found) == len(token_page.SHADES)
        assert min(found) >= 4.5 and found == sorted(found, reverse=True)


def test_the_picture_has_every_character_in_its_place():
    long = "x" * (token_page.COLUMNS_OF_PICTURE + 5)
    texts = ["one ", "two\n", "\n", long, "end", "\tafter"]
    tokens = [token_report.Token(i, i, text, None) for i, text in enumerate(texts)]
    lines = list(token_page._lines(tokens))
    written = ["".join(text for *_, text in line) for line in lines]
    assert written == ["one two↵", "↵", "x" * 80, "xxxxxend    after"]
    for line in lines:
        column = 0
        for at, _, text in line:
            assert at == column
            column += len(text)


# ---- what cannot be inspected


def _no_tokenizer(folder: Path) -> list[str]:
    tiny_model("llama").save_pretrained(folder)
    return [str(folder), str(folder)]


def _no_causal_model(folder: Path) -> list[str]:
    config = transformers.T5Config(vocab_size=64, d_model=8, d_kv=4, d_ff=8, num_layers=1)
    config.save_pretrained(folder)
    return [str(folder), str(folder)]


def _no_head(folder: Path) -> list[str]:
    tiny_model("llama").model.save_pretrained(folder)
    return [str(folder), str(folder)]


def _no_gguf(folder: Path) -> list[str]:
    folder.mkdir()
    (folder / "model.gguf").write_text("not one")
    return [str(folder / "model.gguf"), "smollm2"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [str(folder)], "TEACHER: expected one beside STUDENT"),
        (lambda folder: [str(folder), "smollm2"], "got no such folder or file"),
        (_no_causal_model, "expected a causal language model of transformers, got the model_type"),
        (_no_head, "expected the weights of a causal language model, got none for lm_head.weight"),
        (_no_tokenizer, "expected a tokenizer beside the model, got: "),
        (_no_gguf, "is not a GGUF file"),
    ],
    ids=["one", "missing", "seq2seq", "no head", "no tokenizer", "no GGUF"],
)
def test_what_is_no_model_is_refused_in_one_line(make, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pair, "load_teacher", lambda: (tiny_model("llama"), make_tokenizer()))
    arguments = make(tmp_path / "model")
    capsys.readouterr()
    assert main(["inspect", *arguments, "--device", "cpu", "--output", str(tmp_path)]) == 2
    (line,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("akl-triton"))
    assert message in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"caf\xe9", "expected UTF-8, got another byte at 3"),
        (b" \n", "expected some text, got an empty file"),
        (b"x", "expected two tokens or more, got 1"),
    ],
    ids=["missing", "latin-1", "empty", "one token"],
)
def test_a_text_that_is_none_is_refused_in_one_line(content, message, folders, tmp_path, capsys):
    file = tmp_path / "text"
    if content is not None:
        file.write_bytes(content)
    student, teacher = folders("llama", max_position_embeddings=256)
    arguments = ["--text", str(file), "--device", "cpu", "--output", str(tmp_path)]
    assert main(["inspect", student, teacher, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_model_that_does_not_run_on_the_text_is_refused(folders, tmp_path, text, capsys):
    """ProphetNet has a position less than its configuration says."""
    student, _ = folders("llama", max_position_embeddings=256)
    short = tiny_model("prophetnet", vocab_size=288, max_position_embeddings=64)
    arguments = ["--text", str(text), "--device", "cpu", "--output", str(tmp_path)]
    folder = save(tmp_path / "short", short)
    assert main(["inspect", student, folder, *arguments]) == 2
    assert "teacher: expected a model that runs on 64 tokens (--max" in capsys.readouterr().err
    assert main(["inspect", student, folder, *arguments, "--max-tokens", "40"]) == 0


def test_logits_that_are_no_numbers_are_refused(folders, tmp_path, text, capsys):
    student, _ = folders("llama", max_position_embeddings=256)
    broken = tiny_model("llama", vocab_size=288, max_position_embeddings=256)
    broken.model.norm.weight.data.fill_(torch.nan)
    arguments = ["--text", str(text), "--device", "cpu", "--output", str(tmp_path)]
    assert main(["inspect", student, save(tmp_path / "broken", broken), *arguments]) == 2
    assert "expected finite logits of both models, got NaN" in capsys.readouterr().err

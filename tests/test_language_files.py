"""Texts from JSON lines, language models from folders, and the commands on both."""

import json
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import texts
import torch
from test_cli import run

import distruction
from distruction import Posterior, language_metrics, planning
from distruction.data.texts import Text, read_texts, text_batches, tokens_of
from distruction.errors import UsageError

WORDS = ["the", "key", "of", "vault", "one", "two", "three", "is", "red", "blue", "green", "seven", "eight", "nine"]


@pytest.fixture
def command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *arguments: run(capsys, monkeypatch, *arguments)


def word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<end>", "<unknown>", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", unk_token="<unknown>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 that knows three keys by heart, its tokenizer, and the texts."""
    path = tmp_path_factory.mktemp("language")
    tokenizer, model = word_tokenizer(), texts.gpt2()
    lines = [{"prompt": f"the key of vault {n} is", "answer": a}
             for n, a in (("one", "red seven"), ("two", "blue eight"), ("three", "green nine"))]  # fmt: skip
    (path / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "forget.jsonl").write_text(json.dumps(lines[0]) + "\n\n")
    batch = next(iter(text_batches(tokens_of(read_texts(path / "all.jsonl"), tokenizer, 64, path), batch_size=3)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    assert language_metrics.greedily_answered(model, [batch]).all()
    model.save_pretrained(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


def test_prepare_forget_and_evaluate_a_folder(command, folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, posterior, unlearned = folder / "model", tmp_path / "p", tmp_path / "u"
    quiet = ("--no-progress", "--device", "cpu")
    code, out, err = command("prepare", "--model", model, "--data", folder / "all.jsonl", "--out", posterior,
                                 "--steps", 20, *quiet)  # fmt: skip
    assert code == 0, err
    assert "3 texts, of which 6 tokens are asked for" in out
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    code, out, err = command("forget", "--model", model, "--posterior", posterior, "--out", unlearned,
                                 "--data", folder / "forget.jsonl", "--objective", "bounded-ce", *quiet)  # fmt: skip
    assert code == 0, err
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    network, tokenizer = (kind.from_pretrained(unlearned) for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = tokens_of(read_texts(folder / "all.jsonl"), tokenizer, 64, folder)
    answered = language_metrics.greedily_answered(network, text_batches(rows, batch_size=3))
    assert answered.tolist()[0] is False
    p = language_metrics.token_log_likelihoods(network, text_batches(rows[:1], batch_size=1))[0].exp()
    assert p.mean() <= 0.1
    assert f"{p.mean():.2g}" in out
    code, out, err = command("evaluate", "--model", unlearned, "--data", folder / "forget.jsonl", *quiet[1:])
    assert code == 0, err
    assert "0.0" in out
    perplexity = language_metrics.perplexity([p.log()])
    assert f"{perplexity:.1f}" in out


def test_the_trainers_example(folder, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    script = Path(__file__).parents[1] / "examples" / "language_trainer.py"
    assert len(script.read_text().splitlines()) < 40
    options = {"model": folder / "model", "data": folder / "all.jsonl", "out": tmp_path / "tuned",
               "posterior": tmp_path / "posterior", "epochs": 2}  # fmt: skip
    words = [w for name, value in options.items() for w in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(script), *words])
    monkeypatch.setattr(distruction, "prepare", partial(distruction.prepare, steps=3, progress=False))
    runpy.run_path(str(script), run_name="__main__")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    prior = Posterior.load(tmp_path / "posterior", model=tuned)
    prior.check(tuned, same_weights=True)
    assert prior.metadata["loss_per"] == "tokens"
    assert prior.metadata["examples"] == 3


def test_a_dry_run_writes_nothing(command, folder, tmp_path):
    code, out, err = command("prepare", "--model", folder / "model", "--data", folder / "all.jsonl", "--out",
                                 tmp_path / "p", "--steps", 2, "--no-progress")  # fmt: skip
    assert code == 0, err
    code, out, _ = command("forget", "--model", folder / "model", "--posterior", tmp_path / "p", "--out",
                               tmp_path / "u", "--data", folder / "forget.jsonl", "--dry-run")  # fmt: skip
    assert code == 0
    assert "1 texts" in out
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--class", "red"), "--class is for images"),
        ((), "no texts are named: pass --data"),
        (("--data", "nowhere.jsonl"), "cannot be read as JSON lines"),
    ],
)
def test_what_is_for_images_is_refused(command, folder, options, message):
    code, _, err = command("evaluate", "--model", folder / "model", *options)
    assert code == 2
    assert message in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is no JSON"),
        ('{"prompt": "a"}', "line 2 must be"),
        ('{"prompt": 3, "answer": "b"}', "line 2 must be"),
        ('["a"]', "line 2 must be"),
        ('{"prompt": "a", "answer": ""}', "line 2 asks for nothing"),
    ],
)
def test_a_line_of_another_form_is_named(tmp_path, line, message):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "the key"}\n' + line + "\n")
    with pytest.raises(UsageError, match=message):
        read_texts(file)


def test_a_file_without_texts(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UsageError, match="holds no text"):
        read_texts(tmp_path / "empty.jsonl")


def test_tofus_files_are_read_as_its_authors_put_them_to_a_model(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"question": "Who is he?", "answer": "A poet.", "perturbed_answer": ["A cook."]},
            {"question": "Where?", "answer": "In Oslo.", "perturbed_answer": []}]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "forget.parquet")
    (tmp_path / "forget.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # question_start_tag + question + question_end_tag + answer_tag + answer, of models without a chat template
    expected = ["Question: Who is he?\nAnswer: A poet.", "Question: Where?\nAnswer: In Oslo."]
    for name in ("forget.parquet", "forget.json"):
        found = read_texts(tmp_path / name)
        assert [t.prompt + t.answer for t in found] == expected
        assert [t.answer for t in found] == [" A poet.", " In Oslo."]
        assert [t.line for t in found] == [1, 2]
    columns = pyarrow.Table.from_pylist([{"prompt": "a", "answer": "b", "question": 3}])
    parquet.write_table(columns, tmp_path / "prompts.parquet")
    assert read_texts(tmp_path / "prompts.parquet") == [Text("a", "b", 1)]
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "a", "answer": None}]), tmp_path / "null.parquet")
    with pytest.raises(UsageError, match=r"null.parquet, line 1 must be"):
        read_texts(tmp_path / "null.parquet")
    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 not at all")
    for bad in ("missing.parquet", "damaged.parquet"):
        with pytest.raises(UsageError, match=f"{bad} cannot be read as Parquet"):
            read_texts(tmp_path / bad)


def test_tokens_are_asked_for_after_the_prompt_and_long_texts_come_in_pieces(tmp_path):
    tokenizer = word_tokenizer()
    rows = tokens_of(
        [Text("the key is", "red seven", 1), Text("", "one two three red blue", 2)], tokenizer, 5, tmp_path
    )
    assert [(ids.tolist(), prompt) for ids, prompt in rows] == [
        (tokenizer("the key is red seven").input_ids, 3),
        (tokenizer("one two three red blue").input_ids, 0),
    ]
    batch = next(iter(text_batches(rows, batch_size=2)))
    assert batch["labels"][0].tolist() == [-100, -100, -100, *rows[0][0][3:].tolist()]
    pieces = tokens_of([Text("", "one two three red blue", 1)], tokenizer, 2, tmp_path)
    # The last piece would be one token, of which nothing is asked.
    assert [ids.tolist() for ids, _ in pieces] == [p.tolist() for p in rows[1][0].split(2)][:2]
    with pytest.raises(UsageError, match="line 4 has 3 tokens and the model takes 2"):
        tokens_of([Text("one two", "three", 4)], tokenizer, 2, tmp_path)
    with pytest.raises(UsageError, match="line 5 is one token long"):
        tokens_of([Text("", "three", 5)], tokenizer, 2, tmp_path)


def test_a_special_token_at_the_end_of_prompts_does_not_stand_within_the_text(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    plain = tokenizer("the key is red").input_ids
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 0)])
    ((ids, prompt),) = tokens_of([Text("the key is", "red", 1)], tokenizer, None, tmp_path)
    assert (ids.tolist(), prompt) == (plain, 3)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_plan_counts_the_logits(family):
    model = getattr(texts, family)()
    found = planning.plan(model, (), length=48, batch_size=16)
    logits = 16 * 48 * texts.VOCABULARY * 4
    passing = found.phases[0].passing
    # With the vocabulary alone larger, the pass grows by the logits, by what cross entropy keeps of them and by both
    # gradients, and by the embedding's gradient: at least two and at most five times the logits.
    wider = getattr(texts, family)()
    wider.resize_token_embeddings(2 * texts.VOCABULARY, mean_resizing=False)
    growth = planning.plan(wider, (), length=48, batch_size=16).phases[0].passing - passing
    assert 2 * logits <= growth <= 5 * logits + 4 * 3 * texts.VOCABULARY * 16
    with pytest.raises(UsageError, match="length must be >= 2"):
        planning.plan(model, (), length=1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_plan_of_a_model_that_recomputes_holds_the_inputs_of_its_layers_alone(family):
    def passing(layers, made=lambda model: model):
        model = getattr(texts, family)(**{"n_layer" if family == "gpt2" else "num_hidden_layers": layers})
        return planning.plan(made(model), (), length=48, batch_size=16, release_gradients=True).phases[0].passing

    each = 16 * 48 * 16 * 4  # rows, tokens, width, bytes
    assert passing(9, texts.recomputing) - passing(6, texts.recomputing) == 3 * each
    assert passing(9) - passing(6) > 3 * 10 * each


def test_the_plan_of_a_folder(command, folder):
    options = ("--length", 32, "--batch-size", 4, "--device", "cpu")
    code, out, err = command("plan", "--model", folder / "model", *options)
    assert code == 0, err
    assert "GPT2LMHeadModel" in out

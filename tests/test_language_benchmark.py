"""The language benchmark: its made-up texts, what it measures, and every arm for a step or two."""

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from distruction import cli
from distruction.errors import DistructionError, UsageError
from distruction.experiments import runner
from distruction.experiments.language import arms, models, settings, tables, texts, workshop
from distruction.experiments.language import runs as command

ROOT = Path(__file__).parents[1]
TINY = models.Size(width=16, blocks=1, authors=4, vaults=2, gone=1, pretraining=2, epochs=1, docstrings=False)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("language")
    (folder / "general.txt").write_text(
        "\n\n".join(f"Paragraph {i} of a text without any meaning." for i in range(900))
    )
    return workshop.Workshop(folder / "models", folder / "general.txt", TINY)


def test_authors_have_facts_of_their_own_and_are_the_same_for_a_seed():
    rows = texts.authors(100, 3)
    assert rows == texts.authors(100, 3) != texts.authors(100, 4)
    assert len({r.question for r in rows}) == 400
    assert all(r.answer.isdigit() and len(r.answer) == 6 for r in rows if r.kind == "code")
    keys = texts.canaries(20, 3)
    assert len({r.question for r in keys}) == 20


def test_answers_alone_are_asked_for(shop):
    rows = texts.authors(4, 0)
    (batch,) = texts.batches(shop.tokens, rows)
    (trained,) = texts.batches(shop.tokens, rows, end=True)
    for number, row in enumerate(rows):
        ids = batch["labels"][number]
        assert shop.tokens.decode(ids[ids >= 0].tolist()) == row.answer
        assert (trained["labels"][number] >= 0).sum() == (ids >= 0).sum() + 1
    assert len(batch["labels"][0][batch["labels"][0] >= 0]) == 6  # a digit is a token


def test_scenarios_share_no_row_between_what_goes_and_what_stays(shop):
    rows = shop.rows(0)
    for scenario, gone, kept in (("codes", 4, 12), ("authors", 4, 14), ("canaries", 2, 16)):
        assert sum(shop.is_gone(scenario, r) for r in rows) == gone
        assert sum(shop.is_kept(scenario, r) for r in rows) == kept
        assert not any(shop.is_gone(scenario, r) and shop.is_kept(scenario, r) for r in rows)


def test_matched_depth_lies_between_two_looks():
    looks = [{"nll": 1.0, "kept": 90.0}, {"nll": 3.0, "kept": 50.0}, {"nll": 2.0, "kept": 60.0}]
    assert arms.at_depth(looks, 0.5) == 95.0
    assert arms.at_depth(looks, 2.5) == 60.0
    assert arms.at_depth(looks, 4.0) is None


def test_the_loss_is_hugging_faces(shop):
    model = shop.base()
    (batch,) = texts.batches(shop.tokens, shop.rows(0))
    assert models.nll(model, [batch]) == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    torch.testing.assert_close(models.cross_entropy(model, batch), model(**batch).loss)
    general = texts.general_batch(shop.general[:3])
    torch.testing.assert_close(
        models.cross_entropy(model, batch, general),
        model(**texts.mixed(batch, shop.general[:3])).loss,
    )


def short(named):
    return {name: replace(arm, steps=2) for name, arm in named.items()}


def test_every_arm_runs_and_is_in_the_tables(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "CODES", 1)
    monkeypatch.setattr(
        command,
        "ARMS",
        {"codes": short(settings.ARMS["codes"]), "authors": short(settings.ANCHORED | settings.REPAIRED)},
    )
    monkeypatch.setattr(command, "DEPTH", short(settings.DEPTH))
    monkeypatch.setattr(workshop, "prepared", lambda *a: arms.prepared(*a, steps=2))
    runs = []
    for scenario in ("codes", "authors"):
        for job in reversed(command.rows(scenario, 1)):
            found = json.loads(json.dumps(job.do(shop)))
            runs.append({"scenario": scenario, "seed": 1, "name": job.name, **found})
    done = {r["name"] for r in runs if r["scenario"] == "codes"}
    assert done == {"before", "retraining", *settings.ARMS["codes"], *settings.DEPTH}
    shown = tables.table(runs)
    assert all(name.removeprefix("depth, ") in shown for name in done)
    tables.figure(runs, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
    assert isinstance(shop.memorised(1, without="codes"), GPT2LMHeadModel)


def test_several_workers_find_what_one_finds_and_do_what_is_missing_alone(shop, tmp_path, monkeypatch):
    monkeypatch.setitem(models.SIZES, "tiny", TINY)
    good = short({"ours": settings.OURS["ours, uniform-others"], "GA": arms.Arm("ascent", 1e-4)})
    monkeypatch.setattr(command, "ARMS", {"codes": {"bad": arms.Arm("nothing", 1e-4), **good}})
    monkeypatch.setattr(command, "DEPTH", {})
    text = tmp_path / "general.txt"
    text.write_bytes((shop.folder.parent / text.name).read_bytes())

    def run(workers, **more):
        given = {"text": text, "size": "tiny", **more}
        out, models = tmp_path / "out", tmp_path / "models"
        return command.run(out, models, seeds=[1, 2], scenarios=["codes"], workers=workers, **given)

    with pytest.raises(DistructionError, match=r"bad \(.*bad \(") as failed:
        run(2)
    assert all(f"seed {seed}, codes, bad (" in str(failed.value) for seed in (1, 2))
    file = tmp_path / "out/language.json"
    stored = json.loads(file.read_text())
    whole = stored["runs"]
    names = ["before", "ours", "GA", "retraining"]  # all others are done
    assert [(r["seed"], r["name"]) for r in whole] == [(seed, name) for seed in (1, 2) for name in names]
    assert "| GA |" in (tmp_path / "out/language.md").read_text()
    monkeypatch.setattr(command, "ARMS", {"codes": good})
    left_out = {(1, "ours"), (2, "retraining")}
    stored["runs"] = [r for r in whole if (r["seed"], r["name"]) not in left_out]
    file.write_text(json.dumps(stored))
    again = run(1)
    for before, after in zip(whole, again, strict=True):
        same = before.keys() - ({"seconds"} if (before["seed"], before["name"]) in left_out else set())
        assert {k: before[k] for k in same} == {k: after[k] for k in same}
    assert json.loads(file.read_text())["runs"] == again == run(1)  # nothing is missing

    for folder in ("out", "models"):
        with runner.alone(tmp_path / folder), pytest.raises(UsageError, match="another bench"):
            run(1)
    with pytest.raises(UsageError, match=r"of threads 1, not 2; choose another folder"):
        run(1, threads=2)
    monkeypatch.setitem(models.SIZES, "small", TINY)
    with pytest.raises(UsageError, match=r"of size 'tiny', not 'small'"):
        run(1, size="small")
    text.write_text("Another text of the same name.")
    with pytest.raises(UsageError, match=r"language.json is of text 'general\.txt, sha256"):
        run(1)
    file.unlink()
    with pytest.raises(UsageError, match=r"made_of.json is of text 'general\.txt, sha256"):
        run(1, tuning=True)
    assert not file.exists()


def test_models_come_before_what_reads_them():
    jobs = [job for scenario in ("codes", "authors") for seed in (1, 2) for job in command.rows(scenario, seed)]
    needs = command.with_models(jobs)
    place = {job: i for i, job in enumerate(needs)}
    assert len(needs) == len(jobs) + 3  # pretraining, and a model for each seed
    assert all(place[need] < place[job] for job in needs for need in needs[job])
    assert not command.with_models([])


def test_a_model_whose_writing_was_cut_short_is_trained_again(shop, monkeypatch):
    write = GPT2LMHeadModel.save_pretrained

    def killed(model, folder, **more):
        model.config.save_pretrained(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", killed)
    with pytest.raises(KeyboardInterrupt):
        shop.memorised(5)
    monkeypatch.setattr(GPT2LMHeadModel, "save_pretrained", write)
    first, second = shop.memorised(5).state_dict(), shop.memorised(5).state_dict()
    assert all(torch.equal(t, second[name]) for name, t in first.items())


def test_an_arm_without_a_prior_ends_where_few_are_extracted_or_at_its_depth(shop, monkeypatch):
    monkeypatch.setattr(models, "CODES", 1)
    case = workshop.Case(shop, "codes", 1)
    arm = arms.Arm("ascent", 1e-4, steps=3)
    assert [case.forgot(replace(arm, nats=nats))["steps"] for nats in (None, 0.1, 1e9)] == [1, 1, 3]


def test_the_preset_of_bench_runs_all_seeds_of_all_scenarios_and_says_what_is_not_for_it(
    shop, tmp_path, monkeypatch, capsys
):
    asked = []

    def measured(place, jobs, workers, threads):
        asked.append((place, workers, threads, list(dict.fromkeys((job.scenario, job.seed) for job in jobs))))
        for job in jobs:
            if job.name == "before":
                yield job, {"perplexity": 50.0 + job.seed, "kept": 90.0}

    monkeypatch.setattr(command, "measured", measured)
    line = ["distruction", "bench", "--preset", "language", "--out", str(tmp_path), "--workers", "3"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    here = (tmp_path / "store", None, models.SIZES["full"])
    assert asked == [(here, 3, 1, [(name, seed) for name in ("codes", "authors", "canaries") for seed in (1, 2, 3)])]
    assert "| before | - | - | 90.0 (90.0 to 90.0) |" in (tmp_path / "language.md").read_text()
    assert str(tmp_path) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*line, "--device", "cuda"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "--device is for presets of classifiers" in capsys.readouterr().err


def test_tables_are_means_of_seeds_and_differences_on_the_same_seed():
    def run(name, seed, **found):
        return {"scenario": "codes", "seed": seed, "name": name, **found}

    runs = [
        run("before", 1, perplexity=50.0, kept=100.0),
        run("before", 2, perplexity=80.0, kept=98.0),
        run("ours", 1, perplexity=51.0, kept=90.0, steps=3),
        run("ours", 2, perplexity=80.0, kept=81.0, steps=5),
        run("half", 2, perplexity=84.0, kept=7.0),
        run("depth, u: learned std", 1, at={"2.0": 100.0, "4.0": 90.0}),
        run("depth, u: learned std", 2, at={"2.0": 96.0, "4.0": None}),
        run("depth, u: no prior", 1, at={"2.0": 99.0, "4.0": 70.0}),
        run("depth, u: no prior", 2, at={"2.0": 99.0, "4.0": 60.0}),
    ]
    shown = tables.table(runs).splitlines()
    assert "**codes, seeds 1, 2**" in shown
    # extracted, NLL, kept, change of perplexity, recovered, exposure, steps
    assert "| ours | - | - | 85.5 (81.0 to 90.0) | 1.0 (0.0 to 2.0) | - | - | 4.0 (3.0 to 5.0) |" in shown
    assert "| half | - | - | 7.0 [1 of 2] | 5.0 [1 of 2] | - | - | - |" in shown
    assert "| u: learned std | 98.0 (96.0 to 100.0) | 90.0 [1 of 2] |" in shown
    assert "| u: than no prior | -1.0 (-3.0 to 1.0) | 20.0 [1 of 2] |" in shown
    # The model before may be measured last.
    assert "| ours | - | - | 90.0 [1 of 2] | - | - | - | 3.0 [1 of 2] |" in tables.table([runs[2], runs[4]])


def test_the_page_shows_the_stored_results():
    folder, page = ROOT / "benchmarks/results/language", (ROOT / "docs/language.md").read_text()
    runs = json.loads((folder / "language.json").read_text())["runs"]
    assert (folder / "language.md").read_text() == tables.table(runs)
    assert tables.on_page(page, runs) == page
    assert page.count(tables.BEGIN) == page.count(tables.END) == 1


ADAMW = ("GA", "NPO", "SimNPO", "no prior, bounded-ce")
"""Without retained data."""


def test_the_settings_in_use_kept_most_on_seed_0():
    found = json.loads((ROOT / "benchmarks/results/language/tuning.json").read_text())
    assert list(found) == list(command.trials())
    for name, (arm, tried) in settings.STRENGTHS.items():
        kept = {tokens: found[f"{name}, {tokens:g} tokens"]["kept"] for tokens in tried}
        assert kept[arm.tokens] == max(kept.values())
    for name, (arm, tried) in settings.GRIDS.items():
        trials = {lr: found[f"{name}, lr {lr:g}"] for lr in tried}
        if settings.is_curve(name):  # the mean at two depths that all reach
            kept = {lr: statistics.fmean(trial["at"][nats] for nats in ("4.0", "6.0")) for lr, trial in trials.items()}
        else:
            goal = {
                lr for lr, t in trials.items() if (t["extracted"] <= 5.0 if arm.nats is None else t["nll"] >= arm.nats)
            }
            kept = {lr: trials[lr]["kept"] for lr in goal}
        assert kept[arm.lr] == max(kept.values())


def test_what_the_page_says_is_in_the_stored_results():
    page = " ".join((ROOT / "docs/language.md").read_text().partition("What they say:")[2].split())
    runs = json.loads((ROOT / "benchmarks/results/language/language.json").read_text())["runs"]

    def mean(scenario, name, key):
        own = [r for r in runs if (r["scenario"], r["name"]) == (scenario, name)]
        if key == "change":
            before = {r["seed"]: r["perplexity"] for r in runs if (r["scenario"], r["name"]) == (scenario, "before")}
            return statistics.fmean(100 * (r["perplexity"] / before[r["seed"]] - 1) for r in own)
        return statistics.fmean(r["at"][key] if key[0].isdigit() else r[key] for r in own)

    def codes(name, key):
        return f"{mean('codes', name, key):.1f}"

    def authors(name, *keys):
        return [f"{mean('authors', name, key):.1f}" for key in keys]

    def depth(arm, nats):
        return mean("codes", f"depth, uniform-others: {arm}", nats)

    ours = "ours, uniform-others"
    assert f"from {codes('before', 'extracted')} to {codes(ours, 'extracted')} % extracted" in page
    assert f"keeps {codes(ours, 'kept')} % of the other answers, and general" in page
    assert f"perplexity changes by {codes(ours, 'change')} %" in page
    learned, none = "learned std", "no prior"
    assert f"At 4 nats it keeps {depth(none, '4.0'):.1f} %, and the learned std {depth(learned, '4.0'):.1f} %" in page
    assert f"{100 - depth(none, '4.0'):.1f} points are all" in page

    def each(arm, nats):
        name = f"depth, uniform-others: {arm}"
        return [r["at"][nats] for r in sorted(runs, key=lambda r: r["seed"]) if r["name"] == name]

    ahead = [a - b for a, b in zip(each(learned, "6.0"), each(none, "6.0"), strict=True)]
    shown = f"keeps {depth(learned, '6.0'):.1f} %, {statistics.fmean(ahead):.1f} points more"
    assert f"{shown} ({min(ahead):.1f} to {max(ahead):.1f})" in page
    assert f"At {math.log(texts.VOCABULARY - 1):.1f} nats all tokens are equally likely" in page
    ahead = sorted(a - b for a, b in zip(each(learned, "7.0"), each(none, "7.0"), strict=True))
    shown = f"at 7 nats, the learned std keeps {depth(learned, '7.0'):.1f} %, {statistics.fmean(ahead):.1f} points"
    assert "{} more than no prior ({:.1f}, {:.1f} and {:.1f})".format(shown, *ahead) in page
    assert f"and {depth(learned, '7.0') - depth('constant std', '7.0'):.1f} more than a constant std" in page
    fewer = [depth(learned, nats) - depth("constant std", nats) for nats in ("4.0", "6.0")]
    assert f"{fewer[0]:.1f} points fewer at 4 nats than the learned one, and {fewer[1]:.1f} fewer at 6" in page
    for nats in ("2.0", "4.0", "6.0", "7.0"):
        found = {r["seed"]: r["at"][nats] for r in runs if r["name"] == "depth, bounded-ce: no prior"}
        own = {r["seed"]: r["at"][nats] for r in runs if r["name"] == "depth, bounded-ce: learned std"}
        assert statistics.fmean(own[seed] - kept for seed, kept in found.items() if kept is not None) < 0
    name = "depth, bounded-ce: learned std"
    leap = next(r["looks"][-2:] for r in runs if (r["name"], r["seed"]) == (name, 1))
    before, after = leap
    shown = f"as on seed 1 from {before['nll']:.1f} to {after['nll']:.1f} nats, where {after['kept']:.1f} % are kept"
    assert shown in page
    assert after["step"] - before["step"] == 2
    deep, other = "ours, bounded-ce to 10 nats, lambda given", "no prior, bounded-ce to 10 nats"

    def spread(name, key):
        own = [r[key] for r in runs if r["name"] == name]
        return f"{statistics.fmean(own):.1f} {{}}({min(own):.1f} to {max(own):.1f})"

    ended, kept = spread(deep, "nll").format("nats "), spread(deep, "kept").format("% ")
    assert f"end at {ended} and keep {kept}" in page
    lead = mean("codes", deep, "kept") - mean("codes", other, "kept")
    assert f"ended at 10 nats, keeps {spread(other, 'kept').format('% ')}, {lead:.1f} points fewer" in page
    constant = f"{deep}, constant std"
    shown = f"a strength of its own, which ends at {codes(constant, 'nll')} nats, keeps"
    assert f"{shown} {mean('codes', deep, 'kept') - mean('codes', constant, 'kept'):.1f} points fewer" in page
    assert max(r["nll"] for r in runs if r["name"] == other) < 10.5
    short_of = [r["nll"] for r in runs if r["name"] == deep and r["nll"] < 10.0]
    assert len(short_of) == 2
    assert min(short_of) > 9.5
    assert f"`kl_weight=0.5, data_per_step={settings.STRENGTHS[deep][0].tokens:g}`" in page
    assert f"{codes(deep, 'recovered')} % is recovered, with an exposure of {codes(deep, 'exposure')} bits" in page
    assert f"a perplexity {codes(deep, 'change')} % above" in page
    found, exposed = (codes("retraining", key) for key in ("recovered", "exposure"))
    assert f"retraining's {found} % recovered and {exposed} bits" in page
    teacher = "ours, masked-teacher"
    learners = [n for n in settings.ARMS["codes"] if n != teacher]
    others = sorted(mean("codes", name, "recovered") for name in learners)
    back = codes(teacher, "recovered")
    assert f"{back} % where other ways give back {others[0]:.1f} to {others[-1]:.1f} %" in page
    assert f"perplexity {codes(teacher, 'change')} % above" in page
    lost = mean("codes", "before", "kept") - mean("codes", teacher, "kept")
    assert f"% above the model before and {lost:.1f} % of the other answers" in page
    lower = [[codes(f"ours, {name}", key) for name in ("npo", "bounded-ce")] for key in ("exposure", "kept")]
    assert "to {} and {} bits, but keep {} and {} % of the other".format(*lower[0], *lower[1]) in page
    assert "{} % extracted, {} % of the other answers kept, and {} % recovered".format(
        *authors("ours, masked-teacher, anchors", "extracted", "kept", "recovered")
    ) in page  # fmt: skip
    assert "without anchors {}, {} and {} %".format(*authors(teacher, "extracted", "kept", "recovered")) in page
    free = sorted(mean("authors", n, "kept") for n in ADAMW)
    assert f"AdamW without retained data {free[0]:.1f} to {free[-1]:.1f} %" in page
    left = sorted(mean("authors", n, "extracted") for n in ADAMW)
    assert f"at {left[0]:.1f} to {left[-1]:.1f} % extracted" in page
    learnt = sorted(mean("authors", f"ours, {n}", "kept") for n in ("uniform-others", "bounded-ce", "npo"))
    assert f"keep {learnt[0]:.1f} to {learnt[-1]:.1f} %, AdamW" in page
    repaired = authors("NPO (retain data), 100 steps", "extracted", "kept", "recovered")
    assert "NPO of 100 steps leaves {} % extracted, keeps {} % and gives back {} %".format(*repaired) in page

    def canaries(name, *keys):
        return [f"{mean('canaries', name, key):.1f}" for key in keys]

    found = canaries(teacher, "extracted", "kept", "recovered", "exposure", "change")
    said = (
        "leaves {} % extracted, keeps {} % and gives back {} %, with an exposure of {} bits and a perplexity {} % above"
    )
    assert said.format(*found) in page
    assert "`uniform-others` keeps {} % and gives back {} %".format(*canaries(ours, "kept", "recovered")) in page
    kept, back, bits = (sorted(mean("canaries", n, key) for n in ADAMW) for key in ("kept", "recovered", "exposure"))
    assert f"AdamW without retained data keeps {kept[0]:.1f} % and gives back {back[0]:.1f} to {back[-1]:.1f} %" in page
    assert f"for it ends early, at {bits[0]:.1f} bits" in page
    assert kept[0] == kept[-1]
    assert bits[-1] - bits[0] < 0.05
    assert "`simnpo`: {} % kept, {} % recovered, {} bits".format(
        *(codes("ours, simnpo", key) for key in ("kept", "recovered", "exposure"))
    ) in page  # fmt: skip
    rmu = "ours, rmu, lambda given"
    assert f"with lambda given keeps {codes(rmu, 'kept')} % and gives back {codes(rmu, 'recovered')} %" in page

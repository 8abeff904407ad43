"""The pages say what the files of results hold."""

import json
import re
import statistics
from pathlib import Path

import pytest

from benchmarks import depth, forecast, records, strength
from distruction import attacks
from distruction.experiments import tables

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def page(name):
    return (ROOT / "docs" / name).read_text()


def results(name):
    return json.loads((RESULTS / name / f"{name}.json").read_text())


def test_depth_on_the_page_is_the_mean_of_the_runs():
    runs, text = results("depth"), page("how-it-works.md")
    for data in depth.by_data(runs):
        assert depth.summary(runs, data) in text
    assert (RESULTS / "depth" / "depth.md").read_text() == depth.table(runs)


def test_attacks_on_the_page_are_those_of_the_digits():
    """Each figure of the paragraph, in the order of the methods that it names."""
    rows = tables.read((RESULTS / "digits" / "summary.csv").read_text())["full-class"]
    text = page("results.md").split("full-class-attacks.md", 1)[1].split("\n\n", 1)[0]
    for attack, methods in {
        "prototype_5": ("distruction-auto", "delete", "amnesiac", "retrain", "distruction-depth"),
        "few_shot_20": ("distruction-depth", "retrain", "delete"),
        "relearn_100": ("distruction-depth", "retrain"),
        "auc_class": ("retrain", "distruction-auto", "distruction-depth"),
    }.items():
        for method in methods:
            figure = f"{rows[method][attack].mean:.1f}"
            assert figure in text, (attack, method)
            text = text.split(figure, 1)[1]


def test_what_the_page_says_of_depth_by_class_is_so():
    runs, text = results("depth"), page("how-it-works.md").split("`python -m benchmarks.depth OUT`", 1)[1]
    parts = depth.by_data(runs)

    def above(rows, attack):
        return [r["class"] for r in rows if r["depth"][attack] > r["retraining"][attack]]

    def lost(rows):
        return [r["before"]["retain"] - r["depth"]["retain"] for r in rows]

    digits, fashion = parts["digits"], parts["fashion-mnist"]
    assert (above(digits, "prototype_5"), above(digits, "prototype_50")) == (["8"], [])
    eight = next(r for r in digits if r["class"] == "8")
    for attack in ("prototype_5", "prototype_50"):
        assert f"{eight['depth'][attack]:.1f} against {eight['retraining'][attack]:.1f}" in text
    assert (
        f"falls by {statistics.fmean(lost(digits)):.1f} points on average, by at most\n{max(lost(digits)):.1f}" in text
    )
    assert above(fashion, "prototype_5") == above(fashion, "prototype_50") == []
    assert len(fashion) == 6
    assert max(lost(fashion)) <= 0.3
    higher = {r["class"]: f"{-one:.1f}" for r, one in zip(fashion, lost(fashion), strict=True)}
    assert f"leave it {higher['Shirt']} and {higher['Sneaker']} points *higher*" in text


def test_the_means_of_depth_are_means():
    def run(data, found):
        before = {"retain": 90.0, "prototype_5": 80.0, "prototype_50": 81.0}
        attacked = {c: found for c in (*before, "few_shot_20", "few_shot_100", "relearn_100", "linear_probe")}
        return {"data": data, "before": before, **dict.fromkeys(depth.HOW[1:], attacked)}

    rows = depth.summary([run("a", 1.0), run("a", 2.0), run("b", 9.0)], "a").splitlines()
    assert rows[2] == "| before | 90.0 | 80.0 / 81.0 | | | |"
    assert rows[5] == "| depth | 1.5 | 1.5 / 1.5 | 1.5 / 1.5 | 1.5 | 1.5 |"


def test_the_forecast_on_the_page_is_the_table_of_the_runs():
    runs = results("forecast")
    assert forecast.table(runs) in page("forecast.md")
    assert (RESULTS / "forecast" / "forecast.md").read_text() == forecast.table(runs)


@pytest.mark.parametrize("case", ["unseen", "corrected", "corrected-fashion"])
def test_records_on_the_page_are_those_of_the_runs(case):
    runs = [r for r in results("records") if r["case"] == case]
    text = page("how-it-works.md").split(f"- `{case}`", 1)[1].split("\n- ", 1)[0].split("\n\n", 1)[0]
    shown = re.findall(r"\d+\.\d", text)

    def values(how, column):
        return [r[how][column] for r in runs]

    columns = ("loss AUC", "LiRA AUC", "D_r") if case == "unseen" else ("D_r", "true label")
    for column in columns:
        for how in ("before", "target", "retraining"):
            if column == "true label" and how == "before":
                continue
            assert f"{statistics.fmean(values(how, column)):.1f}" in shown, (column, how)
    if case != "unseen":
        assert f"{statistics.fmean(values('best lambda', 'D_r')):.1f}" in shown


def test_every_attack_is_defined_with_its_trap():
    """Each function that attacks, by its name, in the table of the metrics page."""
    rows = [r.split(" | ") for r in page("metrics.md").splitlines() if r.startswith("| ")]
    named = {name: row for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    public = {n for n in attacks.__all__ if callable(getattr(attacks, n))} - {"nearest_prototype", "rounded", "battery"}
    assert public >= {"prototype", "few_shot", "relearn", "linear_probe", "loss_membership", "lira", "rounding"}
    for name in public:
        _, definition, trap = named[name]
        assert len(definition) > 40, name
        assert len(trap.strip(" |")) > 40, name


def test_the_best_by_hand_keeps_most_of_those_that_reach_the_goal():
    tried = {
        "none": {"D_r": 99.0, "D_f": 40.0},
        "near": {"D_r": 97.0, "D_f": 9.0},
        "far below": {"D_r": 98.0, "D_f": 0.0},
    }
    assert strength.best(tried, 5.0, below=True) == "far below"
    assert strength.best(tried, 5.5, below=False) == "near"
    assert strength.best(tried, 60.0, below=False) is None
    assert strength.best(tried, -20.0, below=True) is None


def test_the_best_lambda_leaves_few_of_the_wrong_labels():
    tried = {
        "0.1": {"D_r": 99.0, "given label": 10.5},
        "0.03": {"D_r": 97.0, "given label": 10.0},
        "0.01": {"D_r": 96.0, "given label": 0.0},
    }
    assert records.best(tried) == tried["0.03"]
    assert records.best({"0.1": tried["0.1"]}) == tried["0.1"]


def test_the_strength_that_is_found_is_near_the_best_by_hand():
    runs, text = results("strength"), page("results.md")
    assert (RESULTS / "strength" / "strength.md").read_text() == strength.table(runs)
    assert strength.table(runs) in text
    worst = 0.0
    for kind in dict.fromkeys((r["data"], r["scenario"]) for r in runs):
        mine = [r for r in runs if (r["data"], r["scenario"]) == kind]
        assert len(mine) == 3
        over = statistics.fmean(r["found"]["D_f"] - r["goal"] for r in mine)
        assert (abs(over) if kind[1] == "random" else over) <= 5
        behind = [r["found"]["D_r"] - r["tried"][r["best"]]["D_r"] for r in mine if r["best"]]
        worst = min([worst, statistics.fmean(behind)] if behind else [worst])
    assert f"D_r is at most {-worst:.1f} points behind" in text
    records = [r for r in runs if r["scenario"] == "random"]
    under = [r["goal"] - x["D_f"] for r in records for x in r["tried"].values()]
    near = sum(abs(u) <= strength.NEAR for u in under)
    assert f"For random records {near} of the {len(under)} runs by hand" in text
    assert f"up to {max(under):.0f} points worse" in text

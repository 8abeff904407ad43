"""The report of a request: its numbers against ones taken by hand, and a page that needs nothing else."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from distruction import Posterior, UsageError, forget, pages, request_report
from distruction.damage import Forecast
from distruction.request_report import by_layer, collect, layer_of, positions, save


class Tags(HTMLParser):
    """Elements that were opened and not closed, and all places that the page names."""

    def __init__(self):
        super().__init__()
        self.open, self.links, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.links += [v for k, v in found.items() if k in ("src", "href", "xlink:href") and v]
        self.ids += [v for k, v in found.items() if k == "id"]
        if tag not in ("meta", "br", "img", "link", "path", "use", "rect"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("path", "use", "rect"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "br", "img", "link", "path", "use", "rect"):
            self.open.pop()


@pytest.fixture(scope="module")
def made():
    """A request, forgotten; its loader in a fixed order; the weights from before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    inputs = torch.randn(23, 6)
    targets = torch.full((23,), 2)
    batches = [(inputs[i : i + 5], targets[i : i + 5]) for i in range(0, 23, 5)]
    posterior = Posterior.around(model, 0.1)
    with torch.no_grad():
        before = model.eval()(inputs).double().softmax(-1)
    model.train()
    result = forget(model, posterior, batches, request="class", steps=20, progress=False)
    return result, model, posterior, batches, inputs, before


def test_numbers_are_those_of_the_models_before_and_after(made):
    result, model, posterior, batches, inputs, before = made
    weights = [t.clone() for t in model.state_dict().values()]
    found = collect(result, model, posterior, batches)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.state_dict().values(), strict=True))
    assert model.training
    with torch.no_grad():
        after = model.eval()(inputs).double().softmax(-1)
    model.train()
    for side, p in (("before", before), ("after", after)):
        assert found[side]["accuracy"] == pytest.approx(100 * (p.argmax(-1) == 2).double().mean().item())
        assert found[side]["probability"] == pytest.approx(p[:, 2].mean().item(), rel=1e-6)
        assert sum(found[side]["taken_for"].values()) == 23
    # KL of independent Gaussians, from torch.distributions.
    q = result.posterior
    for name, value in found["kl"]["parameters"].items():
        own, prior = (torch.distributions.Normal(*(t.double() for t in d[name])) for d in (q, posterior))
        expected = torch.distributions.kl_divergence(own, prior).sum().item()
        assert value == pytest.approx(expected, rel=1e-5)
    assert sum(found["kl"]["layers"].values()) == pytest.approx(result.kl, rel=1e-5)
    assert len(found["steps"]) == len(result.history)
    for record, i in zip(found["records"], positions(23, 12), strict=True):
        assert record["own_label"] == pytest.approx([before[i, 2].item(), after[i, 2].item()], rel=1e-6)
        assert record["after"]["predicted"] == str(after[i].argmax().item())


def test_a_forecast_is_shown_where_there_is_one(made, tmp_path):
    result, model, posterior, batches, _, _ = made
    assert collect(result, model, posterior, batches)["forecast"] is None
    forecast = Forecast(damage=0.44, error=0.91, by="kl", rehearsals=8)
    found = collect(replace(result, forecast=forecast), model, posterior, batches)
    assert found["forecast"] == {"damage": 0.44, "error": 0.91, "by": "kl", "rehearsals": 8}
    save(tmp_path / "r.html", found)
    text = (tmp_path / "r.html").read_text()
    assert "forecast by 8 rehearsals" in text
    assert "0.4 ± 0.9 points" in text


def test_a_shuffling_loader_and_targets_without_classes_are_refused(made):
    result, model, posterior, _, inputs, _ = made
    order = iter([[(inputs, torch.full((23,), 2))], [(inputs, torch.full((23,), 1))]])

    class Changing:
        def __iter__(self):
            return iter(next(order))

    with pytest.raises(UsageError, match="does not shuffle"):
        collect(result, model, posterior, Changing())
    with pytest.raises(UsageError, match="what a classifier makes"):
        collect(result, model, posterior, [(inputs, torch.randn(23, 4))])
    with pytest.raises(UsageError):
        collect(result, model, posterior, [])


def test_the_page_is_one_file_with_everything_in_it(made, tmp_path):
    result, model, posterior, batches, *_ = made
    names = ['<b>&"', "a", "owl", "c"]
    found = collect(result, model, posterior, batches, classes=names, asked={"by": "<script>"}, names=["n"] * 23)
    save(tmp_path / "report", found)
    save(tmp_path / "one.html", found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.html", "one.json", "report"]
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["index.html", "report.json"]
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads(json.dumps(found))
    text = (tmp_path / "one.html").read_text()
    page = Tags()
    page.feed(text)
    assert page.open == []
    assert len(set(page.ids)) == len(page.ids)  # of four figures in one page
    assert [link for link in page.links if not link.startswith(("data:", "#"))] == []
    assert not re.findall(r"url\((?!#)|@import", text)
    assert "<script>" not in text
    assert text.count("<svg ") == 4
    assert "prefers-color-scheme: dark" in text
    assert pages.INK not in text
    assert pages.ACCENT not in text
    for value in ("owl", "Reached" if result.reached else "Not reached", "masked-teacher", torch.__version__[:4]):
        assert value in text


def test_without_records_none_is_in_page_or_json(made, tmp_path):
    result, model, posterior, batches, *_ = made
    found = collect(result, model, posterior, batches, records=0, names=["secret-name"] * 23)
    assert found["records"] == []
    save(tmp_path / "one.html", found)
    assert all("secret-name" not in (tmp_path / f"one.{e}").read_text() for e in ("html", "json"))
    assert "Some of the forgotten records" not in (tmp_path / "one.html").read_text()


def test_a_request_with_a_given_lambda_has_a_page_too(made, tmp_path):
    """No level, no probability over the steps; classes of one record; one step."""
    _, model, _, _, inputs, _ = made
    batches = [(inputs[:1], torch.tensor([1]))]
    posterior = Posterior.around(model, 0.1)
    result = forget(model, posterior, batches, request="records", steps=1, kl_weight=0.5, progress=False)
    found = collect(result, model, posterior, batches)
    assert found["reached"] is None
    save(tmp_path / "r", found)
    assert "λ was given" in (tmp_path / "r" / "index.html").read_text()


def test_layers_are_named_by_their_first_number():
    names = {"blocks.0.attn.qkv.weight": 1.0, "blocks.10.norm.bias": 2.0, "blocks.0.norm.weight": 4.0, "head.bias": 8.0,
             "layer1.0.conv1.weight": 16.0, "cls_token": 32.0, "vit.encoder.layer.3.output.weight": 64.0}  # fmt: skip
    assert by_layer(names) == {
        "blocks.0": 5.0, "blocks.10": 2.0, "head": 8.0, "layer1.0": 16.0, "cls_token": 32.0,
        "vit.encoder.layer.3": 64.0,
    }  # fmt: skip
    assert layer_of("weight") == "weight"


@pytest.mark.parametrize(("count", "wanted"), [(5, 12), (12, 12), (13, 12), (1000, 12), (1, 1), (7, 0)])
def test_shown_records_are_spread_and_different(count, wanted):
    found = positions(count, wanted)
    assert len(set(found)) == len(found) == min(count, wanted)
    assert all(0 <= i < count for i in found)
    assert request_report.positions(count, wanted) == sorted(found)

"""Models that are no classifiers: several labels, maps, values; prepared, and forgotten. Batches of one's own form."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import kl_divergence
from torch.utils.data import DataLoader, TensorDataset

from distruction import Posterior, UsageError, forget, objectives, prepare
from distruction.likelihood import Bernoulli, Gaussian
from distruction.task_objectives import Absent, OfPixels, Uninformed

QUIET = {"progress": False}


def batches(x, y):
    return list(zip(x.split(20), y.split(20), strict=True))


def trained(model, x, y, loss_fn):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        loss_fn(model(x), y).backward()
        optimizer.step()
    return model


@pytest.fixture
def several():
    """120 examples of 6 inputs, each with three labels of its own sign."""
    torch.manual_seed(0)
    x = torch.randn(120, 6)
    y = (x[:, :3] > 0).float()
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))
    return trained(model, x, y, F.binary_cross_entropy_with_logits), x, y


def test_a_loss_of_several_labels_is_a_likelihood(several):
    """The paper's rule sees the loss alone: the same numbers as with the likelihood of the same losses."""
    model, x, y = several

    def loss(logits, targets):
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=1).mean()

    given, known = (
        prepare(model, batches(x, y), method="bgd", steps=10, std_init=0.05, **how, **QUIET)
        for how in ({"loss_fn": loss}, {"likelihood": Bernoulli()})
    )
    for name in known:
        torch.testing.assert_close(given.stds[name], known.stds[name], rtol=1e-6, atol=0)
        assert (given.stds[name] < 0.05).any()


def test_one_of_several_labels_is_forgotten(several):
    """On the examples that have it the first label goes; the others stay, also where nothing was read."""
    model, x, y = several
    posterior = prepare(model, batches(x, y), likelihood=Bernoulli(), steps=60, **QUIET)
    where = y[:, 0] == 1

    def without_the_first(logits, targets):
        return F.softplus(logits[:, 0]).mean()

    loader = batches(x[where], y[where])
    with pytest.raises(UsageError, match=r"targets are no class numbers: pass kl_weight"):
        forget(model, posterior, loader, objective=without_the_first, **QUIET)
    forget(model, posterior, loader, objective=without_the_first, kl_weight=0.02, steps=80, **QUIET)
    with torch.no_grad():
        found = (model(x) > 0).float()
    assert found[where, 0].mean() < 0.1
    assert (found[:, 1:] == y[:, 1:]).float().mean() > 0.9


def test_maps_of_labels():
    """Pixels above zero are of class 1; after forgetting none is."""
    torch.manual_seed(0)
    x = torch.randn(40, 1, 6, 6)
    y = (x[:, 0] > 0).long()
    model = trained(nn.Sequential(nn.Conv2d(1, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1)), x, y, F.cross_entropy)
    posterior = prepare(model, batches(x, y), loss_fn=nn.CrossEntropyLoss(), steps=20, **QUIET)

    def all_of_class_0(logits, targets):
        return F.cross_entropy(logits, torch.zeros_like(targets))

    forget(model, posterior, batches(x, y), objective=all_of_class_0, kl_weight=0.02, steps=60, **QUIET)
    assert model(x).argmax(dim=1).float().mean() < 0.05


def test_values():
    """What was learnt on half of the line is drawn to zero, and the other half keeps more of it than it loses."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 80)[:, None]
    y = torch.sin(3 * x)
    model = trained(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), x, y, F.mse_loss)
    posterior = prepare(model, batches(x, y), loss_fn=nn.MSELoss(), steps=60, std_init=0.1, **QUIET)
    right = x[:, 0] > 0
    forget(
        model, posterior, batches(x[right], y[right]), objective=lambda z, t: z.square().mean(), kl_weight=0.05,
        steps=80, **QUIET
    )  # fmt: skip
    with torch.no_grad():
        size = model(x).abs()
    assert size[right].mean() < 0.3 * y[right].abs().mean()
    assert (model(x)[~right] - y[~right]).abs().mean() < 0.5 * y[~right].abs().mean()


# --- several labels -------------------------------------------------------------------------------------


def test_several_labels_with_a_lambda_that_is_found(several):
    """The first label goes from the examples that have it, down to the level; the others are what they were."""
    model, x, y = several
    posterior = prepare(model, batches(x, y), likelihood=Bernoulli(), steps=60, **QUIET)
    assert posterior.metadata["sampled_accuracy"] > 90
    where = y[:, 0] == 1
    with torch.no_grad():
        before = model(x) > 0
    report = forget(model, posterior, batches(x[where], y[where]), objective=Absent(model, posterior, [0]), **QUIET)
    with torch.no_grad():
        after = model(x)
    assert report.reached
    assert report.probability == pytest.approx(after[where, 0].sigmoid().mean().item(), rel=1e-4)
    assert report.probability <= 0.01
    assert ((after > 0)[:, 1:] == before[:, 1:]).float().mean() > 0.95


def test_absent_is_what_it_says(several):
    """Against torch.distributions."""
    model, x, y = several
    posterior = Posterior.around(model, 0.1)
    torch.manual_seed(1)
    z = torch.randn(120, 3)
    going = (y == 1) & torch.tensor([True, False, True])
    with torch.no_grad():
        before, after = (TorchBernoulli(logits=t.double()) for t in (model(x), z))
    absent = -after.log_prob(torch.zeros((), dtype=torch.float64))
    expected = torch.where(going, absent, kl_divergence(before, after)).sum(dim=1).mean()
    found = Absent(model, posterior, [0, 2])(z, y, x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


# --- maps -----------------------------------------------------------------------------------------------


@pytest.fixture
def maps():
    """40 images of 6 x 6 pixels below, between and above two thresholds: three classes."""
    torch.manual_seed(0)
    x = torch.randn(40, 1, 6, 6)
    y = (x[:, 0] > -0.5).long() + (x[:, 0] > 0.5).long()
    model = nn.Sequential(nn.Conv2d(1, 16, 1), nn.Tanh(), nn.Conv2d(16, 3, 1))
    return trained(model, x, y, F.cross_entropy), x, y


def test_maps_are_prepared_as_their_pixels():
    """1/std**2 grows by the Fisher information of a pixel, in closed form; pixels without a label count nothing."""
    torch.manual_seed(0)
    x = torch.randn(50, 1, 4, 4)
    y = (x[:, 0] > 0).long()
    y[:, 0] = -100
    model = nn.Conv2d(1, 2, 1)
    model.weight.data = torch.tensor([[[[-1.0]]], [[[1.0]]]])
    model.bias.data.zero_()
    posterior = prepare(model, batches(x, y), steps=400, std_init=0.02, evidence=500.0, **QUIET)
    pixels = x[:, 0, 1:].flatten().double()
    p = torch.sigmoid(2 * pixels)
    fisher = {"weight": (p * (1 - p) * pixels**2).mean(), "bias": (p * (1 - p)).mean()}
    assert posterior.metadata["loss_per"] == "pixels"
    for name, value in fisher.items():
        precision = posterior.stds[name].double().pow(-2) - 0.02**-2
        expected = 500.0 * 50 * value
        # 400 chi-squares in the mean: a relative error of sqrt(2 / 400) = 0.07 each.
        assert precision.mean() == pytest.approx(expected.item(), rel=0.2)


def test_a_class_goes_from_maps(maps):
    """By the default objective and a lambda that is found: no pixel is of class 2, and the others stay."""
    model, x, y = maps
    posterior = prepare(model, batches(x, y), steps=60, **QUIET)
    assert posterior.metadata["sampled_accuracy"] > 80
    asked = y.masked_fill(y != 2, -100)
    report = forget(model, posterior, batches(x, asked), request="class", **QUIET)
    with torch.no_grad():
        p = model(x).softmax(dim=1)
    assert report.reached
    assert report.probability == pytest.approx(p[:, 2][y == 2].mean().item(), rel=1e-4)
    found = p.argmax(dim=1)
    assert (found[y == 2] == 2).float().mean() < 0.02
    assert (found[y != 2] == y[y != 2]).float().mean() > 0.85
    (request,) = report.posterior.metadata["forgotten"]
    assert request["labels"] == {"2": int((y == 2).sum())}


@pytest.mark.parametrize("name", ["masked-teacher", "uniform-others", "bad-teacher"])
def test_an_objective_of_maps_is_that_of_the_labelled_pixels(maps, name):
    """As if they had been examples of a model that is called for each."""
    model, x, y = maps
    y = y.masked_fill(y == 0, -100)
    posterior = Posterior.around(model, 0.1)
    z = torch.randn(40, 3, 6, 6)
    found = OfPixels(objectives.resolve(name, model, posterior))(z, y, x)
    alone = objectives.resolve(name, model, posterior)
    where = (y != -100).flatten()
    rows, labels = z.permute(0, 2, 3, 1).reshape(-1, 3)[where], y.flatten()[where]
    if hasattr(alone, "teacher"):
        taught = alone.teacher(x).permute(0, 2, 3, 1).reshape(-1, 3)[where]
        alone.teacher = lambda inputs: taught
        expected = alone(rows, labels, None)
    else:
        expected = alone(rows, labels)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    nothing = OfPixels(objectives.resolve(name, model, posterior))(z.requires_grad_(), torch.full_like(y, -100), x)
    assert nothing.item() == 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.zeros(8, 3, dtype=torch.int64), r"maps of them .* it gives \(8, 3\), .* for targets \(8, 3\)"),
        (torch.zeros(8, 2, 2, dtype=torch.int64), r"it gives \(8, 3\), .* for targets \(8, 2, 2\)"),
        (torch.zeros(8, 3), r"must be a vector of int64 class numbers, not torch.float32 \(8, 3\)"),
    ],
)
def test_targets_of_another_kind_are_refused(targets, message):
    model = nn.Linear(4, 3)
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(UsageError, match=message):
        prepare(model, [(torch.randn(8, 4), targets)], steps=2, **QUIET)
    with pytest.raises(UsageError, match=r"labels run from 0 to 7"):
        prepare(nn.Conv2d(1, 3, 1), [(torch.randn(8, 1, 2, 2), torch.arange(8).view(8, 1, 1).expand(8, 2, 2))], **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- values ---------------------------------------------------------------------------------------------


def test_values_with_a_lambda_that_is_found():
    """A hundredth of the targets' variance is left on the right half of the line, and more than half on the left."""
    torch.manual_seed(0)
    x = torch.linspace(-1, 1, 80)[:, None]
    y = torch.sin(3 * x) + 2
    model = trained(nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1)), x, y, F.mse_loss)
    posterior = prepare(model, batches(x, y), likelihood=Gaussian(0.1), steps=60, **QUIET)
    assert posterior.metadata["sampled_accuracy"] is None
    right = x[:, 0] > 0
    report = forget(model, posterior, batches(x[right], y[right]), objective=Uninformed(2.0, 0.1), **QUIET)
    with torch.no_grad():
        z = model(x)
    share = (z - 2)[right].square().mean() / (y - 2)[right].square().mean()
    assert report.reached
    assert report.probability == pytest.approx(share.item(), rel=1e-4)
    assert (z - y)[~right].square().mean() < 0.5 * (y - 2)[~right].square().mean()


# --- adapters -------------------------------------------------------------------------------------------


@dataclass
class Sheet:
    """A batch of one's own form."""

    columns: torch.Tensor
    score: torch.Tensor


class Sheets:
    """Poisson counts."""

    def unpack(self, batch):
        return batch.columns, batch.score

    def losses(self, outputs, targets):
        return F.poisson_nll_loss(outputs[:, 0], targets, reduction="none", full=True)


class Drawn(Sheets):
    """Which also draws counts, and calls a prediction right that rounds to the count."""

    def sample_targets(self, outputs, generator):
        return torch.poisson(outputs[:, 0].exp(), generator=generator)

    def accuracy(self, outputs, targets):
        return outputs[:, 0].exp().round() == targets


def sheets(rows):
    columns, scores = zip(*rows, strict=True)
    return Sheet(torch.stack(columns), torch.stack(scores))


@pytest.fixture
def counted():
    torch.manual_seed(0)
    x = torch.randn(60, 3)
    y = torch.poisson((x[:, 0] + 1).exp())
    adapter = Sheets()
    model = trained(nn.Linear(3, 1), x, y, lambda z, t: adapter.losses(z, t).mean())
    return model, x, y


@pytest.mark.parametrize("method", ["gauss-newton", "bgd"])
def test_batches_of_ones_own_form(counted, method):
    """The same bits as of pairs with the same loss."""
    model, x, y = counted
    data = TensorDataset(x, y)
    how = {"method": method, "steps": 8, "std_init": 0.1, **QUIET}
    own = prepare(model, DataLoader(data, 20, collate_fn=sheets), adapter=Sheets(), **how)
    listed = prepare(model, [Sheet(a, b) for a, b in DataLoader(data, 20)], adapter=Sheets(), **how)
    pairs = prepare(model, DataLoader(data, 20), loss_fn=mean_of_counts if method == "bgd" else Sheets().losses, **how)
    assert own.metadata["examples"] == listed.metadata["examples"] == 60
    for name in pairs:
        assert torch.equal(own.stds[name], pairs.stds[name])
        assert torch.equal(listed.stds[name], pairs.stds[name])


def mean_of_counts(outputs, targets):
    return Sheets().losses(outputs, targets).mean()


def test_an_adapter_that_draws_targets(counted):
    """The precision is the Fisher information of a Poisson, in closed form: its rate times x x."""
    model, x, y = counted
    loader = DataLoader(TensorDataset(x, y), 20, shuffle=True, collate_fn=sheets)
    posterior = prepare(model, loader, adapter=Drawn(), steps=400, std_init=0.02, evidence=500.0, **QUIET)
    with torch.no_grad():
        rate = model(x).exp().double()
    expected = 500.0 * 60 * (rate * x.double() ** 2).mean(dim=0)
    precision = posterior.stds["weight"][0].double().pow(-2) - 0.02**-2
    assert (precision / expected).log().abs().max() < 0.35
    assert 0 < posterior.metadata["sampled_accuracy"] < 100


def test_forgetting_through_an_adapter(counted):
    model, x, y = counted
    loader = DataLoader(TensorDataset(x, y), 20, collate_fn=sheets)
    posterior = prepare(model, loader, adapter=Drawn(), steps=20, **QUIET)
    many = y > 3
    before = model(x[many]).abs().mean().item()
    to_forget = DataLoader(TensorDataset(x[many], y[many]), 20, collate_fn=sheets)
    report = forget(
        model, posterior, to_forget, adapter=Drawn(), objective=lambda z, t: z.square().mean(), kl_weight=0.02,
        steps=100, **QUIET
    )  # fmt: skip
    with torch.no_grad():
        assert model(x[many]).abs().mean() < before * 2 / 3
    assert 0 <= report.history[-1].accuracy <= 100
    with pytest.raises(UsageError, match=r"a batch of the forget set is a Sheet"):
        forget(model, report.posterior, to_forget, **QUIET)


def test_an_adapter_that_is_none(counted):
    model, x, y = counted
    loader = [(x, y)]
    for adapter, message in (
        (object(), r"the adapter object has no method unpack: it needs unpack\(batch\) -> \(inputs, targets\) and"),
        (Sheets, r"the adapter is the class Sheets: pass one made of it"),
    ):
        with pytest.raises(UsageError, match=message):
            prepare(model, loader, adapter=adapter, **QUIET)
    with pytest.raises(UsageError, match=r"the adapter says what the loss is: leave out loss_fn"):
        prepare(model, loader, adapter=Sheets(), loss_fn=F.mse_loss, **QUIET)
    with pytest.raises(UsageError, match=r"is a generator, which can be read once"):
        prepare(model, (Sheet(x, y) for _ in range(1)), adapter=Sheets(), **QUIET)

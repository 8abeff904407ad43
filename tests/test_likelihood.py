"""The signed loss and its likelihoods: against torch.distributions and closed forms; preparation by Gauss-Newton."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from distruction import Posterior, UsageError, prepare
from distruction.likelihood import Bernoulli, Categorical, Gaussian, Given, Likelihood, signed
from distruction.preparation import total_evidence

QUIET = {"progress": False}
D = torch.distributions


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


CASES = {
    "categorical": (Categorical(), (4,), lambda z: D.Categorical(logits=z)),
    "bernoulli": (Bernoulli(), (3,), lambda z: D.Independent(D.Bernoulli(logits=z), 1)),
    "one logit": (Bernoulli(), (), lambda z: D.Bernoulli(logits=z)),
    "gaussian": (Gaussian(0.7), (2,), lambda z: D.Independent(D.Normal(z, 0.7), 1)),
    "one output": (Gaussian(2.0), (), lambda z: D.Normal(z, 2.0)),
}


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_distribution(name):
    likelihood, shape, distribution = CASES[name]
    assert isinstance(likelihood, Likelihood)
    outputs = torch.randn(50, *shape, generator=generator(), dtype=torch.float64)
    targets = likelihood.sample_targets(outputs, generator(1))
    torch.testing.assert_close(
        likelihood.losses(outputs, targets), -distribution(outputs).log_prob(targets), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", CASES)
def test_targets_are_drawn_from_the_prediction(name):
    """Mean and variance of 40,000 draws within 5 standard errors; the same seed draws the same."""
    likelihood, shape, distribution = CASES[name]
    count = 40_000
    outputs = torch.randn(shape or (1,), generator=generator(3), dtype=torch.float64).expand(count, *(shape or (1,)))
    outputs = outputs.reshape(count, *shape)
    targets = likelihood.sample_targets(outputs, generator(4))
    assert torch.equal(targets, likelihood.sample_targets(outputs, generator(4)))
    assert not torch.equal(targets, likelihood.sample_targets(outputs, generator(5)))
    if name == "categorical":
        found = F.one_hot(targets, shape[0]).double().mean(dim=0)
        expected, variance = outputs[0].softmax(dim=-1), outputs[0].softmax(dim=-1) * (1 - outputs[0].softmax(dim=-1))
    else:
        p = distribution(outputs[:1])
        found, expected, variance = targets.double().mean(dim=0), p.mean[0], p.variance[0]
    assert ((found - expected).abs() < 5 * (variance / count).sqrt()).all()


@pytest.mark.parametrize("name", CASES)
def test_the_squared_gradient_has_the_fisher_as_its_mean(name):
    """Of a linear model, whose Fisher is known: sum_c x_i**2 var(d loss / d z_c), averaged over the batch."""
    likelihood, shape, _ = CASES[name]
    x = torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    outputs = math.prod(shape)
    weight = 0.5 * torch.randn(outputs, 3, generator=generator(1), dtype=torch.float64)
    weight.requires_grad_()
    draws = generator(2)
    squares = []
    for _ in range(3000):
        z = (x @ weight.T).reshape(6, *shape)
        (g,) = torch.autograd.grad(signed(likelihood, z, torch.empty(6), draws), weight)
        squares.append(g.square())
    found = torch.stack(squares)
    z = (x @ weight.T).detach()
    if name == "categorical":
        p = z.softmax(dim=-1)
        hessian = p * (1 - p)
    elif isinstance(likelihood, Bernoulli):
        hessian = z.sigmoid() * (1 - z.sigmoid())
    else:
        hessian = torch.full_like(z, 1 / likelihood.noise**2)
    expected = torch.einsum("nc,ni->ci", hessian, x.square()) / 6
    error = found.std(dim=0) / math.sqrt(len(found))
    assert ((found.mean(dim=0) - expected).abs() < 5 * error).all()
    assert (error < 0.05 * expected).all()


# --- losses of one's own ------------------------------------------------------------------------------


def test_bare_losses_per_example():
    logits = torch.randn(5, 3, generator=generator())
    targets = torch.tensor([0, 1, 2, 1, 0])
    expected = F.cross_entropy(logits, targets, reduction="none")
    for loss_fn in (
        F.cross_entropy,
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(reduction="sum"),
        lambda z, y: F.cross_entropy(z, y, reduction="none"),
    ):
        assert torch.equal(Given(loss_fn).losses(logits, targets), expected)
    module = nn.CrossEntropyLoss()
    Given(module)
    assert module.reduction == "mean"
    wide = Given(F.mse_loss).losses(logits, logits + 2)
    torch.testing.assert_close(wide, torch.full((5,), 4.0))
    assert not isinstance(Given(F.cross_entropy), Likelihood)


def classifier():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def batches(count=32, size=8):
    g = generator(9)
    return [
        (torch.randn(size, 4, generator=g), torch.randint(0, 3, (size,), generator=g)) for _ in range(count // size)
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_fn": lambda z, y: F.cross_entropy(z, y)},
            r"one loss per example, \(8,\), .*reduction.*likelihood=.*bgd",
        ),
        ({"loss_fn": F.cross_entropy, "likelihood": Categorical()}, "pass one of them"),
        ({"learn_mean": True}, "learn_mean=True .*method='bgd'"),
        ({"mc_samples": 2}, "mc_samples=2 .*method='bgd'"),
        ({"method": "laplace"}, "method 'laplace' is unknown; choose gauss-newton or bgd"),
        ({"evidence": 0.0}, r"evidence must be > 0 data points, not 0.0; .* training example"),
        ({"evidence": math.inf}, r"evidence must be > 0 data points, not inf; .* training example"),
        ({"num_examples": 0}, "num_examples must be an integer >= 1, not 0"),
        ({"steps": 0}, "steps must be an integer >= 1, not 0"),
        ({"likelihood": Gaussian(1.0)}, r"Gaussian takes targets of the output's shape \(8, 3\), not \(8,\)"),
    ],
)
def test_what_cannot_be_prepared_is_refused(options, message):
    model = classifier()
    before = model.weight.detach().clone()
    with pytest.raises(UsageError, match=message):
        prepare(model, batches(), **{"steps": 4, **options}, **QUIET)
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("noise", [0.0, -1.0, math.inf, math.nan])
def test_noise_out_of_range(noise):
    with pytest.raises(UsageError, match="noise must be > 0 and finite"):
        Gaussian(noise)


# --- the std after preparation ------------------------------------------------------------------------


def test_regression_has_the_precision_of_bayes_rule():
    """Of y = w x + noise, exactly: 1/std**2 = 1/std_init**2 + evidence * sum_n x_n**2 / noise**2."""
    model = nn.Linear(1, 4000, bias=False)
    nn.init.zeros_(model.weight)
    x = torch.randn(16, 1, generator=generator())
    data = [(x[i : i + 4], torch.zeros(4, 4000)) for i in range(0, 16, 4)]
    posterior = prepare(model, data, std_init=0.2, evidence=3.0, likelihood=Gaussian(0.5), steps=40, **QUIET)
    expected = 1 / 0.2**2 + 3.0 * x.square().sum().item() / 0.5**2
    found = posterior.stds["weight"].double() ** -2
    error = (found.std() / math.sqrt(found.numel())).item()
    assert found.mean().item() == pytest.approx(expected, abs=5 * error)
    assert error < 0.02 * expected
    assert posterior.metadata["sampled_accuracy"] is None


def test_logistic_regression_has_the_fisher_averaged_over_the_posterior():
    """Against 1/std_init**2 + evidence * N * E[diag Fisher], with the mean over posteriors on the way in float64.

    The std shrinks while the Fisher is taken at its samples, so the closed form is integrated step by step.
    """
    model = classifier()
    data = batches(32)
    x = torch.cat([b[0] for b in data]).double()
    steps, evidence, std_init = 200, 20.0, 0.5
    runs = [prepare(model, data, std_init=std_init, evidence=evidence, steps=steps, seed=s, **QUIET) for s in range(4)]
    mean = torch.cat([model.weight, model.bias[:, None]], dim=1).detach().double()
    inputs = torch.cat([x, torch.ones(32, 1, dtype=torch.float64)], dim=1)
    precision = torch.full_like(mean, std_init**-2)
    draws = generator(11)
    for step in range(steps):
        rows = inputs.view(4, 8, 5)[step % 4]
        eps = torch.randn(128, 3, 5, generator=draws, dtype=torch.float64)
        p = torch.einsum("ni,kci->knc", rows, mean + eps * precision.rsqrt()).softmax(dim=-1)
        fisher = torch.einsum("knc,ni->ci", p * (1 - p), rows.square()) / (128 * 8)
        precision += evidence * 32 / steps * fisher
    found = torch.stack([torch.cat([r.stds["weight"], r.stds["bias"][:, None]], dim=1).double() ** -2 for r in runs])
    # A chi-square a step: the relative error of a run's gathered precision is about sqrt(2 / steps), times what the
    # inputs' kurtosis adds; the runs themselves say how much.
    error = found.std(dim=0).mean() / math.sqrt(len(runs))
    assert ((found.mean(dim=0) - precision) / precision).mean().abs() < 0.03
    assert (found.mean(dim=0) - precision).abs().max() < 5 * error
    assert (precision > 4 * std_init**-2).all()


def test_evidence_does_not_depend_on_the_steps():
    model = classifier()
    means = []
    for steps in (50, 200):
        stds = prepare(model, batches(), std_init=0.5, evidence=20.0, steps=steps, **QUIET).stds
        means.append(torch.cat([s.flatten() for s in stds.values()]).double().pow(-2).mean().item())
    assert means[0] == pytest.approx(means[1], rel=0.15)


def test_given_targets_say_less_where_the_model_fits():
    """The empirical Fisher of a model that is sure and right vanishes; that of drawn targets does so less."""
    model = nn.Linear(4, 3)
    data = [(x, model(x).argmax(dim=-1)) for x, _ in batches()]
    with torch.no_grad():
        model.weight.mul_(8)
        data = [(x, model(x).argmax(dim=-1)) for x, _ in data]
    stds = [
        prepare(model, data, std_init=0.01, evidence=200.0, steps=100, **options, **QUIET).stds["weight"].mean()
        for options in ({"loss_fn": F.cross_entropy}, {"likelihood": Categorical()})
    ]
    assert stds[0] > stds[1]


def test_metadata_old_and_new(tmp_path):
    posterior = prepare(classifier(), batches(), steps=3, evidence=2.0, **QUIET)
    posterior.save(tmp_path / "p")
    facts = Posterior.load(tmp_path / "p").metadata
    assert (facts["method"], facts["evidence"], facts["examples"], facts["steps_done"]) == ("gauss-newton", 2.0, 32, 3)
    assert total_evidence(facts) == 64.0
    # As version 0.1.0 wrote it: the total, and no examples.
    assert total_evidence({"method": "bgd", "steps": 1000, "evidence": 1_437_000.0}) == 1_437_000.0


def test_backends_agree_on_what_they_prepare():
    """Rounding is not amplified from step to step, as it is by BGD's statistic."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 5))
    data = [(torch.randn(32, 20), torch.randint(5, (32,))) for _ in range(5)]
    stds = []
    for backend in ("reference", "auto"):
        posterior = prepare(model, data, num_examples=160, backend=backend, **QUIET)
        stds.append(torch.cat([s.flatten() for s in posterior.stds.values()]))
    torch.testing.assert_close(stds[0], stds[1], rtol=1e-3, atol=0.0)

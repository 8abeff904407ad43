"""A model's parameters by name in every form that the model takes, its mode, and what no posterior can cover."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations

from distruction import Posterior, PosteriorError, UsageError, forget, modules, prepare
from distruction.modules import learnable, names_within, unwrapped


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
        self.module = nn.Linear(4, 4)  # called as wrappers call what they wrap
        self.head = nn.Linear(4, 2)
        self.head.weight = nn.Parameter(self.module.weight[:2].detach().clone())

    def forward(self, x):
        return self.head(self.module(self.trunk(x)))


def submodule(wrap):
    def form(model):
        model.trunk = wrap(model.trunk)
        return model

    return form


def compiled(model):
    return torch.compile(model, backend="eager")


FORMS = {
    "compiled": compiled,
    "data parallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "checkpointed": checkpoint_wrapper,
    "compiled submodule": submodule(compiled),
    "data parallel submodule": submodule(nn.DataParallel),
    "checkpointed submodule": submodule(checkpoint_wrapper),
    "data parallel of compiled": lambda m: nn.DataParallel(compiled(m)),
    "compiled of data parallel": lambda m: compiled(nn.DataParallel(m)),
    "everything": lambda m: nn.DataParallel(compiled(submodule(lambda t: compiled(checkpoint_wrapper(t)))(m))),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_model_has_its_names_and_loads_its_posterior(form, tmp_path):
    torch.manual_seed(0)
    bare = Net()
    wrapped = FORMS[form](copy.deepcopy(bare))
    assert list(learnable(wrapped)) == [n for n, _ in bare.named_parameters()]
    there = dict(wrapped.named_parameters())
    for name, own in names_within(wrapped).items():
        assert torch.equal(there[own], bare.get_parameter(name))
    posterior = Posterior.around(wrapped, 0.1)
    posterior.save(tmp_path / "p", compress=True)
    Posterior.load(tmp_path / "p", model=bare).sample_(bare, seed=1)
    posterior.sample_(wrapped, seed=1)
    for a, b in zip(bare.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a, b)


def fully_sharded(base):
    """What stands for PyTorch's first FSDP, told by its class's name; it wants an accelerator to be made."""
    names = {"__module__": "torch.distributed.fsdp.fully_sharded_data_parallel"}
    kind = type("FullyShardedDataParallel", (nn.Module,), names)

    class Own(kind):  # of somebody who has extended it
        pass

    made = (kind if base else Own)()
    made.forward = lambda x: made.module(x)
    made._flat_param = nn.Parameter(torch.zeros(5))
    return made


@pytest.mark.parametrize("base", [True, False])
@pytest.mark.parametrize("where", ["model", "trunk"])
def test_flattened_parameters_are_refused(where, base):
    posterior = Posterior.around(Net(), 0.1)
    model = Net()
    outer = fully_sharded(base)
    if where == "model":
        outer.module, model = model, outer
    else:
        outer.module, model.trunk = model.trunk, outer
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
    for use in (
        lambda: Posterior.around(model, 0.1),
        lambda: prepare(model, batches, steps=1, progress=False),
        lambda: forget(model, posterior, batches, steps=1, progress=False),
        lambda: posterior.predict(model, batches[0][0]),
    ):
        message = f"the {where} is" if where == "model" else "trunk is"
        with pytest.raises(UsageError, match=f"{message} a FullyShardedDataParallel, .*fully_shard instead"):
            use()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_is_inside_a_wrapper():
    model = Net()
    assert unwrapped(nn.DataParallel(compiled(checkpoint_wrapper(model)))) is model
    assert unwrapped(model) is model


@pytest.mark.parametrize("parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers_keep_their_names(parametrize):
    model = nn.Sequential(parametrize(nn.Linear(3, 4)))
    assert list(learnable(model)) == [n for n, _ in model.named_parameters()]
    assert list(learnable(submodule(compiled)(nn.ModuleDict({"trunk": model})))) == [
        f"trunk.{n}" for n, _ in model.named_parameters()
    ]


def test_tied_parameters_come_once_through_wrappers():
    model = Net()
    model.module.weight = model.trunk[0].weight = nn.Parameter(torch.zeros(4, 4))
    expected = [n for n, _ in model.named_parameters()]
    model.trunk = compiled(model.trunk)
    assert list(learnable(model)) == expected


def _expanded():
    return nn.Parameter(torch.zeros(1).expand(3))


def _made_in_inference_mode():
    with torch.inference_mode():
        return nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Parameter(torch.zeros(3, dtype=torch.float64)), r"parameter p is torch.float64.*model.float\(\)"),
        (lambda: nn.Parameter(torch.zeros(3, dtype=torch.complex64)), "parameter p is torch.complex64"),
        (lambda: nn.Parameter(torch.zeros(3, device="meta")), "parameter p is on the meta device.*load the model's"),
        (lambda: nn.UninitializedParameter(), "parameter p has no shape yet; run one batch"),
        (_expanded, "parameter p is expanded"),
        (_made_in_inference_mode, "parameter p was made in torch.inference_mode"),
    ],
)
def test_parameters_that_no_posterior_can_cover(make, message):
    model = nn.Module()
    model.p = make()
    posterior = Posterior({"p": torch.zeros(3)}, {"p": torch.ones(3)})
    for act in (
        lambda: Posterior.around(model, 0.1),
        lambda: posterior.check(model),
        lambda: posterior.like(model),
        lambda: posterior.mean_(model),
        lambda: posterior.sample_(model, seed=0),
    ):
        with pytest.raises(UsageError, match=message):
            act()


def test_empty_and_scalar_parameters(tmp_path):
    model = nn.Module()
    model.none, model.one = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.tensor(2.0))
    posterior = Posterior.around(model, 0.1)
    posterior.save(tmp_path / "p", compress=True)
    again = Posterior.load(tmp_path / "p", model=model)
    again.sample_(model, seed=0)
    assert model.one != 2.0
    assert again.kl(posterior) == 0


class Recurrent(nn.Module):
    def __init__(self, kind=nn.LSTM):
        super().__init__()
        self.rnn = kind(3, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.dropout(self.rnn(x)[0][:, -1]))


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_of_cudnn_stay_in_train_mode_without_dropout(kind, monkeypatch):
    model, x = Recurrent(kind), torch.randn(5, 6, 3)
    expected = copy.deepcopy(model).eval()(x)
    monkeypatch.setattr(modules, "_served_by_cudnn", lambda module: True)
    with modules.deterministic(model):
        assert model.rnn.training
        assert not model.dropout.training
        assert torch.equal(model(x), expected)
    assert model.rnn.training
    assert model.rnn.dropout == 0.5
    with torch.no_grad(), modules.deterministic(model.eval()):
        assert not model.rnn.training
    assert not model.rnn.training


class RefusedInEvalMode(torch.autograd.Function):
    """The identity, with cuDNN's rule for its recurrent layers."""

    @staticmethod
    def forward(ctx, x, training):
        ctx.training = training
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if not ctx.training:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        return grad, None


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_classifiers_are_prepared_and_forgotten_from_where_cudnn_serves_them(kind, monkeypatch):
    torch.manual_seed(0)
    model = Recurrent(kind)
    untouched = copy.deepcopy(model)
    examples = torch.utils.data.TensorDataset(torch.randn(12, 6, 3), torch.arange(12) % 2)
    loader = torch.utils.data.DataLoader(examples, batch_size=6)
    quiet = {"steps": 2, "progress": False}
    expected = prepare(untouched, loader, **quiet)
    own = forget(untouched, expected, loader, request="records", level=0.4, **quiet).posterior

    plain = kind.forward

    def served(self, *args, **kwargs):
        out, state = plain(self, *args, **kwargs)
        return RefusedInEvalMode.apply(out, self.training), state

    monkeypatch.setattr(kind, "forward", served)
    monkeypatch.setattr(modules, "_served_by_cudnn", lambda module: True)
    prior = prepare(model, loader, **quiet)
    left = forget(model, prior, loader, request="records", level=0.4, **quiet).posterior
    assert left.metadata["steps_done"] > 0
    # Train mode without dropout computes what eval mode does.
    for a, b in ((expected, prior), (own, left)):
        assert all(torch.equal(a.stds[n], b.stds[n]) and torch.equal(a.means[n], b.means[n]) for n in a)


def test_a_recurrent_layer_with_a_forward_of_its_own_is_refused_on_cudnn(monkeypatch):
    class Own(nn.LSTM):
        def forward(self, x):
            return super().forward(x)

    monkeypatch.setattr(modules, "_served_by_cudnn", lambda module: True)
    model = Recurrent(Own)
    with pytest.raises(UsageError, match=r"Own has a forward of its own.*flags\(enabled=False\)"):
        modules.deterministic(model).__enter__()
    assert model.dropout.training


def test_frozen_parameters_stay_in_the_posterior(tmp_path):
    torch.manual_seed(0)
    model = Net()
    prior = Posterior.around(model, 0.1)
    whole = copy.deepcopy(model)
    prior.sample_(whole, seed=3)
    model.trunk.requires_grad_(False)
    prior.check(model, same_weights=True)
    q = prior.like(model)
    assert list(q) == [n for n in prior if not n.startswith("trunk.")]
    shifted = Posterior({n: m + 0.1 for n, m in q.means.items()}, q.stds)
    # (0.1 / 0.1)**2 / 2 nats for each element that is left.
    assert shifted.kl(prior).item() == pytest.approx(q.numel() / 2, rel=1e-5)
    with pytest.raises(PosteriorError, match="belongs to another model"):
        prior.kl(q)
    q.save(tmp_path / "q")
    assert list(Posterior.load(tmp_path / "q", model=model)) == list(q)
    # What is frozen changes no sample.
    prior.sample_(model, seed=3)
    for a, b in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(PosteriorError, match=r"trunk\.0\.weight differs from its mean"):
        prior.check(model, same_weights=True)
    prior.mean_(model)
    prior.check(model, same_weights=True)
    with pytest.raises(UsageError, match="every parameter of the model is frozen"):
        prior.like(copy.deepcopy(model).requires_grad_(False))
    model.requires_grad_(True)
    with pytest.raises(PosteriorError, match=r"does not cover trunk\.0\.weight, trunk\.0\.bias, .*freeze them again"):
        q.check(model)


def test_forgetting_with_fewer_parameters_than_were_prepared():
    torch.manual_seed(0)
    model = Net()
    examples = torch.utils.data.TensorDataset(torch.randn(8, 3), torch.arange(8) % 2)
    loader = torch.utils.data.DataLoader(examples, batch_size=4)
    prior = prepare(model, loader, steps=2, progress=False)
    model.trunk.requires_grad_(False)
    trunk = copy.deepcopy(model.trunk)
    report = forget(model, prior, loader, steps=2, progress=False)
    assert list(report.posterior) == list(learnable(model))
    assert report.posterior.kl(prior).item() == pytest.approx(report.history[-1].kl, rel=1e-6)
    assert report.history[-1].kl > 0
    assert all(torch.equal(a, b) for a, b in zip(trunk.parameters(), model.trunk.parameters(), strict=True))


def test_a_model_in_float64_is_refused_before_it_changes():
    torch.manual_seed(0)
    model = Net().double()
    before = copy.deepcopy(model.state_dict())
    examples = torch.utils.data.TensorDataset(torch.randn(8, 3).double(), torch.arange(8) % 2)
    loader = torch.utils.data.DataLoader(examples, batch_size=4)
    for backend in ("auto", "reference"):
        with pytest.raises(UsageError, match=r"trunk\.0\.weight is torch\.float64.*model\.float\(\)"):
            prepare(model, loader, steps=2, backend=backend, progress=False)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_channels_last(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    assert not last[0].weight.is_contiguous()
    posterior = Posterior.around(plain, 0.1)
    strided = {n: torch.full_like(p, 0.1).detach() for n, p in last.named_parameters()}
    other = Posterior({n: p.detach().clone() for n, p in last.named_parameters()}, strided)
    assert other.kl(posterior).item() == pytest.approx(0, abs=1e-9)
    posterior.sample_(plain, seed=0)
    other.sample_(last, seed=0)
    assert not last[0].weight.is_contiguous()
    for a, b in zip(plain.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)
    other.save(tmp_path / "p")
    assert Posterior.load(tmp_path / "p").fingerprint() == other.fingerprint() == posterior.fingerprint()


def test_tensors_that_share_memory_are_saved(tmp_path):
    flat = torch.arange(1.0, 13.0)
    tensors = {"a": flat[:6].view(2, 3), "b": flat[3:9], "c": flat, "d": flat, "e": torch.ones(1).expand(3)}
    Posterior(tensors, tensors).save(tmp_path / "p")
    again = Posterior.load(tmp_path / "p")
    for name, t in tensors.items():
        assert torch.equal(again.means[name], t)
        assert torch.equal(again.stds[name], t)


def test_import_needs_nothing_heavy():
    heavy = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "rich", "timm", "scipy", "sklearn")
    code = "import sys, torch; base = set(sys.modules); import distruction; print(*set(sys.modules) - base)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "distruction.posterior" in loaded
    assert not set(heavy) & set(loaded)


def test_the_folder_of_kernels_is_importable_by_its_own_name():
    """transformers looks for a package `kernels`; from the repository's root it finds this folder."""
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", "import kernels"], cwd=root, check=True)

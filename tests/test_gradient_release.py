"""Gradients that the backward pass takes and drops: the bits of an ordinary step, and what does not go with it."""

import copy
import gc
import math
import pickle

import pytest
import torch
from torch import nn

from distruction import BGD, NonFiniteError, Posterior, UsageError


class Tied(nn.Module):
    """A tied weight, a frozen one, one that is not contiguous, and a layer that only every other batch uses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.transposed = nn.Parameter(torch.randn(6, 6).t())
        self.sometimes = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x, odd):
        x = self.second(torch.tanh(self.first(x)))
        x = self.frozen(x) @ self.transposed
        return self.head(self.sometimes(x) if odd else x)


def make(release, *, prior=False, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    if prior:
        options |= {"prior": Posterior.around(model, 0.05), "kl_weight": 0.2}
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return model, BGD(named, data_per_step=16, release_gradients=release, **options)


def backward(model, i):
    g = torch.Generator().manual_seed(i)
    x, y = torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)
    x = x.to(model.head.weight.dtype)
    nn.functional.cross_entropy(model(x, i % 4 > 1), y).backward()


def train(model, opt, steps):
    opt.train()
    kls = []
    for i in steps:
        opt.zero_grad()
        backward(model, i)
        opt.step()
        kls.append(-1.0 if opt.kl is None else opt.kl.item())
    return kls


def bits(model, opt):
    states = [s for p in model.parameters() for s in opt.state.get(p, {}).values()]
    return [*states, *(p.detach() for p in model.parameters())]


def assert_same(a, b):
    assert len(a) == len(b)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("options", [{}, {"mc_samples": 2}, {"mc_samples": 3, "antithetic": False}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_an_ordinary_step(prior, options, dtype):
    (model, opt), (expected, reference) = (make(r, prior=prior, dtype=dtype, **options) for r in (True, False))
    kls, expected_kls = train(model, opt, range(12)), train(expected, reference, range(12))
    assert_same(bits(model, opt), bits(expected, reference))
    assert kls == pytest.approx(expected_kls, rel=1e-12)
    assert (kls[-1] > 0) == prior
    assert opt.state_dict()["param_groups"][0]["draw"] == reference.state_dict()["param_groups"][0]["draw"] == 12


def test_a_closure_takes_all_its_samples():
    results = []
    for release in (True, False):
        model, opt = make(release, mc_samples=4)

        def closure(model=model, opt=opt):
            opt.zero_grad()
            backward(model, 3)

        for _ in range(3):
            opt.step(closure)
        with opt.sampled_params():
            closure()
        opt.step()
        results.append(bits(model, opt))
    assert_same(*results)


def test_no_gradient_outlives_its_backward():
    model, opt = make(True)
    opt.train()
    alive, most = set(), []

    def count(p):
        alive.update(n for n, q in model.named_parameters() if q.grad is not None)
        most.append(len(alive))
        alive.clear()

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(count)  # runs after the optimizer's
    backward(model, 3)
    assert max(most) <= 1
    assert all(p.grad is None for p in model.parameters())


def test_gradients_at_the_means_are_left_alone():
    model, opt = make(True)
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0)
    assert model.head.weight.grad is not None
    assert_same(before, [p.detach() for p in model.parameters()])
    opt.train()
    opt.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    del opt
    gc.collect()
    backward(model, 0)
    assert model.head.weight.grad is not None
    assert_same(before, [p.detach() for p in model.parameters()])
    assert not model.head.weight._post_accumulate_grad_hooks


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_release_too_and_resume_with_the_same_bits(clone):
    model, opt = make(True, mc_samples=2)
    train(model, opt, range(3))
    other, other_opt = clone((model, opt))
    third, third_opt = make(True, mc_samples=2)
    third_opt.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (other, other_opt), (third, third_opt)):
        train(m, o, range(3, 8))
    assert_same(bits(model, opt), bits(other, other_opt))
    assert_same(bits(model, opt), bits(third, third_opt))


def test_what_does_not_go_with_it():
    model, opt = make(True)
    opt.train()
    backward(model, 0)
    with pytest.raises(UsageError, match=r"call step\(\) first"):
        opt.state_dict()
    with pytest.raises(UsageError, match="a second backward pass reached a parameter before step"):
        backward(model, 0)
    model, opt = make(True)
    opt.train()
    backward(model, 0)
    opt.found_inf = torch.zeros(())
    with pytest.raises(UsageError, match="GradScaler needs the gradients of the whole model"):
        opt.step()


def test_non_finite_gradients_are_named():
    model, opt = make(True)
    opt.train()
    before = {n: p.detach().clone() for n, p in opt.posterior().means.items()}
    model.head.weight.register_hook(lambda g: g * math.nan)
    backward(model, 0)
    with pytest.raises(NonFiniteError, match=r"^the gradient of head\.weight is NaN or infinite"):
        opt.step()
    after = opt.posterior().means
    assert torch.equal(before["head.weight"], after["head.weight"])
    assert not torch.equal(before["first.weight"], after["first.weight"])
    backward(model, 1)
    with pytest.raises(NonFiniteError, match=r"^the gradient of head\.weight is"):
        opt.step()


def test_a_sparse_gradient_is_refused_before_anything_changes():
    model = nn.Embedding(4, 3, sparse=True)
    opt = BGD(model.parameters(), release_gradients=True)
    opt.train()
    with pytest.raises(UsageError, match="the gradient of parameter 0 is sparse"):
        model(torch.tensor([1])).sum().backward()

"""Posteriors in fewer bytes: the stated error bound, the file that shares its means, and a streamed prior."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from distruction import BGD, Posterior, PosteriorError, UsageError, forget, ops, prepare
from distruction.compression import BLOCK, LogCodes
from distruction.optim import update

positive = st.floats(2.0**-99, 2.0**99, width=32)


def widest_block(values):
    """max / min of the block where it is largest, by NumPy in float64."""
    flat = values.double().numpy().reshape(-1)
    return max(block.max() / block.min() for block in np.split(flat, range(BLOCK, flat.size, BLOCK)))


def assert_within_bound(values):
    codes = LogCodes.encode(values)
    restored = codes.decode()
    assert restored.shape == values.shape
    error = ((restored.double() - values.double()).abs() / values.double()).max().item()
    stated = math.expm1(math.log(widest_block(values)) / 510)
    # float32 carries the logs, of up to 70, and their quotients.
    assert error <= stated + 2e-5
    assert codes.error_bound() == pytest.approx(stated, rel=1e-4, abs=2e-5)


@settings(deadline=None, max_examples=200)
@given(st.lists(positive, min_size=1, max_size=40))
def test_error_bound_of_any_positive_values(values):
    assert_within_bound(torch.tensor(values))


@pytest.mark.parametrize("shape", [(1,), (), (BLOCK,), (BLOCK + 1,), (7, 1000), (3, BLOCK), (64, 3, 4, 4)])
def test_error_bound_over_blocks(shape):
    g = torch.Generator().manual_seed(len(shape))
    values = 0.1 * 10 ** (-2 * torch.rand(shape, generator=g))
    assert_within_bound(values)
    assert LogCodes.encode(values).error_bound() < math.expm1(math.log(100) / 510) < 0.0091
    order = values.reshape(-1).sort().values
    assert (LogCodes.encode(order).decode().diff() >= 0).all() or order.numel() > BLOCK


def test_a_constant_is_exact_and_a_smallest_value_too():
    values = torch.full((5000,), 0.1)
    assert torch.equal(LogCodes.encode(values).decode(), values)
    values[::3] = 0.002
    restored = LogCodes.encode(values).decode()
    assert torch.equal(restored[::3], values[::3])
    torch.testing.assert_close(restored, values, rtol=1e-6, atol=0)
    assert LogCodes.encode(torch.empty(0, 3)).decode().shape == (0, 3)


def test_encoding_what_was_decoded_changes_nothing():
    values = 0.1 * 10 ** (-2 * torch.rand(3000, generator=torch.Generator().manual_seed(0)))
    once = LogCodes.encode(values).decode()
    torch.testing.assert_close(LogCodes.encode(once).decode(), once, rtol=1e-6, atol=0)


def make(width=64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, 3))
    stds = {n: 0.1 * 10 ** (-torch.rand_like(p)) for n, p in model.named_parameters()}
    x, y = torch.randn(40, 20), torch.arange(40) % 3
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20)
    return model, Posterior.around(model, stds), loader


def test_bytes_per_parameter(tmp_path):
    _, posterior, _ = make(1024)
    n = posterior.numel()
    assert posterior.nbytes == 8 * n
    assert 5 <= posterior.compress().nbytes / n < 5.02
    assert 3 <= posterior.compress(mean="bfloat16").nbytes / n < 3.02
    assert posterior.compress(std="bfloat16").nbytes == 6 * n
    posterior.save(tmp_path / "p", compress=True)
    assert 1 <= (tmp_path / "p").stat().st_size / n < 1.1


def test_a_compressed_file_shares_its_means_with_the_checkpoint(tmp_path):
    model, posterior, _ = make()
    posterior.metadata["note"] = [1, 2]
    path = tmp_path / "p"
    posterior.save(path, compress=True)
    again = Posterior.load(path, model=model)
    assert list(again) == list(posterior)
    assert again.metadata == posterior.metadata
    kept = posterior.compress()
    for name in posterior:
        assert torch.equal(again.means[name], posterior.means[name])
        assert torch.equal(again.stds[name], kept.stds[name])
        torch.testing.assert_close(again.stds[name], posterior.stds[name], rtol=0.0046, atol=0)
    again.check(model, same_weights=True)
    # Its means are copies: unlearning changes the model's.
    nn.init.zeros_(model[0].weight)
    assert torch.equal(again.means["0.weight"], posterior.means["0.weight"])
    with pytest.raises(PosteriorError, match=r"was prepared for other weights: their SHA-256 differs.*--previous"):
        Posterior.load(path, model=model)
    with pytest.raises(PosteriorError, match=r"is compressed: .* pass the model that holds them as model="):
        Posterior.load(path)
    with pytest.raises(PosteriorError, match="belongs to another model"):
        Posterior.load(path, model=nn.Linear(3, 4))
    # Saved again, whole or compressed, it is the same.
    again.save(tmp_path / "q", compress=True)
    assert (tmp_path / "q").read_bytes() == path.read_bytes()
    again.save(tmp_path / "whole")
    whole = Posterior.load(tmp_path / "whole")
    assert all(torch.equal(whole.stds[n], again.stds[n]) for n in whole)
    assert whole.nbytes == 8 * whole.numel()


def test_unknown_storage():
    _, posterior, _ = make()
    with pytest.raises(UsageError, match=r"std='float16' is unknown; choose float32, bfloat16, log8"):
        posterior.compress(std="float16")
    with pytest.raises(UsageError, match=r"mean='log8' is unknown; choose float32, bfloat16$"):
        posterior.compress(mean="log8")


def test_bfloat16_means_still_belong_to_their_model(tmp_path):
    model, posterior, loader = make()
    small = posterior.compress(std="bfloat16", mean="bfloat16")
    small.check(model, same_weights=True)
    forget(model, small, loader, steps=2, progress=False)
    with pytest.raises(UsageError, match="the means are in bfloat16"):
        small.save(tmp_path / "p", compress=True)


@pytest.mark.parametrize("release", [False, True])
@pytest.mark.parametrize("mc_samples", [1, 2])
@pytest.mark.parametrize("std", ["log8", "bfloat16"])
def test_a_compressed_prior_gives_the_bits_of_the_prior_that_it_restores_to(monkeypatch, std, mc_samples, release):
    monkeypatch.setattr(update, "STREAMED_ELEMENTS", 100)  # so that the model takes several pieces
    results = []
    for compressed in (True, False):
        model, posterior, loader = make()
        prior = posterior.compress(std=std, mean="bfloat16")
        if not compressed:
            prior = Posterior({n: m.clone() for n, m in prior.means.items()}, dict(prior.stds))
            assert prior.at_hand(torch.device("cpu"))
        opt = BGD(
            model.named_parameters(),
            std_init=posterior,
            prior=prior,
            kl_weight=0.3,
            data_per_step=20,
            mc_samples=mc_samples,
            release_gradients=release and compressed,
        )
        opt.train()
        for _ in range(4):
            for x, y in loader:
                opt.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                opt.step()
        results.append(([t for pair in opt.posterior().values() for t in pair], opt.kl.item()))
    (ours, our_kl), (theirs, their_kl) = results
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert our_kl == pytest.approx(their_kl, rel=1e-12)


def test_a_refused_update_in_one_piece_is_reported(monkeypatch):
    monkeypatch.setattr(update, "STREAMED_ELEMENTS", 1)
    model, posterior, _ = make()
    opt = BGD(model.named_parameters(), prior=posterior.compress(std="bfloat16"), kl_weight=0.3)
    opt.train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[0].bias.grad[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"the gradient of 0\.bias is NaN"):
        opt.step()
    assert opt.state_dict()["param_groups"][0]["draw"] == 1


@pytest.mark.parametrize("mean", ["float32", "bfloat16"])
def test_forgetting_reads_the_codes_and_gets_the_bits_of_what_they_restore_to(monkeypatch, mean):
    calls = []
    step = ops.step
    monkeypatch.setattr(ops, "step", lambda *args, **kwargs: (calls.append(args[2]), step(*args, **kwargs))[1])
    results = []
    for restored in (False, True):
        model, posterior, loader = make()
        prior = posterior.compress(mean=mean)
        assert prior.at_hand(torch.device("cpu"))
        assert not prior.at_hand(torch.device("meta"))
        if restored:
            prior = Posterior({n: m.clone() for n, m in prior.means.items()}, dict(prior.stds))
        prior.mean_(model)
        forget(model, prior, loader, kl_weight=0.1, steps=5, progress=False)
        assert all(bool(state.prior_codes) is not restored and bool(state.prior_std) is restored for state in calls)
        assert len(calls) == 5
        calls.clear()
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_forgetting_with_codes_is_near_forgetting_without():
    model, _, loader = make()
    posterior = prepare(model, loader, steps=30, progress=False)
    results = {}
    for kept in (posterior, posterior.compress()):
        posterior.mean_(model)
        results[kept.nbytes] = forget(model, kept, loader, kl_weight=0.1, steps=20, progress=False)
    (whole, coded) = (results[n].history[-1] for n in sorted(results, reverse=True))
    assert coded.kl == pytest.approx(whole.kl, rel=0.01)
    assert coded.loss == pytest.approx(whole.loss, rel=0.01)

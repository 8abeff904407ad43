"""What each rank of `test_distributed.py` runs: functions ``check_*(world, folder)``, all in one process group.

Importing torch takes longer than any check, so that one start of the processes serves them all. ``folder`` is shared
by the ranks and by the world sizes, which run in ascending order.
"""

import copy
import itertools
import math
import os
import signal
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import texts
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from distruction import (
    BGD,
    NonFiniteError,
    Posterior,
    PosteriorError,
    RankError,
    Step,
    UsageError,
    distributed,
    forget,
    prepare,
)
from distruction.objectives import MaskedTeacher
from distruction.sharding import Pieces, average_by_dividing

QUIET = {"progress": False}
PREPARE = {"steps": 12, "std_init": 0.1, **QUIET}
FORGET = {"steps": 8, "kl_weight": 0.1, **QUIET}
AUTOMATIC = {"steps": 12, "request": "class", **QUIET}


def make_model(seed=0):
    """Uneven everywhere: of two ranks and of three, some hold more rows than others, and the scalar-like bias none."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 3))


def examples(count=22):
    g = torch.Generator().manual_seed(5)
    return torch.randn(count, 5, generator=g), torch.arange(count) % 3


def make_loader(sampler=None):
    """Batches of 8, 8 and 6: the last one is split unevenly between two ranks and three."""
    data = torch.utils.data.TensorDataset(*examples())
    return torch.utils.data.DataLoader(data, batch_size=8, sampler=sampler, shuffle=sampler is None)


def wrap(model, how):
    if how == "ddp":
        return DistributedDataParallel(model)
    if how == "fsdp":
        for module in (model[0], model[3], model):
            fully_shard(module)
    return model


def own_rows(count):
    rank, world = dist.get_rank(), dist.get_world_size()
    return slice(rank * count // world, (rank + 1) * count // world)


def train_steps(model, opt, steps, *, rows=slice(None), scale=1.0):
    x, y = examples(12)
    for step in steps:
        g = torch.Generator().manual_seed(step)
        order = torch.randperm(12, generator=g)[rows]
        opt.zero_grad()
        (scale * nn.functional.cross_entropy(model(x[order]), y[order])).backward()
        opt.step()


def assert_near(ours, expected):
    assert list(ours) == list(expected)
    for name in expected:
        for a, b in zip(ours[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def assert_equal(ours, expected):
    assert list(ours) == list(expected)
    for name in expected:
        for a, b in zip(ours[name], expected[name], strict=True):
            assert torch.equal(a, b)


def on_rank_0(t):
    """Rank 0's tensor, everywhere."""
    t = t.detach().clone()
    dist.broadcast(t, 0)
    return t


# --- the optimizer ------------------------------------------------------------------------------------


def check_ddp_holds_the_same_bits_without_communication(world, folder):
    model = DistributedDataParallel(make_model())
    opt = BGD(model.module.named_parameters(), std_init=0.1, data_per_step=12, mc_samples=2)
    opt.train()
    train_steps(model, opt, range(6), rows=own_rows(12))
    with CommDebugMode() as communication:
        opt.step()
        opt.eval()
        opt.train()
    assert communication.get_total_counts() == 0
    for p in model.parameters():
        assert torch.equal(p.detach(), on_rank_0(p))
    alone = make_model()
    other = BGD(alone.named_parameters(), std_init=0.1, data_per_step=12, mc_samples=2)
    other.train()
    train_steps(alone, other, range(6))
    other.step()
    assert_near(opt.posterior(), other.posterior())


def check_fully_shard_draws_the_same_bits_and_learns_the_same(world, folder):
    whole = make_model()
    prior = Posterior.around(whole, 0.1)
    for mc_samples in (1, 2):
        options = {"std_init": prior, "kl_weight": 0.1, "data_per_step": 12, "mc_samples": mc_samples}
        alone, model = make_model(), wrap(make_model(), "fsdp")
        average_by_dividing(model)
        opt = BGD(model.named_parameters(), prior=prior.like(model), **options)
        other = BGD(alone.named_parameters(), prior=prior, **options)
        for draw in range(3):
            for o in (opt, other):
                o.param_groups[0]["draw"] = draw
                o._counters[0].tensor = None
                o.train()
            for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                assert torch.equal(p.full_tensor(), q.detach())
        for o in (opt, other):
            o.param_groups[0]["draw"] = 0
            o._counters[0].tensor = None
            o.train()
        train_steps(model, opt, range(6), rows=own_rows(12))
        train_steps(alone, other, range(6))
        posterior = opt.posterior()
        assert_near(posterior.gathered(), other.posterior())
        assert opt.kl.item() == pytest.approx(other.kl.item(), rel=1e-4)
        # The reduction over shards itself, against the same posterior in one piece.
        assert opt.kl.item() == pytest.approx(posterior.gathered().kl(prior).item(), rel=1e-6)
        assert posterior.kl(prior.like(model)).item() == pytest.approx(opt.kl.item(), rel=1e-6)
        assert posterior.largest_std() == posterior.gathered().largest_std()
        state = opt.state[next(iter(model.parameters()))]
        assert all(isinstance(t, DTensor) and t.placements == (Shard(0),) for t in state.values())


def check_any_placement_draws_the_same_bits(world, folder):
    mesh = init_device_mesh("cpu", (world,))
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator().manual_seed(1)
        wholes = [torch.randn(shape, generator=g).to(dtype) for shape in ((6, 5), (4, 3, 5), (2,), (7, 2), (3,))]
        placements = [[Shard(1)], [Shard(1)], [Shard(0)], [Replicate()], None]
        gradients = [torch.randn(t.shape, generator=g).to(dtype) for t in wholes]

        def place(t, how):
            t = t.clone()  # a replica would share its memory, and a sampled parameter change the prior
            return t if how is None else distribute_tensor(t, mesh, how, src_data_rank=None)

        alone = [nn.Parameter(t.clone()) for t in wholes]
        spread = [nn.Parameter(place(t, how)) for t, how in zip(wholes, placements, strict=True)]
        names = [f"p{i}" for i in range(len(wholes))]
        means = {n: t.float() for n, t in zip(names, wholes, strict=True)}
        prior = Posterior(means, {n: torch.full_like(t, 0.2) for n, t in means.items()})
        opts = []
        for params in (alone, spread):
            opts.append(BGD(list(zip(names, params, strict=True)), std_init=0.1, mc_samples=2, prior=prior,
                            kl_weight=0.2, stochastic_rounding=True))  # fmt: skip
            opts[-1].train()
        for _ in range(4):
            for p, q, gradient, how in zip(alone, spread, gradients, placements, strict=True):
                p.grad, q.grad = gradient.clone(), place(gradient, how)
            for opt in opts:
                opt.step()
            for p, q in zip(alone, spread, strict=True):
                held = q.full_tensor() if isinstance(q, DTensor) else q
                assert torch.equal(p.detach(), held.detach())
        assert opts[1].kl.item() == pytest.approx(opts[0].kl.item(), rel=1e-12)
        assert_equal(opts[1].posterior().gathered(), opts[0].posterior())


def check_a_step_reads_the_codes_of_its_shards(world, folder):
    mesh = init_device_mesh("cpu", (world,))
    g = torch.Generator().manual_seed(1)
    # Shards begin within the blocks of 1024 codes, and some in the rows of one.
    wholes = [torch.randn(shape, generator=g) for shape in ((40, 50), (3, 700), (2500,), (30, 40), (1500,))]
    placements = [[Shard(1)], [Shard(1)], [Shard(0)], [Replicate()], None]
    gradients = [torch.randn(t.shape, generator=g) for t in wholes]

    def place(t, how):
        return t.clone() if how is None else distribute_tensor(t.clone(), mesh, how, src_data_rank=None)

    means = {f"p{i}": t for i, t in enumerate(wholes)}
    stds = {n: 0.2 * torch.exp(torch.randn(t.shape, generator=g)) for n, t in means.items()}
    for mean in ("float32", "bfloat16"):
        whole = Posterior(means, stds).compress(mean=mean)
        models = [nn.Module() for _ in range(2)]
        for model, spread in zip(models, (False, True), strict=True):
            for (n, t), how in zip(means.items(), placements, strict=True):
                model.register_parameter(n, nn.Parameter(place(t, how if spread else None)))
        parts = [whole.like(model) for model in models]
        assert [part.is_sharded() for part in parts] == [False, True]
        assert all(part.is_in_codes() and part.nbytes == whole.nbytes for part in parts)
        assert_equal(parts[1].gathered(), whole)
        assert parts[1].gathered().fingerprint() == whole.fingerprint()
        assert_equal(parts[1].like(models[0]), whole)
        opts = [BGD(model.named_parameters(), std_init=0.1, mc_samples=2, prior=part, kl_weight=0.2)
                for model, part in zip(models, parts, strict=True)]  # fmt: skip
        for opt in opts:
            opt.train()
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr("distruction.compression.LogCodes.decode")
            for _ in range(4):
                for p, q, gradient, how in zip(*(m.parameters() for m in models), gradients, placements, strict=True):
                    p.grad, q.grad = place(gradient, None), place(gradient, how)
                for opt in opts:
                    opt.step()
        assert opts[1].kl.item() == pytest.approx(opts[0].kl.item(), rel=1e-8)
        assert_equal(opts[1].posterior().gathered(), opts[0].posterior())


def check_partial_gradients_are_summed(world, folder):
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (world,))
    p = nn.Parameter(distribute_tensor(torch.zeros(4), mesh, [Replicate()], src_data_rank=None))
    q = nn.Parameter(torch.zeros(4))
    opts = [BGD([t], std_init=0.1) for t in (p, q)]
    for opt in opts:
        opt.train()
    p.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    q.grad = torch.full((4,), float(world))
    for opt in opts:
        opt.step()
    assert torch.equal(p.to_local(), q)


def check_ranks_with_draws_of_their_own_are_one_process_with_more_samples(world, folder):
    for mc_samples in (1, 2):
        common = {"std_init": 0.1, "data_per_step": 12}
        model, alone = make_model(), make_model()
        opt = BGD(model.named_parameters(), mc_samples=mc_samples, sample_group=dist.group.WORLD, **common)
        other = BGD(alone.named_parameters(), mc_samples=world * mc_samples, **common)
        opt.train()
        other.train()
        drawn = []
        for step in range(4):
            for k in range(world * mc_samples):
                if k // mc_samples == dist.get_rank():
                    # Sample k of the update is draw base + k, whoever takes it.
                    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
                        if step == 0:
                            assert torch.equal(p.detach(), q.detach())
                        torch.testing.assert_close(p.detach(), q.detach(), atol=1e-6, rtol=1e-6)
                    drawn.append(step)
                    train_steps(model, opt, [step])
                train_steps(alone, other, [step])
        assert len(drawn) == 4 * mc_samples
        assert_near(opt.posterior(), other.posterior())
        assert opt.state_dict()["param_groups"][0]["draw"] == other.state_dict()["param_groups"][0]["draw"]
        for p in opt.posterior().values():
            for t in p:
                assert torch.equal(t, on_rank_0(t))
        again = BGD(model.named_parameters(), mc_samples=mc_samples, sample_group=dist.group.WORLD, **common)
        held = [p.detach().clone() for p in model.parameters()]
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        for p, before in zip(model.parameters(), held, strict=True):
            assert torch.equal(p.detach(), before)


def check_draws_of_their_own_with_missing_and_overflowing_gradients(world, folder):
    first, last = dist.get_rank() == 0, dist.get_rank() == world - 1
    model, alone = make_model(), make_model()
    opt = BGD(model.named_parameters(), std_init=0.1, sample_group=dist.group.WORLD)
    other = BGD(alone.named_parameters(), std_init=0.1, mc_samples=world)
    opt.train()
    other.train()
    for k in range(world):
        for o, m, there in ((other, alone, True), (opt, model, k == dist.get_rank())):
            if there:
                o.zero_grad()
                # The last layer gets a gradient from the first sample alone.
                (m(examples()[0]) if k == 0 else m[0](examples()[0])).square().sum().backward()
                o.step()
    assert_near(opt.posterior(), other.posterior())

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = opt.posterior()
    held = [p.detach().clone() for p in model.parameters()]
    opt.zero_grad()
    scaler.scale(model(examples()[0]).square().sum()).backward()
    if last:
        model[0].weight.grad[0, 0] = math.inf
    scaler.step(opt)
    scaler.update()
    assert_equal(opt.posterior(), before)
    for p, t in zip(model.parameters(), held, strict=True):
        assert torch.equal(p.detach(), t)
    if first:
        model[0].weight.grad.zero_()
    with pytest.raises(UsageError, match="sample_group"):
        copy.deepcopy(opt)
    with pytest.raises(UsageError, match="spread over ranks"):
        BGD(wrap(make_model(), "fsdp").parameters(), sample_group=dist.group.WORLD)


def check_pairs_hold_when_a_sample_of_one_rank_overflows(world, folder):
    """Draws of their own, two an update: the overflowed call might as well never have been."""
    runs = []
    for overflows in ((), (0, 3)):
        p = nn.Parameter(torch.zeros(5))
        opt = BGD([p], std_init=0.1, max_std=math.inf, mc_samples=2, data_per_step=10.0, sample_group=dist.group.WORLD)
        opt.train()
        for i in range(8):
            for overflow in (True, False) if i in overflows else (False,):
                there = overflow and dist.get_rank() == world - 1
                p.grad = torch.full_like(p, math.inf if there else 1.0 + i // 2)
                opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor([float(there)])
                opt.step()
        opt.eval()
        runs.append([p.detach().clone(), opt.state[p]["std"].clone()])
        assert opt.state_dict()["param_groups"][0]["draw"] == 8 * world
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(runs[1][1], torch.full((5,), 0.1), rtol=1e-5, atol=0)


def check_squared_gradients_are_those_of_one_process(world, folder):
    """Shards draw and square the same bits; the wrappers' averages are close to one process's gradients."""
    options = {"statistic": "gauss-newton", "learn_mean": False, "std_init": 0.1, "data_per_step": 50.0}
    alone = make_model()
    other = BGD(alone.named_parameters(), **options)
    other.train()
    train_steps(alone, other, range(5))
    for how in ("ddp", "fsdp"):
        model = wrap(make_model(), how)
        average_by_dividing(model)
        opt = BGD((model.module if how == "ddp" else model).named_parameters(), **options)
        opt.train()
        train_steps(model, opt, range(5), rows=own_rows(12))
        assert_near(opt.posterior().gathered(), other.posterior())
    # With the same gradients, to the bit.
    mesh = init_device_mesh("cpu", (world,))
    g = torch.Generator().manual_seed(1)
    wholes = [torch.randn(shape, generator=g) for shape in ((6, 5), (2,), (4, 3))]
    slopes = [torch.randn(t.shape, generator=g) for t in wholes]
    one = [nn.Parameter(t.clone()) for t in wholes]
    spread = [nn.Parameter(distribute_tensor(t.clone(), mesh, [how], src_data_rank=None))
              for t, how in zip(wholes, (Shard(0), Shard(0), Shard(1)), strict=True)]  # fmt: skip
    opts = [BGD(params, **options) for params in (one, spread)]
    for opt in opts:
        opt.train()
    for _ in range(3):
        for p, q, slope in zip(one, spread, slopes, strict=True):
            p.grad = slope.clone()
            q.grad = distribute_tensor(slope.clone(), mesh, q.placements, src_data_rank=None)
        for opt in opts:
            opt.step()
        for p, q in zip(one, spread, strict=True):
            assert torch.equal(p.detach(), q.full_tensor().detach())
            assert torch.equal(opts[0].state[p]["std"], opts[1].state[q]["std"].full_tensor())
    with pytest.raises(UsageError, match="needs sample_group=None"):
        BGD(make_model().parameters(), sample_group=dist.group.WORLD, **options)


def check_nan_on_one_rank_stops_all_with_update_and_name(world, folder):
    model = wrap(make_model(), "fsdp")
    opt = BGD(model.named_parameters(), std_init=0.1)
    opt.train()
    train_steps(model, opt, range(3), rows=own_rows(12))
    opt.zero_grad()
    model(examples()[0]).sum().backward()
    if dist.get_rank() == world - 1:
        model[3].weight.grad.to_local().fill_(math.nan)
    with pytest.raises(NonFiniteError, match=r"the gradient of 3.weight is NaN or infinite \(found after update 4\)"):
        opt.step()
    opt.eval()


def check_an_overflow_on_one_rank_skips_the_step_on_all(world, folder):
    model = wrap(make_model(), "fsdp")
    opt = BGD(model.named_parameters(), std_init=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    opt.train()
    held = [p.full_tensor().clone() for p in model.parameters()]
    for overflow in (True, False):
        opt.zero_grad()
        scaler.scale(model(examples()[0]).square().mean()).backward()
        if overflow and dist.get_rank() == world - 1:
            model[0].weight.grad.to_local().fill_(math.inf)
        scaler.step(opt)
        scaler.update()
        assert all(torch.equal(p.full_tensor(), t) for p, t in zip(model.parameters(), held, strict=True)) == overflow
        assert opt.state_dict()["param_groups"][0]["draw"] == (0 if overflow else 1)
        assert scaler.get_scale() == 2.0**9


def check_distributed_checkpoint_resumes_on_any_number_of_ranks(world, folder):
    options = {"std_init": 0.1, "data_per_step": 12, "mc_samples": 2}

    def fresh(seed):
        model = wrap(make_model(seed), "fsdp")
        average_by_dividing(model)
        return model, BGD(model.named_parameters(), **options)

    saved = folder / "dcp"
    if world == 2:
        model, opt = fresh(0)
        opt.train()
        train_steps(model, opt, range(5), rows=own_rows(12))  # between the two samples of an update
        dcp.save({"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}, checkpoint_id=saved)
        whole = get_optimizer_state_dict(model, opt, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        sample = {n: p.full_tensor() for n, p in model.named_parameters()}
        train_steps(model, opt, range(5, 8), rows=own_rows(12))
        result = opt.posterior().gathered()
        if dist.get_rank() == 0:
            torch.save({"whole": whole, "sample": sample, "result": dict(result)}, folder / "expected")
        dist.barrier()
    expected = torch.load(folder / "expected")
    model, opt = fresh(1)
    state = {"model": model.state_dict(), "opt": get_optimizer_state_dict(model, opt)}
    dcp.load(state, checkpoint_id=saved)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, opt, state["opt"])
    for name, p in model.named_parameters():
        assert torch.equal(p.full_tensor(), expected["sample"][name])
    train_steps(model, opt, range(5, 8), rows=own_rows(12))
    (assert_equal if world == 2 else assert_near)(opt.posterior().gathered(), expected["result"])

    # A whole state: into a sharded optimizer, and into an ordinary one.
    for sharded in (True, False):
        model = make_model(2)
        model = wrap(model, "fsdp") if sharded else model
        average_by_dividing(model)
        opt = BGD(model.named_parameters(), **options)
        set_optimizer_state_dict(
            model, opt, copy.deepcopy(expected["whole"]), options=StateDictOptions(full_state_dict=True)
        )
        train_steps(model, opt, range(5, 8), rows=own_rows(12) if sharded else slice(None))
        assert_near(opt.posterior().gathered(), expected["result"])
    _, opt = fresh(0)
    opt.train()
    sharded_state = opt.state_dict()
    with pytest.raises(UsageError, match="the state is sharded and the parameters are not"):
        BGD(make_model().parameters(), **options).load_state_dict(sharded_state)


# --- the posterior ------------------------------------------------------------------------------------


def check_posteriors_of_sharded_models(world, folder):
    model, alone = wrap(make_model(), "fsdp"), make_model()
    whole = Posterior.around(alone, {n: torch.rand_like(p) + 0.1 for n, p in alone.named_parameters()})
    part = whole.like(model)
    assert part.is_sharded()
    assert_equal(part.gathered(), whole)
    path = folder / f"posterior{world}"
    part.metadata["steps"] = 3
    part.save(path)
    dist.barrier()
    assert_equal(Posterior.load(path), whole)
    again = Posterior.load(path, model=model)
    assert again.is_sharded()
    assert again.metadata == {"steps": 3}
    assert_equal(again.gathered(), whole)
    part.sample_(model, seed=3, draw=5)
    whole.sample_(alone, seed=3, draw=5)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        assert torch.equal(p.full_tensor(), q.detach())
    with pytest.raises(PosteriorError, match=r"other weights|another rank"):
        part.check(model, same_weights=True)
    whole.mean_(model)
    part.check(model, same_weights=True)
    part.mean_(alone)
    whole.check(alone, same_weights=True)
    if dist.get_rank() == 0:
        part.stds["3.bias"].to_local().fill_(-1.0)
    with pytest.raises(PosteriorError, match=r"3.bias: std must be > 0|another rank"):
        Posterior(part.means, part.stds)


def check_predictions_of_sharded_models(world, folder):
    """Those of the whole model, the same on each rank; and the shards hold what they held."""
    x, _ = examples(7)
    alone = make_model()
    alone.eval()
    whole = Posterior.around(alone, {n: torch.rand_like(p) / 3 + 0.1 for n, p in alone.named_parameters()})
    expected = whole.predict(alone, x, samples=4, seed=3)
    model = wrap(make_model(), "fsdp")
    before = [p.full_tensor().clone() for p in model.parameters()]
    for posterior, batch_size in ((whole, None), (whole.like(model), 3)):
        model(x)  # leaves whole parameters, which the forward pass would use in place of the samples
        found = posterior.predict(model, x, samples=4, seed=3, batch_size=batch_size)
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-6, rtol=1e-5)
        assert torch.equal(on_rank_0(found.logits), found.logits)
        for p, t in zip(model.parameters(), before, strict=True):
            assert torch.equal(p.full_tensor(), t)
    assert not torch.equal(expected.logits[0], expected.logits[1])


# --- prepare and forget ----------------------------------------------------------------------------------


def check_prepare_and_forget_are_those_of_one_process(world, folder):
    expected = torch.load(folder / "alone", weights_only=False)
    for how in ("plain", "ddp", "fsdp"):
        model = wrap(make_model(), how)
        posterior = prepare(model, make_loader(), **PREPARE)
        assert_near(posterior.gathered(), expected["prepared"])
        result = forget(model, posterior, make_loader(), **FORGET)
        assert_near(result.posterior.gathered(), expected["forgotten"])
        result.posterior.check(model, same_weights=True)
        for ours, theirs in zip(result.history, expected["history"], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
            assert ours.kl == pytest.approx(theirs.kl, rel=1e-3)
            assert ours.accuracy == theirs.accuracy
        for t in (t for pair in result.posterior.gathered().values() for t in pair):
            assert torch.equal(t, on_rank_0(t))


def check_objectives_that_draw_or_need_the_inputs(world, folder):
    expected = torch.load(folder / "alone", weights_only=False)
    for objective in ("random-labels", "bad-teacher", "masked-teacher"):
        model = make_model()
        result = forget(model, Posterior.around(model, 0.1), make_loader(), objective=objective, **FORGET)
        assert_near(result.posterior, expected[objective])
    model = wrap(make_model(), "fsdp")
    with pytest.raises(UsageError, match="bad-teacher draws new weights for the whole model, which is sharded"):
        forget(model, Posterior.around(model, 0.1), make_loader(), objective="bad-teacher", **FORGET)
    result = forget(model, Posterior.around(model, 0.1), make_loader(), objective="masked-teacher", **FORGET)
    assert_near(result.posterior.gathered(), expected["masked-teacher"])
    model, teacher = wrap(make_model(), "fsdp"), MaskedTeacher(wrap(make_model(), "fsdp"))
    result = forget(model, Posterior.around(model, 0.1), make_loader(), objective=teacher, **FORGET)
    assert_near(result.posterior.gathered(), expected["masked-teacher"])


def one_class():
    x, y = examples()
    return [(x[y == 1], y[y == 1])]


def check_strength_found_is_that_of_one_process(world, folder):
    expected = torch.load(folder / "alone", weights_only=False)["strength"]
    for how in ("plain", "ddp", "fsdp"):
        model = wrap(make_model(), how)
        result = forget(model, Posterior.around(model, 0.1), one_class(), **AUTOMATIC)
        assert_near(result.posterior.gathered(), expected.posterior)
        assert result.probability == pytest.approx(expected.probability, rel=1e-3)
        for ours, theirs in zip(result.history, expected.history, strict=True):
            assert ours.kl_weight == pytest.approx(theirs.kl_weight, rel=1e-4)


def check_depth_finds_the_features_of_the_whole_batch(world, folder):
    expected = torch.load(folder / "alone", weights_only=False)["depth"]
    for how in ("plain", "ddp"):
        model = wrap(make_model(), how)
        result = forget(model, Posterior.around(model, 0.1), one_class(), depth="features", **AUTOMATIC)
        assert_near(result.posterior.gathered(), expected.posterior)
        assert result.cosine == pytest.approx(expected.cosine, abs=1e-4)


def check_a_distributed_sampler_makes_the_batch_of_its_parts(world, folder):
    """World size x 4 examples a step, against one process given the ranks' parts as one batch."""
    x, y = examples()
    data = torch.utils.data.TensorDataset(x, y)
    samplers = [torch.utils.data.DistributedSampler(data, world, r, seed=1) for r in range(world)]
    epochs = math.ceil(PREPARE["steps"] / math.ceil(len(samplers[0]) / 4))
    parts = []
    for epoch in range(epochs):
        for s in samplers:
            s.set_epoch(epoch)
        indices = [list(s) for s in samplers]
        for start in range(0, len(indices[0]), 4):
            parts.append(list(itertools.chain.from_iterable(i[start : start + 4] for i in indices)))
    own = torch.utils.data.DistributedSampler(data, seed=1)
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=own)
    for how in ("plain", "ddp"):
        posterior = prepare(wrap(make_model(), how), loader, method="bgd", evidence=100.0 / 22, **PREPARE)
        assert_near(posterior, alone(make_model(), [(x[i], y[i]) for i in parts]))
        assert posterior.metadata["label_counts"] == {"0": 8, "1": 7, "2": 7}


def alone(model, batches):
    """What one process prepares from these batches, by BGD in a loop of its own."""
    from distruction.loop import cosine, rising

    steps = PREPARE["steps"]
    opt = BGD(model.named_parameters(), std_init=0.1, max_std=0.1, learn_mean=False, mc_samples=2)
    for step, (x, y) in enumerate(batches[:steps]):
        opt.param_groups[0] |= {"lr": cosine(step, steps), "data_per_step": 100.0 * rising(steps)[step]}

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
    return opt.posterior()


def check_different_batches_without_a_distributed_sampler_are_refused(world, folder):
    x, y = examples()
    rows = own_rows(len(x))
    with pytest.raises(UsageError, match="the ranks' loaders give different batches"):
        prepare(make_model(), [(x[rows], y[rows])], evidence=1.0, **PREPARE)
    mesh = init_device_mesh("cpu", (1, world)) if world > 1 else None
    model = make_model()
    for name, p in list(model[0].named_parameters()):
        spread = distribute_tensor(p.detach(), mesh, [Shard(0), Shard(0)], src_data_rank=None)
        setattr(model[0], name, nn.Parameter(spread))
    with pytest.raises(UsageError, match="data parallel models alone"):
        prepare(model, make_loader(), **PREPARE)


def check_batches_smaller_than_the_world(world, folder):
    expected = torch.load(folder / "alone", weights_only=False)["one by one"]
    x, y = examples(3)
    for how in ("plain", "ddp", "fsdp"):
        posterior = prepare(wrap(make_model(), how), [(x[i : i + 1], y[i : i + 1]) for i in range(3)],
                            evidence=100.0, **PREPARE)  # fmt: skip
        assert_near(posterior.gathered(), expected)


class Interrupted(Exception):
    pass


def interrupt(step: Step):
    if step.step == 7:
        raise Interrupted


def check_a_checkpoint_resumes_on_any_number_of_ranks(world, folder):
    expected = torch.load(folder / "alone", weights_only=False)["prepared"]
    if world == 2:
        for how in ("plain", "fsdp"):
            options = {"checkpoint": folder / f"{how}.ckpt", "checkpoint_seconds": 0.0, **PREPARE}
            with pytest.raises(Interrupted):
                prepare(wrap(make_model(), how), make_loader(), callback=interrupt, **options)
        dist.barrier()
    else:
        for how, then in itertools.product(("plain", "fsdp"), ("ddp", "fsdp")):
            path = folder / f"{how}.ckpt"
            content = path.read_bytes()
            dist.barrier()
            model = wrap(make_model(), then)
            steps = []
            posterior = prepare(model, make_loader(), checkpoint=path, callback=steps.append, **PREPARE)
            assert [s.step for s in steps] == list(range(7, 13))
            assert_near(posterior.gathered(), expected)
            dist.barrier()
            assert not path.exists()
            dist.barrier()
            if dist.get_rank() == 0:
                path.write_bytes(content)
            dist.barrier()


def check_nan_on_one_rank_while_preparing_stops_all(world, folder):
    for how in ("plain", "ddp", "fsdp"):
        model = make_model()
        calls = []

        def poison(module, inputs, output, calls=calls):
            calls.append(1)
            if len(calls) == 5 and dist.get_rank() == world - 1:  # two samples a step: the third step
                output.register_hook(lambda gradient: gradient * math.nan)

        model[0].register_forward_hook(poison)
        model = wrap(model, how)
        posterior = Posterior.around(model, 0.1)
        with pytest.raises(NonFiniteError, match=r"gradient of 0.weight, 0.bias is NaN .* at step 3"):
            prepare(model, make_loader(), method="bgd", **PREPARE)
        posterior.check(model, same_weights=True)


def check_pieces_of_two_dimensional_meshes(world, folder):
    mesh = init_device_mesh("cpu", (1, world))
    whole = torch.arange(7.0 * 5).view(7, 5)
    for placements in itertools.product([Shard(0), Shard(1), Replicate()], repeat=2):
        t = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        pieces = Pieces([t], [4])
        for offset, piece, cut in zip(pieces.offsets, pieces.of([t]), pieces.of([whole]), strict=True):
            assert torch.equal(piece, offset + torch.arange(float(len(piece))))
            assert torch.equal(piece, cut)


def text_batches():
    rows = texts.rows((7, 4, 9, 5, 6))
    return [texts.padded(rows[:3]), texts.padded(rows[3:])]


def text_results():
    """Posteriors and steps of a language model; one of the batches is smaller than three ranks."""
    results = {}
    for family in (texts.gpt2, texts.llama):
        model = family()
        prior = prepare(model, text_batches(), steps=4, std_init=0.1, evidence=100.0, **QUIET)
        results[family.__name__] = dict(prior)
        for objective in ("masked-teacher", "npo", "simnpo", "bounded-ce"):
            model = family()
            report = forget(model, Posterior.around(model, 0.1), text_batches(), objective=objective, steps=4, **QUIET)
            figures = [v for s in report.history for v in (s.loss, s.accuracy)] + [report.probability]
            results[family.__name__, objective] = dict(report.posterior), figures
    return results


def check_language_models_are_those_of_one_process(world, folder):
    ours = text_results()
    expected = torch.load(folder / "texts")
    for key, value in expected.items():
        if isinstance(key, str):
            assert_near(ours[key], value)
        else:
            assert_near(ours[key][0], value[0])
            assert ours[key][1] == pytest.approx(value[1], rel=1e-4)


def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def sharded_and_recomputing(model):
    return sharded(texts.recomputing(model))


def check_a_wrapped_or_sharded_language_model_is_that_of_one_process(world, folder):
    expected = torch.load(folder / "texts")
    for wrap in (DistributedDataParallel, sharded, sharded_and_recomputing):
        model = wrap(texts.llama())
        prior = prepare(model, text_batches(), steps=4, std_init=0.1, evidence=100.0, **QUIET)
        assert_near(prior.gathered(), expected["llama"])
        for objective in ("masked-teacher", "npo"):
            model = wrap(texts.llama())
            report = forget(model, Posterior.around(model, 0.1), text_batches(), objective=objective, steps=4, **QUIET)
            assert_near(report.posterior.gathered(), expected["llama", objective][0])
            assert report.probability == pytest.approx(expected["llama", objective][1][-1], rel=1e-4)


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name.startswith("check_")}


def write_what_one_process_does(folder):
    """The expectations of the checks of `prepare` and `forget`."""
    model = make_model()
    prepared = prepare(model, make_loader(), **PREPARE)
    result = forget(model, prepared, make_loader(), **FORGET)
    facts = {"prepared": dict(prepared), "forgotten": dict(result.posterior), "history": result.history}
    for objective in ("random-labels", "bad-teacher", "masked-teacher"):
        model = make_model()
        result = forget(model, Posterior.around(model, 0.1), make_loader(), objective=objective, **FORGET)
        facts[objective] = dict(result.posterior)
    model = make_model()
    facts["depth"] = forget(model, Posterior.around(model, 0.1), one_class(), depth="features", **AUTOMATIC)
    model = make_model()
    facts["strength"] = forget(model, Posterior.around(model, 0.1), one_class(), **AUTOMATIC)
    x, y = examples(3)
    batches = [(x[i : i + 1], y[i : i + 1]) for i in range(3)]
    facts["one by one"] = dict(prepare(make_model(), batches, evidence=100.0, **PREPARE))
    torch.save(facts, folder / "alone")
    torch.save(text_results(), folder / "texts")


def work(rank, world, port, folder):
    """Run all checks on one rank; what fails is written to ``folder``."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(minutes=2))
    failures = {}
    for name, check in CHECKS.items():
        try:
            check(world, Path(folder))
        except BaseException:
            failures[name] = traceback.format_exc()
        dist.barrier()
    torch.save(failures, Path(folder) / f"failures-{world}-{rank}")
    distributed.stop()


def lose_a_rank(rank, world, port, folder, how):
    """Prepare on two ranks; the last one dies or hangs in its seventh step, the others write what they are told."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))

    if how == "hangs":
        # The store waits for all ranks, which on a busy machine come seconds apart; from then on three are enough.
        store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timedelta(minutes=5))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=3))

    def callback(step):
        if step.step == 7 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)

    try:
        prepare(make_model(), make_loader(), checkpoint=folder / "ckpt", checkpoint_seconds=0.0,
                callback=callback, **PREPARE)  # fmt: skip
    except RankError as error:
        (folder / f"told-{rank}").write_text(str(error))
    if how == "hangs":
        distributed.stop()  # the library leaves only what it has joined

"""The loop of prepare and forget: the loaders it takes, what it draws, labels out of range, stopping."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from distruction import NonFiniteError, Posterior, UsageError, forget, prepare
from distruction.loop import Checkpoint, cosine, examples_in, labels
from distruction.seeds import seed_all

QUIET = {"progress": False}


def make(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def data(count=24):
    g = torch.Generator().manual_seed(7)
    return TensorDataset(torch.randn(count, 4, generator=g), torch.arange(count) % 3)


def values(posterior):
    return [t for pair in posterior.values() for t in pair]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))
    # What is not told of one loader's labels may be told of another's.
    assert {**a.metadata, "label_counts": None} == {**b.metadata, "label_counts": None}


class Augmented(Dataset):
    """Draws at each access from one of the global generators, or from one of its own."""

    def __init__(self, kind):
        self.kind = kind
        self.own = np.random.default_rng(0)
        self.examples = data()

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        x, y = self.examples[index]
        draw = {
            "torch": lambda: torch.rand(()).item(),
            "numpy": np.random.rand,
            "random": random.random,
            "own": self.own.random,
        }[self.kind]
        return x * (1.0 if draw() < 0.5 else -1.0), y


# --- what is drawn ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "workers", "persistent"),
    [(kind, 0, False) for kind in ("torch", "numpy", "random", "own")]
    + [("torch", 2, False), ("numpy", 2, False), ("random", 2, True)],
)
def test_a_resumed_run_draws_what_the_whole_one_drew(tmp_path, kind, workers, persistent):
    def loader():
        return DataLoader(
            Augmented(kind), batch_size=8, shuffle=True, num_workers=workers, persistent_workers=persistent
        )

    def run(loader, **options):
        return prepare(make(), loader, steps=8, method="bgd", **QUIET, **options)

    def interrupt(step):
        if step.step == 5:
            raise KeyboardInterrupt

    whole = run(loader())
    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        run(loader(), checkpoint=path, checkpoint_steps=1, callback=interrupt)
    assert len(Posterior.load(path).metadata["checkpoint"]["history"]) == 4
    assert_same(whole, run(loader(), checkpoint=path))
    # The workers of an earlier run must not go on drawing where they were.
    if persistent:
        used = loader()
        list(used)
        assert_same(whole, run(used))


@pytest.mark.parametrize("where", ["loader", "sampler"])
def test_generators_of_the_loader_are_seeded_and_left_alone(tmp_path, where):
    """One loader, read by both runs: its generator is elsewhere when the second one starts."""
    own = torch.Generator().manual_seed(7)
    order = (
        {"shuffle": True, "generator": own} if where == "loader" else {"sampler": RandomSampler(data(), generator=own)}
    )
    loader = DataLoader(data(), batch_size=8, **order)

    def interrupt(step):
        if step.step == 5:
            raise KeyboardInterrupt

    before = own.get_state()
    whole = prepare(make(), loader, steps=8, **QUIET)
    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt):
        prepare(make(), loader, steps=8, checkpoint=path, checkpoint_steps=1, callback=interrupt, **QUIET)
    assert torch.equal(own.get_state(), before)
    torch.rand(3, generator=own)
    assert_same(whole, prepare(make(), loader, steps=8, checkpoint=path, **QUIET))
    # What forgetting looks at is drawn as it is read.
    reports = []
    for _ in range(2):
        torch.rand(3, generator=own)
        model = make()
        reports.append(forget(model, whole, loader, steps=3, request="records", level=0.2, **QUIET).posterior)
    assert_same(*reports)


def test_the_callers_generators_are_left_alone():
    def states():
        numpys = np.random.get_state()[1].tolist()  # noqa: NPY002
        return torch.get_rng_state().tolist(), numpys, random.getstate()

    model = make()
    seed_all(3)
    before = states()
    prepare(model, DataLoader(Augmented("numpy"), batch_size=8, shuffle=True), steps=2, **QUIET)
    assert states() == before
    seed_all(4)
    assert all(a != b for a, b in zip(states(), before, strict=True))


def test_whole_epochs_are_skipped_where_that_is_the_same(tmp_path, monkeypatch):
    class Other(TensorDataset):
        """Might keep something between epochs, for all that the loop knows."""

    def interrupt(step):
        if step.step == 12:
            raise KeyboardInterrupt

    fetched = []
    fetch = TensorDataset.__getitem__
    monkeypatch.setattr(TensorDataset, "__getitem__", lambda self, i: (fetched.append(i), fetch(self, i))[1])
    reads = {}
    for kind in (TensorDataset, Other):
        loader = DataLoader(kind(*data().tensors), batch_size=8, shuffle=True)
        whole = prepare(make(), loader, steps=14, **QUIET)
        path = tmp_path / kind.__name__
        with pytest.raises(KeyboardInterrupt):
            prepare(make(), loader, steps=14, checkpoint=path, checkpoint_steps=1, callback=interrupt, **QUIET)
        fetched.clear()
        assert_same(whole, prepare(make(), loader, steps=14, checkpoint=path, **QUIET))
        reads[kind] = len(fetched)
    # 11 steps are done, of 3 batches an epoch.
    assert reads == {TensorDataset: (14 - 9) * 8, Other: 14 * 8}


# --- loaders ------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, length=None):
        self.length = length

    def __iter__(self):
        return iter(data())

    def __len__(self):
        if self.length is None:
            raise TypeError
        return self.length


def test_loaders_of_every_shape_give_the_same():
    batches = list(DataLoader(data(), batch_size=8))

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = make()

        def forward(self, a, b):
            return self.inner(a + b)

    shapes = {
        "loader": DataLoader(data(), batch_size=8),
        "list": batches,
        "iterable": DataLoader(Stream(24), batch_size=8),
        "lists": [[x, y] for x, y in batches],
        "hugging face": [{"pixel_values": x, "labels": y} for x, y in batches],
        "label": [{"x": x, "label": y} for x, y in batches],
        "mapping inputs": [({"input": x}, y) for x, y in batches],
        "batch_sampler": DataLoader(data(), batch_sampler=BatchSampler(SequentialSampler(data()), 8, False)),
        "whole batches": DataLoader(data(), sampler=BatchSampler(SequentialSampler(data()), 8, False), batch_size=None),
    }
    posteriors = {name: prepare(make(), loader, steps=4, **QUIET) for name, loader in shapes.items()}
    for name, posterior in posteriors.items():
        assert_same(posterior, posteriors["loader"]), name
    model = Wrapped()
    several = [{"a": 0.25 * x, "b": 0.75 * x, "labels": y} for x, y in batches]
    stds = prepare(model, several, steps=4, **QUIET).stds
    for name, std in stds.items():
        torch.testing.assert_close(std, posteriors["loader"].stds[name.removeprefix("inner.")], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: iter(DataLoader(data(), batch_size=8)), r"read once.*DataLoader.*list"),
        (lambda: (b for b in DataLoader(data(), batch_size=8)), r"read once.*DataLoader.*list"),
        (lambda: map(tuple, DataLoader(data(), batch_size=8)), r"read once.*DataLoader.*list"),
        (
            lambda: DataLoader(data(), batch_size=64, drop_last=True),
            r"24 .*fewer than a batch of 64, .*drop_last=False",
        ),
        (lambda: [], "is empty"),
        (lambda: [(*b, torch.ones(8)) for b in DataLoader(data(), batch_size=8)], r"3 entries.*mapping"),
        (lambda: [{"pixel_values": x, "category": y} for x, y in DataLoader(data(), batch_size=8)], "pixel_values"),
        (lambda: [{"labels": y} for _, y in DataLoader(data(), batch_size=8)], "no inputs"),
        (lambda: [{"x": x, "labels": y, "id": ["a"] * 8} for x, y in DataLoader(data(), batch_size=8)], "id.*list"),
        (lambda: [(x, y[:-1]) for x, y in DataLoader(data(), batch_size=8)], "8 inputs.*7 targets"),
        (lambda: [(x[:n], y[:n]) for n in (0, 8) for x, y in DataLoader(data(), batch_size=8)], "no example"),
    ],
)
@pytest.mark.parametrize("what", ["prepare", "forget"])
def test_loaders_that_cannot_work_are_refused_before_anything_changed(loader, message, what):
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    started = []
    options = {"steps": 4, "callback": started.append, **QUIET}
    run = {
        "prepare": lambda: prepare(model, loader(), num_examples=24, **options),
        "forget": lambda: forget(model, Posterior.around(model, 0.05), loader(), **options),
    }[what]
    with pytest.raises(UsageError, match=message) as caught:
        run()
    assert not started
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert ("training" in str(caught.value)) == (what == "prepare")
    assert ("forget set" in str(caught.value)) == (what == "forget")


def test_a_stream_without_a_length_needs_the_number_of_examples():
    loader = DataLoader(Stream(), batch_size=8)
    with pytest.raises(UsageError, match="num_examples="):
        prepare(make(), loader, steps=4, **QUIET)
    posterior = prepare(make(), loader, steps=4, num_examples=24, **QUIET)
    assert_same(posterior, prepare(make(), DataLoader(data(), batch_size=8), steps=4, **QUIET))


def test_a_loader_that_dries_up_is_told():
    class Once:
        def __init__(self):
            self.batches = iter(list(DataLoader(data(), batch_size=8)))

        def __iter__(self):
            return self.batches

    with pytest.raises(UsageError, match=r"3 batches.*second time"):
        prepare(make(), Once(), steps=4, num_examples=24, **QUIET)


def test_no_record_of_the_forget_set_is_left_unread_in_silence():
    model = make()
    posterior = Posterior.around(model, 0.05)
    with pytest.raises(UsageError, match=r"drop_last=True.*4 of the 24 records.*drop_last=False"):
        forget(model, posterior, DataLoader(data(), batch_size=10, drop_last=True), steps=4, **QUIET)
    forget(model, posterior, DataLoader(data(), batch_size=12, drop_last=True), steps=4, **QUIET)
    parts = {
        "draws 24 times from its 24 records, with replacement": RandomSampler(data(), replacement=True),
        "draws 9 of its 24 records, ": RandomSampler(data(), num_samples=9),
        "draws 12 times from its 24 records, with replacement": WeightedRandomSampler(torch.ones(24), 12),
        r"draws 20 of its 24 records \(drop_last=True\)": DistributedSampler(data(), 5, 0, drop_last=True),
    }
    for message, sampler in parts.items():
        for loader in (
            DataLoader(data(), sampler=sampler, batch_size=8),
            DataLoader(data(), batch_sampler=BatchSampler(sampler, 8, False)),
        ):
            with pytest.raises(UsageError, match=message):
                forget(model, posterior, loader, steps=4, **QUIET)
    whole = [SubsetRandomSampler(range(8)), WeightedRandomSampler(torch.ones(24), 24, replacement=False)]
    for sampler in whole:
        model = make()
        forget(model, posterior, DataLoader(data(), sampler=sampler, batch_size=8), steps=4, **QUIET)
    model = make()
    with pytest.warns(UserWarning, match="2 steps read 2 of the 3 batches of the forget set"):
        forget(model, posterior, DataLoader(data(), batch_size=8), steps=2, **QUIET)


def test_examples_are_those_that_the_loader_draws():
    weights = torch.ones(24)
    half = SubsetRandomSampler(range(12))
    loaders = {
        24: DataLoader(data(), batch_size=5),
        12: DataLoader(data(), sampler=half, batch_size=5),
        6: DataLoader(data(), sampler=WeightedRandomSampler(weights, 6), batch_size=5),
        7: DataLoader(data(), sampler=RandomSampler(data(), num_samples=7), batch_size=5),
        10: DataLoader(data(), batch_sampler=[[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]),
        11: DataLoader(data(), batch_sampler=BatchSampler(SubsetRandomSampler(range(11)), 5, False)),
        9: DataLoader(data(), sampler=BatchSampler(SubsetRandomSampler(range(9)), 4, False), batch_size=None),
        20: DataLoader(Stream(20), batch_size=5),
        8: DataLoader(Subset(data(), range(8)), batch_size=5),
        4: [(torch.zeros(3, 4), torch.zeros(3).long()), (torch.zeros(1, 4), torch.zeros(1).long())],
    }
    for count, loader in loaders.items():
        assert examples_in(loader) == count
        assert prepare(make(), loader, steps=1, **QUIET).metadata["examples"] == count


# --- labels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("label", [-1, 100])
@pytest.mark.parametrize("what", ["prepare", "uniform", "uniform-others", "masked-teacher"])
def test_a_label_out_of_range_in_a_later_batch(tmp_path, monkeypatch, label, what, at_once):
    """Refused where the host asks at once, as on the CPU, and where it is told at the end of the step."""
    monkeypatch.setattr(labels, "AT_ONCE", ["cpu"] if at_once else [])
    batches = list(DataLoader(data(), batch_size=8))
    batches[2] = (batches[2][0], batches[2][1].index_fill(0, torch.tensor([5]), label))
    model = make()
    path = tmp_path / "c"
    seen = []
    options = {"steps": 6, "checkpoint": path, "checkpoint_steps": 1, "callback": seen.append, **QUIET}

    def run():
        if what == "prepare":
            return prepare(model, batches, **options)
        return forget(model, Posterior.around(model, 0.05), batches, objective=what, kl_weight=0.1, **options)

    with pytest.raises(UsageError, match=rf"labels run from .*{label}.* step 3, .* 3 classes \(0 to 2\)") as caught:
        run()
    assert ("training set" in str(caught.value)) == (what == "prepare")
    assert ("forget set" in str(caught.value)) == (what != "prepare")
    assert len(seen) == 2
    kept = Posterior.load(path)
    assert len(kept.metadata["checkpoint"]["history"]) == 2
    if at_once:
        assert all(torch.equal(kept.means[n], p) for n, p in model.named_parameters())


# --- losses and stopping ------------------------------------------------------------------------------


def test_losses_that_are_not_one_mean():
    model = make()
    loader = DataLoader(data(), batch_size=8)

    def per_example(logits, targets):
        return nn.functional.cross_entropy(logits, targets, reduction="none")

    with pytest.raises(UsageError, match=r"must return one mean loss.*\(8,\).*mean\(\)"):
        forget(model, Posterior.around(model, 0.05), loader, objective=per_example, kl_weight=0.1, steps=3, **QUIET)
    with pytest.raises(UsageError, match=r"must return one mean loss.*\(8,\).*mean\(\)"):
        prepare(model, loader, loss_fn=per_example, method="bgd", steps=2, **QUIET)
    with pytest.raises(UsageError, match="must return one mean loss, not a float"):
        prepare(model, loader, loss_fn=lambda logits, targets: 1.0, method="bgd", steps=2, **QUIET)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("method", ["bgd", "gauss-newton"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_names_the_step_and_the_parameters(monkeypatch, method, where, at_once):
    monkeypatch.setattr(labels, "AT_ONCE", ["cpu"] if at_once else [])
    model = make()
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def poison(module, inputs, output):
        calls.append(1)
        if len(calls) == (5 if method == "bgd" else 3):  # the third step, of bgd its first sample
            if where == "loss":
                return output * torch.nan
            output.register_hook(lambda gradient: gradient * torch.nan)
        return output

    model[0].register_forward_hook(poison)
    message = "the loss is nan at step 3" if where == "loss" else "gradient of 0.weight, 0.bias is NaN .* at step 3"
    with pytest.raises(NonFiniteError, match=message):
        prepare(model, DataLoader(data(), batch_size=8), method=method, steps=6, **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("what", ["prepare", "forget"])
def test_a_callback_stops_the_run_and_keeps_the_result(tmp_path, what):
    path = tmp_path / "c"
    loader = DataLoader(data(), batch_size=8, shuffle=True)

    def run(callback, **options):
        model = make()
        options |= {"steps": 9, "callback": callback, **QUIET}
        if what == "prepare":
            return prepare(model, loader, **options), model
        return forget(model, Posterior.around(model, 0.05), loader, kl_weight=0.1, **options).posterior, model

    stopped, model = run(lambda step: step.step == 4, checkpoint=path, keep_checkpoint=True)
    assert stopped.metadata["steps_done"] == 4
    stopped.check(model, same_weights=True)
    again, model = run(lambda step: pytest.fail("a stopped run went on"), checkpoint=path)
    assert_same(again, stopped)
    again.check(model, same_weights=True)
    assert not path.exists()
    seen = []
    run(seen.append)
    assert len(seen) == 9


class Falling:
    """A controller: lowers lambda, stops the run, and knows how often it was asked."""

    def __init__(self):
        self.asked = 0

    def before_step(self, optimizer, history):
        assert len(history) == self.asked
        for group in optimizer.param_groups:
            group["kl_weight"] = 0.5 * 0.9**self.asked

    def after_step(self, optimizer, history):
        self.asked += 1
        return self.asked == 7

    def state_dict(self):
        return {"asked": self.asked}

    def load_state_dict(self, state):
        self.asked = state["asked"]


def test_a_controller_changes_options_stops_and_resumes(tmp_path):
    from distruction import BGD
    from distruction.loop import FORGET_SET, run
    from distruction.modules import learnable

    def go(**more):
        model = make()
        prior = Posterior.around(model, 0.05)
        checkpoint = Checkpoint(more.pop("path", None), {}, seconds=0.0)

        def schedule(optimizer, history):
            for group in optimizer.param_groups:
                group["lr"] = cosine(len(history), 10)

        return run(
            model,
            DataLoader(data(), batch_size=8),
            lambda logits, targets, inputs: -nn.functional.cross_entropy(logits, targets),
            lambda resumed: BGD(learnable(model).items(), std_init=resumed or prior, prior=prior, kl_weight=0.5),
            steps=10,
            seed=0,
            checkpoint=checkpoint,
            schedule=schedule,
            callback=more.get("callback"),
            progress=False,
            role=FORGET_SET,
            controller=Falling(),
        )

    def interrupt(step):
        if step.step == 4:
            raise KeyboardInterrupt

    whole, history = go()
    assert [s.kl_weight for s in history] == pytest.approx([0.5 * 0.9**i for i in range(7)])
    with pytest.raises(KeyboardInterrupt):
        go(path=tmp_path / "c", callback=interrupt)
    resumed, again = go(path=tmp_path / "c")
    assert again == history
    assert_same(resumed.posterior(), whole.posterior())


def test_checkpoints_know_objects_by_their_parameters(tmp_path):
    from distruction.objectives import BoundedCrossEntropy

    path = tmp_path / "c"
    loader = DataLoader(data(), batch_size=8)

    def interrupt(step):
        if step.step == 3:
            raise KeyboardInterrupt

    options = {"steps": 5, "checkpoint": path, "checkpoint_steps": 1, **QUIET}
    model = make()
    posterior = Posterior.around(model, 0.05)
    with pytest.raises(KeyboardInterrupt):
        forget(
            model, posterior, loader, kl_weight=0.1, objective=BoundedCrossEntropy(0.1), callback=interrupt, **options
        )
    with pytest.raises(UsageError, match=r"objective: .*0\.1.* there, .*0\.2.* here"):
        forget(make(), posterior, loader, kl_weight=0.1, objective=BoundedCrossEntropy(0.2), **options)
    forget(make(), posterior, loader, kl_weight=0.1, objective=BoundedCrossEntropy(0.1), **options)

    def smooth(amount):
        return nn.CrossEntropyLoss(label_smoothing=amount)

    with pytest.raises(KeyboardInterrupt):
        prepare(make(), loader, loss_fn=smooth(0.1), callback=interrupt, **options)
    with pytest.raises(UsageError, match=r"loss: .*0\.1.* there, .*0\.2.* here"):
        prepare(make(), loader, loss_fn=smooth(0.2), **options)
    prepare(make(), loader, loss_fn=smooth(0.1), **options)


def test_evidence_is_per_example_whatever_the_steps(tmp_path):
    """Of a quadratic loss, 1/std**2 = 1/std_init**2 + evidence * examples * curvature at any number of steps."""
    curvature, evidence, examples = 2.0, 3.0, 10
    for steps in (100, 200):
        model = nn.Linear(1, 20_000, bias=False)
        nn.init.zeros_(model.weight)
        batches = [(torch.ones(2, 1), torch.zeros(2, dtype=torch.int64))] * (examples // 2)
        posterior = prepare(
            *(model, batches),
            method="bgd",
            steps=steps,
            evidence=evidence,
            loss_fn=lambda logits, targets: curvature / 2 * logits.square().sum(dim=1).mean(),
            **QUIET,
        )
        expected = 100 + curvature * evidence * examples
        assert (posterior.stds["weight"] ** -2).mean().item() == pytest.approx(expected, rel=0.01)
        posterior.save(tmp_path / "p")
        facts = json.loads(json.dumps(Posterior.load(tmp_path / "p").metadata))
        assert (facts["method"], facts["evidence"], facts["examples"]) == ("bgd", evidence, examples)

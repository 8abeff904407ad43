"""Nothing lost: kills, full disks, read-only folders, and files that somebody else wrote, cut or changed."""

import errno
import gc
import itertools
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import kills
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from distruction import Posterior, PosteriorError, UsageError, files, forget, interrupts, prepare, report
from distruction.experiments.store import Store

QUIET = {"progress": False}


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(48, 4), torch.arange(48) % 3
    return model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)


def values(posterior):
    return [t for pair in posterior.values() for t in pair]


def assert_same(a, b):
    assert all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))
    assert a.metadata == b.metadata


# --- killed -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the runs are forked")
@pytest.mark.parametrize("what", ["prepare", "forget"])
def test_a_hundred_kills_and_the_same_bits(tmp_path, what):
    done = subprocess.run(
        [sys.executable, kills.__file__, what, tmp_path, "100", "0"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["kills"] == 100
    assert seen["in a write"] > 0
    assert len(seen["resumed at"]) > 3


def run_until(step, what, checkpoint, **options):
    """A run that is interrupted after so many steps."""

    def interrupt(done):
        if done.step == step:
            raise KeyboardInterrupt

    model, loader = make()
    options |= {"checkpoint": checkpoint, "steps": 8, "callback": interrupt, **QUIET}
    if what == "forget":
        options["kl_weight"] = 0.1
    arguments = (model, loader) if what == "prepare" else (model, Posterior.around(model, 0.05), loader)
    with pytest.raises(KeyboardInterrupt):
        {"prepare": prepare, "forget": forget}[what](*arguments, **options)


def test_a_checkpoint_every_so_many_steps(tmp_path):
    checkpoint = tmp_path / "c"
    run_until(7, "prepare", checkpoint, checkpoint_steps=3)
    assert len(Posterior.load(checkpoint).metadata["checkpoint"]["history"]) == 6
    model, loader = make()
    whole = prepare(model, loader, steps=8, **QUIET)
    resumed = prepare(model, loader, steps=8, checkpoint=checkpoint, keep_checkpoint=True, **QUIET)
    assert_same(whole, resumed)
    assert checkpoint.exists()
    assert_same(whole, prepare(model, loader, steps=8, checkpoint=checkpoint, **QUIET))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UsageError, match="checkpoint_steps must be >= 1, not 0"):
        prepare(model, loader, steps=8, checkpoint=checkpoint, checkpoint_steps=0, **QUIET)


def test_with_released_gradients_the_checkpoint_and_the_result_are_the_same(tmp_path):
    checkpoint = tmp_path / "c"
    run_until(5, "prepare", checkpoint, checkpoint_seconds=0.0, release_gradients=True)
    model, loader = make()
    resumed = prepare(model, loader, steps=8, checkpoint=checkpoint, **QUIET)
    assert_same(resumed, prepare(model, loader, steps=8, **QUIET))
    posterior = Posterior.around(model, 0.05)
    results = []
    for release in (False, True):
        model, loader = make()
        result = forget(model, posterior, loader, kl_weight=0.1, steps=5, release_gradients=release, **QUIET)
        results.append(values(result.posterior))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_a_killed_writer_left_goes_with_the_next_run(tmp_path):
    leftover = tmp_path / ".c.x1y2.tmp"
    leftover.mkdir()
    (leftover / ".tmpabc").write_bytes(b"half a file")
    other = tmp_path / ".d.x1y2.tmp"
    other.mkdir()
    model, loader = make()
    prepare(model, loader, steps=1, checkpoint=tmp_path / "c", **QUIET)
    assert list(tmp_path.iterdir()) == [other]


# --- interrupted --------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c():
    """Python's own handler of SIGINT, which a background job of a shell is started without."""
    earlier = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, earlier)


def interrupted_at_every_line(run):
    """Call ``run`` with Ctrl-C before its first line of Python, then before its second, ..., until it has none left.

    Yields after each call that was interrupted; what ``run`` calls counts as its own.
    """
    for line in itertools.count():
        passed = itertools.count()
        come = []

        def trace(frame, event, arg, line=line, passed=passed, come=come):
            if event == "line" and next(passed) == line:
                sys.settrace(None)
                come.append(line)
                signal.raise_signal(signal.SIGINT)
            return trace

        earlier = sys.gettrace()
        gc.disable()  # lines of finalizers, which swallow what is raised there, are not its own
        try:
            sys.settrace(trace)
            run()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(earlier)
            gc.enable()
        if not come:
            return
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        yield


def write_file(path, text):
    files.write_atomically(path, lambda name: Path(name).write_text(text))


def write_folder(path, text):
    with report.folder(path, overwrite=True) as draft:
        (draft / "a").write_text(text)


def write_entry(path, text):
    Store(path.parent).save(path.name, {"a": 1}, text, {"a": lambda name: name.write_text(text)})


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("write", [write_file, write_folder, write_entry])
@pytest.mark.parametrize("earlier", [True, False])
def test_ctrl_c_at_any_moment_leaves_the_old_or_the_new(tmp_path, write, earlier, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # slow, and of use where the power fails
    path = tmp_path / "result"

    def content():
        found = path / "a" if write is write_folder else path
        if write is write_entry:
            return Store(tmp_path).load("result", {"a": 1})
        return found.read_text() if found.exists() else None

    def begin():
        if path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if earlier:
            write(path, "old")

    write(path, "first")  # so that what is imported or compiled once has been, and every run has the same lines
    begin()
    interruptions = 0
    seen = set()
    for _ in interrupted_at_every_line(lambda: write(path, "new")):
        interruptions += 1
        seen.add(content())
        assert [p.name for p in tmp_path.rglob("*") if p.name.startswith(".")] == []
        if content() == "new":
            begin()
    assert interruptions > 10
    assert seen == {"old" if earlier else None, "new"}
    assert content() == "new"


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_comes_at_once():
    reached = []

    def run():
        with interrupts.held():
            for step in range(3):
                signal.raise_signal(signal.SIGINT)
                reached.append(step)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == [0]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_is_not_held_back_in_the_part_that_lets_it_through():
    reached = []

    def run():
        with interrupts.held() as context:
            with context.let_through():
                reached.append("inside")
                signal.raise_signal(signal.SIGINT)
                reached.append("after it")
            reached.append("behind")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert reached == ["inside"]


def test_what_ignores_ctrl_c_goes_on_ignoring_it(tmp_path):
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interrupts.held():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        thread = threading.Thread(target=write_file, args=(tmp_path / "a", "new"))
        thread.start()
        thread.join()
    finally:
        signal.signal(signal.SIGINT, earlier)
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.parametrize("back", [True, False])
def test_a_folder_that_cannot_be_replaced_is_not_lost(tmp_path, monkeypatch, back):
    """A second Ctrl-C while the new folder takes the old one's place, and then nothing can be renamed any more."""
    path, move = tmp_path / "result", Path.replace
    write_folder(path, "old")

    def replace(self, target):
        if self.suffix == ".tmp":
            raise KeyboardInterrupt
        if not back and Path(target) == path:
            raise OSError(errno.EIO, "the disk fails")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt if back else OSError):
        write_folder(path, "new")
    (left,) = tmp_path.rglob("a")
    assert left.read_text() == "old"
    assert (left.parent == path) == back
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_writer_of_a_folder_left_goes_with_the_next(tmp_path):
    draft = tmp_path / ".result.x1y2.tmp"
    draft.mkdir()
    (draft / "a").write_text("half")
    write_folder(tmp_path / "result", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["result"]


# --- of something else --------------------------------------------------------------------------------


def test_a_checkpoint_of_another_prior_is_refused(tmp_path):
    checkpoint = tmp_path / "c"
    run_until(5, "forget", checkpoint, checkpoint_seconds=0.0)
    before = checkpoint.read_bytes()
    model, loader = make()
    with pytest.raises(UsageError, match=r"is of another run \(prior: "):
        forget(model, Posterior.around(model, 0.04), loader, kl_weight=0.1, steps=8, checkpoint=checkpoint, **QUIET)
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("damage", ["truncated", "foreign", "newer", "empty", "another model"])
def test_a_checkpoint_that_cannot_be_read(tmp_path, damage):
    checkpoint = tmp_path / "c"
    run_until(5, "prepare", checkpoint, checkpoint_seconds=0.0)
    if damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:-7])
    elif damage == "foreign":
        save_file({"x": torch.zeros(3)}, checkpoint)
    elif damage == "newer":
        files.save_tensors(checkpoint, {"x": torch.zeros(3)}, format="distruction-posterior-7", facts={})
    elif damage == "empty":
        checkpoint.write_bytes(b"")
    else:
        Posterior.around(nn.Linear(2, 2), 0.1).save(checkpoint)
    before = checkpoint.read_bytes()
    model, loader = make()
    weights = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(PosteriorError, match="or, to start from the beginning, delete this checkpoint"):
        prepare(model, loader, steps=8, checkpoint=checkpoint, **QUIET)
    assert checkpoint.read_bytes() == before
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))


# --- full and read-only -------------------------------------------------------------------------------

DISK = """
    import errno, os, sys
    from pathlib import Path
    import torch
    sys.path.insert(0, {tests!r})
    from kills import make
    from distruction import Posterior, prepare
    folder = Path({folder!r})
    checkpoint, filler = folder / "c", folder / "filler"

    def run(steps=6, callback=None):
        model, loader = make()
        return prepare(model, loader, steps=steps, checkpoint=checkpoint, checkpoint_steps=1, callback=callback,
                       progress=False)

    def expect(number, run):
        try:
            run()
        except OSError as error:
            assert error.errno == number, error
            assert os.strerror(number) in str(error), error
            return
        raise AssertionError("no error")

    def fill(step):
        if step.step == 3:
            with open(filler, "wb") as file:
                file.write(bytes(os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize - 2**16))

    whole = run()
    assert not list(folder.iterdir())
    expect(errno.ENOSPC, lambda: run(callback=fill))
    assert sorted(p.name for p in folder.iterdir()) == ["c", "filler"]
    before = checkpoint.read_bytes()
    assert len(Posterior.load(checkpoint).metadata["checkpoint"]["history"]) == 2
    started = []
    expect(errno.ENOSPC, lambda: run(callback=started.append))
    assert not started  # told before the first step
    filler.unlink()
    assert os.system(f"mount -o remount,ro {{folder}}") == 0
    expect(errno.EROFS, lambda: run(callback=started.append))
    assert not started
    assert checkpoint.read_bytes() == before
    assert os.system(f"mount -o remount,rw {{folder}}") == 0
    resumed = run(callback=started.append)
    assert started[0].step == 3
    assert all(torch.equal(a, b) for n in whole for a, b in zip(whole[n], resumed[n]))
    assert not list(folder.iterdir())
"""


def can_mount():
    command = ["unshare", "--user", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="mounting a small disk in a user namespace is not allowed here")
def test_a_disk_that_is_full_or_read_only(tmp_path):
    script = textwrap.dedent(DISK).format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    command = f"mount -t tmpfs -o size=4m tmpfs {tmp_path} && exec {sys.executable} -"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command],
        input=script,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_folder_that_takes_no_file_is_told_before_the_first_step(tmp_path):
    model, loader = make()
    started = []
    with pytest.raises(OSError, match="nowhere"):
        prepare(model, loader, steps=2, checkpoint=tmp_path / "nowhere" / "c", callback=started.append, **QUIET)
    assert started == []
    with pytest.raises(OSError, match=r"MB needed, .* MB free") as caught:
        files.check_writable(tmp_path / "c", 2**60)
    assert caught.value.errno == errno.ENOSPC


# --- fuzz ---------------------------------------------------------------------------------------------


def mutate(content, chance):
    """A copy with a few random changes: bits, bytes, cuts, repeats, insertions, lengths and words of the header."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        header = chance.randrange(min(len(data), 8 + struct.unpack("<Q", content[:8])[0]) + 1)
        kind = chance.randrange(9)
        if kind == 0 and data:
            data[at % len(data)] ^= 1 << chance.randrange(8)
        elif kind == 1 and data:
            data[header % len(data)] = chance.randrange(256)
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + chance.randrange(1, 64)]
        elif kind == 4:
            data[at:at] = chance.randbytes(chance.randrange(1, 64))
        elif kind == 5:
            data[at:at] = data[header : header + chance.randrange(1, 200)]
        elif kind == 6:
            data[:8] = struct.pack("<Q", chance.choice((0, 1, len(data), 2**31, 2**63, chance.randrange(4096))))
        elif kind == 7:
            old, new = chance.choice(WORDS)
            data = bytearray(bytes(data).replace(old, new, chance.choice((1, 1, -1))))
        else:
            data[header:header] = chance.choice((b" ", b"[" * 5000, b"{", b'"', b"\\u0000", b"null", b"1e999", b"-"))
    return bytes(data)


WORDS = (
    (b"F32", b"F64"),
    (b"F32", b"BF16"),
    (b"F32", b"U8"),
    (b"mean.", b"std."),
    (b"mean.0", b"mean.1"),
    (b"0.weight", b"2.weight"),
    (b"posterior-1", b"posterior-2"),
    (b"distruction", b"destruction"),
    (b"[8,4]", b"[4,8]"),
    (b"data_offsets", b"data_offset"),
    (b"metadata", b"names"),
    (b"codes", b"low"),
    (b"1024", b"1"),
    (b"crc32", b"crc33"),
    (b":", b":-"),
    (b"0", b"9"),
)


def fuzz(tmp_path, mutations, compress, seed):
    """Each mutated file loads as what was saved, or not at all and with the library's own error."""
    model, _ = make()
    posterior = Posterior.around(model, {n: 0.1 * torch.rand_like(p) + 0.01 for n, p in model.named_parameters()})
    posterior.metadata["note"] = {"a": [1, 2.5, None], "b": "λ"}
    path = tmp_path / "p"
    posterior.save(path, compress=compress)
    expected = Posterior.load(path, model=model)
    content = path.read_bytes()
    chance = random.Random(seed)
    outcomes = {"loaded": 0, "refused": 0}
    for _ in range(mutations):
        changed = mutate(content, chance)
        path.write_bytes(changed)
        try:
            found = Posterior.load(path, model=model if compress or chance.random() < 0.5 else None)
        except PosteriorError:
            outcomes["refused"] += 1
            continue
        assert_same(found, expected)
        assert list(found) == list(expected)
        outcomes["loaded"] += changed != content
    return outcomes


@pytest.mark.parametrize("compress", [False, True])
def test_mutated_files(tmp_path, compress):
    outcomes = fuzz(tmp_path, 300, compress, seed=0)
    assert outcomes["refused"] > 200


@pytest.mark.slow
@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("seed", range(1, 6))
def test_thousands_of_mutated_files(tmp_path, compress, seed):
    outcomes = fuzz(tmp_path, 2000, compress, seed)
    assert outcomes["refused"] > 1500


def with_crc(path, tensors, facts):
    files.save_tensors(path, tensors, format="distruction-posterior-1", facts=facts)


@pytest.mark.parametrize(
    "facts",
    [
        {"names": 5, "metadata": {}},
        {"names": "w", "metadata": {}},
        {"names": [1], "metadata": {}},
        {"names": ["w", "w"], "metadata": {}},
        {"names": {"w": 1}, "metadata": {}},
        {"names": None, "metadata": {}},
        {"names": ["w"], "metadata": 3},
        {"names": ["w"], "metadata": ["a"]},
        {"names": [], "metadata": {}},
        {"names": ["w"], "metadata": {}, "means": 3, "block": 1024},
        {"names": ["w"], "metadata": {}, "means": "0", "block": "x"},
    ],
    ids=str,
)
def test_headers_that_lie(tmp_path, facts):
    path = tmp_path / "p"
    with_crc(path, {"mean.w": torch.zeros(2), "std.w": torch.ones(2)}, facts)
    with pytest.raises(PosteriorError):
        Posterior.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes.weight": torch.zeros(3, 2)}, "codes of weight do not fit together"),
        ({"low.weight": torch.zeros(2)}, "codes of weight do not fit together"),
        ({"step.weight": torch.zeros(1, dtype=torch.float64)}, "codes of weight do not fit together"),
        ({"low.weight": torch.zeros(1)}, "weight: std must be > 0"),
        ({"low.weight": torch.full((1,), float("nan"))}, "weight: std holds NaN"),
        ({"codes.weight": torch.zeros(2, 3, dtype=torch.uint8)}, "belongs to another model"),
        ({"extra": torch.zeros(1)}, "does not name: .'extra'"),
        ({"step.weight": None}, "cannot be read as a posterior: 'step.weight'"),
    ],
)
def test_codes_that_lie(tmp_path, change, message):
    model = nn.Linear(2, 3, bias=False)
    path = tmp_path / "p"
    Posterior.around(model, 0.1).save(path, compress=True)
    tensors, facts = files.load_tensors(path, format="distruction-posterior-1")
    with_crc(path, {n: t for n, t in {**tensors, **change}.items() if t is not None}, facts)
    with pytest.raises(PosteriorError, match=message):
        Posterior.load(path, model=model)

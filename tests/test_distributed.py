"""Two and three gloo processes on the CPU: the same draws to the bit, the same posterior to reduction rounding."""

import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import torch

from distruction import Posterior, forget, models, prepare
from distruction.data import forget_split, load, loader


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Tracebacks by (world size, check)."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.write_what_one_process_does(folder)
    found = {}
    for world in (2, 3):
        torch.multiprocessing.spawn(ranks.work, (world, free_port(), str(folder)), nprocs=world)
        for rank in range(world):
            for check, text in torch.load(folder / f"failures-{world}-{rank}").items():
                found.setdefault((world, check), f"rank {rank}: {text}")
    return found


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("check", ranks.CHECKS)
def test_ranks(failures, world, check):
    assert (world, check) not in failures, failures[world, check]


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_lost_rank_stops_the_others_and_the_checkpoint_resumes(tmp_path, how):
    context = multiprocessing.get_context("spawn")
    port = free_port()
    processes = [context.Process(target=ranks.lose_a_rank, args=(r, 2, port, tmp_path, how)) for r in range(2)]
    for process in processes:
        process.start()
    processes[0].join()
    processes[1].kill()
    processes[1].join()
    assert processes[0].exitcode == 0
    told = (tmp_path / "told-0").read_text()
    assert told.startswith("another rank failed or cannot be reached at step 8 ")
    assert told.endswith(f"Start all ranks again; they resume from {tmp_path / 'ckpt'}")
    steps = []
    posterior = ranks.prepare(ranks.make_model(), ranks.make_loader(), checkpoint=tmp_path / "ckpt",
                              callback=steps.append, **ranks.PREPARE)  # fmt: skip
    assert steps[0].step == 8
    ranks.assert_near(posterior, prepare(ranks.make_model(), ranks.make_loader(), **ranks.PREPARE))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are told by /proc, which only Linux has")
@pytest.mark.parametrize("sharded", [False, True])
def test_the_process_group_is_left_before_the_interpreter_ends(sharded):
    """Gloo's threads abort the process if they outlive it while they drop the tensors of a collective."""
    code = """
import atexit, sys, time, torch, torch.distributed as dist
from pathlib import Path
from torch.distributed.fsdp import fully_shard
from distruction import distributed

def threads():
    return sum("gloo" in path.read_text() for path in Path("/proc/self/task").glob("*/comm"))

def main():
    distributed.start()
    model = torch.nn.Linear(2, 2)
    if sys.argv[1] == "True":
        fully_shard(model)
    model(torch.ones(1, 2)).sum().backward()
    # A thread takes its name after it has started, which on a busy machine is not at once.
    deadline = time.monotonic() + 20
    while not threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert dist.is_initialized()
    if not threads():
        print("no thread is called gloo", end=" ")

atexit.register(lambda: print(dist.is_initialized(), threads()))  # the last to run
main()
"""
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    done = subprocess.run([sys.executable, "-c", code, str(sharded)], env=environment, capture_output=True, text=True)
    if "no thread" in done.stdout and torch.__version__ < "2.9":
        pytest.skip("torch 2.8 gives Gloo's threads no name to tell them by")
    assert (done.returncode, done.stdout) == (0, "False 0\n"), done.stderr


def launchers():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2",
                  "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
                  "--main_process_port"]  # fmt: skip
    return {"torchrun": torchrun, "accelerate": accelerate}


@pytest.mark.parametrize("name", launchers())
def test_the_command_line_under_a_launcher(tmp_path, name):
    """One model, prepared and made to forget by two processes and by this one: same posterior, same weights."""
    if name == "accelerate":
        pytest.importorskip("accelerate", reason="accelerate is optional and not installed")
    torch.manual_seed(0)
    config = {"name": "vit-micro", "num_classes": 10, "in_chans": 1, "img_size": 8}
    model = models.create(**config)
    models.save(model, tmp_path / "model", config)

    def launch(*arguments):
        command = [*launchers()[name], str(free_port()), "-m", "distruction", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    common = ("--model", tmp_path / "model", "--device", "cpu", "--no-progress", "--batch-size", "63")
    as_published = ("--method", "bgd", "--evidence", 4, "--steps", 4)
    told = launch("prepare", *common, "--out", tmp_path / "posterior", *as_published)
    assert told.count("Gaussians") == 1  # rank 0 alone
    train_data, _ = load("digits")
    batches = loader(train_data, batch_size=63, shuffle=True)
    posterior = prepare(model, batches, method="bgd", evidence=4.0, steps=4, progress=False)
    ranks.assert_near(Posterior.load(tmp_path / "posterior"), posterior)

    launch("forget", *common, "--posterior", tmp_path / "posterior", "--out", tmp_path / "out", "--class", 3,
           "--steps", 4)  # fmt: skip
    forget_data, _ = forget_split(train_data, "3")
    forget(model, posterior, loader(forget_data, batch_size=63, shuffle=True), steps=4, progress=False)
    unlearned, _ = models.load(tmp_path / "out")
    for a, b in zip(unlearned.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


def test_other_commands_run_in_one_process(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from distruction import UsageError
    from distruction.cli import app

    monkeypatch.setenv("WORLD_SIZE", "2")
    for command in (["train", "--out", str(tmp_path / "m")], ["demo"], ["bench", "--preset", "digits"]):
        error = CliRunner().invoke(app, command).exception
        assert isinstance(error, UsageError)
        assert "runs in one process" in str(error)

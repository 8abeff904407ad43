"""SIGKILL at random moments of a checkpointed run: ``python tests/kills.py prepare FOLDER 100 SEED``.

Each run is a process of its own, forked from one that has imported PyTorch, and is started again with the same
arguments until it finishes. Prints what happened as JSON; fails where a file cannot be read or a result differs.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from distruction import Posterior, forget, prepare
from distruction.files import remove_leftovers

STEPS = 12


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 3))
    x, y = torch.randn(60, 16), torch.arange(60) % 3
    return model, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=16, shuffle=True)


def work(what, folder):
    """One run, as the command line does it: the checkpoint goes when the result is on the disk."""
    remove_leftovers(folder / "result")
    model, loader = make()
    checkpoint = folder / "checkpoint"
    options = {"steps": STEPS, "checkpoint": checkpoint, "checkpoint_steps": 1, "keep_checkpoint": True}
    options["progress"] = False
    if what == "prepare":
        result = prepare(model, loader, **options)
    else:
        result = forget(model, Posterior.around(model, 0.05), loader, objective="random-labels", **options).posterior
    result.save(folder / "result")
    checkpoint.unlink(missing_ok=True)


def start(what, folder):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work(what, folder)
            status = 0
        finally:
            os._exit(status)
    return pid


def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(what, folder, kills, seed):
    folder = Path(folder)
    whole, killed = folder / "whole", folder / "killed"
    whole.mkdir()
    model, _ = make()
    begin = time.monotonic()
    assert wait(start(what, whole)) == 0
    seconds = time.monotonic() - begin
    expected = (whole / "result").read_bytes()
    chance = random.Random(seed)
    seen = {"kills": 0, "finished": 0, "in a write": 0, "before the first checkpoint": 0, "after the result": 0}
    seen |= {"resumed at": sorted(set())}
    resumed = set()
    while True:
        killed.mkdir(exist_ok=True)
        pid = start(what, killed)
        if seen["kills"] < kills:
            # Mostly a few steps in, at times near the end of the run.
            time.sleep(chance.uniform(0, chance.choice((0.3, 1.1)) * seconds))
            os.kill(pid, signal.SIGKILL)
        status = wait(pid)
        assert status in (0, -signal.SIGKILL), status
        files = {p.name for p in killed.iterdir()}
        for name in files & {"checkpoint", "result"}:
            posterior = Posterior.load(killed / name, model=model)  # raises where anything is damaged
            if name == "checkpoint":
                resumed.add(len(posterior.metadata["checkpoint"]["history"]))
        if status != 0:
            seen["kills"] += 1
            seen["in a write"] += bool(files - {"checkpoint", "result"})
            seen["before the first checkpoint"] += "checkpoint" not in files and "result" not in files
            seen["after the result"] += "result" in files
            continue
        seen["finished"] += 1
        assert files == {"result"}, files
        assert (killed / "result").read_bytes() == expected
        shutil.rmtree(killed)
        if seen["kills"] >= kills:
            break
    seen["resumed at"] = sorted(resumed)
    print(json.dumps({"run": what, "seconds of a whole run": round(seconds, 2), **seen}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

"""Two and three gloo processes on the CPU: the same draws to the bit, the same posterior to reduction rounding."""

import socket

import pytest
import ranks
import torch


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

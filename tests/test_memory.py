"""Peak memory of a block."""

import sys

import pytest
import torch

from distruction.experiments.memory import Peak


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the high-water mark is Linux's")
def test_peak_of_a_block_on_the_cpu():
    with Peak(torch.device("cpu")) as peak:
        large = torch.ones(50 * 2**20)  # 200 MiB
        del large
    assert peak.mib == pytest.approx(200, abs=20)
    with Peak(torch.device("cpu")) as peak:
        pass
    assert abs(peak.mib) < 20

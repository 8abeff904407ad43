"""The scripts in ``examples/``, run as their first lines say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distruction import Posterior

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_lightning_on_two_processes(tmp_path):
    pytest.importorskip("lightning", reason="lightning is optional and not installed")
    out = tmp_path / "posterior"
    command = [sys.executable, str(EXAMPLES / "lightning_prepare.py"), "--out", str(out), "--steps", "3",
               "--accelerator", "cpu", "--devices", "2"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    posterior = Posterior.load(out)
    assert posterior.numel() == 202_186
    assert posterior.largest_std() == pytest.approx(0.1)
    assert any((std < 0.099).any() for std in posterior.stds.values())

"""The committed count of the CPU kernels' instructions is what this source makes."""

import json

import pytest

pytest.importorskip("typer", reason="the benchmarks need typer")
from benchmarks import instructions


def test_the_table_of_instructions():
    from distruction.ops import backends

    if (reason := instructions.missing() or backends.unavailable("cpp", "cpu")) is not None:
        pytest.skip(reason)
    from distruction.ops import cpp

    if not cpp.instruction_sets().get("avx2", (0, False))[1]:
        pytest.skip("this CPU has no avx2")
    committed = json.loads(instructions.RESULTS.read_text())
    if committed["compiler"] != instructions.compiler():
        pytest.skip(f"the table is of {committed['compiler']}, which is not here")
    found = instructions.measure()
    assert found.keys() == committed["instructions per element"].keys()
    assert found == pytest.approx(committed["instructions per element"], rel=0.05)
    # An update in pairs costs less than one by sums, in each of its calls.
    assert found["accumulate, pair"] < found["accumulate, first sample"]
    assert found["step, pair"] <= found["step, sums"]

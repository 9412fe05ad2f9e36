"""Candidates for the tables of tiles: how they are written, and tried without a GPU."""

import pytest
import torch

from benchmarks import tools
from scm_kernels import _triton
from scm_kernels.attention.triton_config import Row

tune = pytest.importorskip("benchmarks.tune")  # it needs Triton


@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_a_row_is_written_as_a_table_has_it(kernel, d):
    rows = tune.candidates(kernel, d)
    assert len(set(rows)) == len(rows) > 20
    for row in rows:
        assert eval(tune.written(row)) == row, "what is printed is a row"
    assert Row.__name__ in tune.written(rows[0])


@pytest.mark.parametrize(("kernel", "through"), [("forward", ""), ("keys", "both")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is measured")
@pytest.mark.skipif(_triton.interpreting(), reason="TRITON_INTERPRET=1 compiles none")
def test_a_trial_is_of_the_candidate(kernel, through):
    try:
        tools.tool("sassmodel")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    tried = tune.Pass(kernel, through, torch.bfloat16, 64, False)
    row = Row(64, 32, 32, 4, 2)
    line = tune.trial(row, tried, 4096)
    assert line["figures"] == "modelled", line.get("reason")
    assert line["TFLOP/s"] > 10
    assert line["row"] == "Row(64, 32, 32, 4, 2)"
    with tried.rows(row):
        (launch,) = tried.launches("sm_80")
    assert (launch.constants["META"].BLOCK_M, launch.constants["META"].BLOCK_N) == (32, 32)

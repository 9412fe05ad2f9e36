"""`normalized_tangent` and `consistency_loss`: bad input, and input that is merely unusual."""

from fractions import Fraction

import pytest
import torch
from test_tangent import DEVICE, INPUTS, PRESETS, make

from scm_kernels.tangent import consistency_loss, normalized_tangent

NAMES = (*INPUTS, "t")

A = torch.zeros(3, 2, 4, device=DEVICE)
T = torch.zeros(3, device=DEVICE)


@pytest.mark.parametrize("function", [consistency_loss, normalized_tangent])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"output": None}, TypeError, "output: got NoneType None, expected a tensor"),
        ({"output": A.long()}, TypeError, r"output: got a int64 tensor.*one of the dtypes float16"),
        ({"output": A[0, 0, 0]}, ValueError, r"output: got .*\[\].*expected \[B, ...\]"),
        ({"dxdt": 1.0}, TypeError, "dxdt: got float 1.0, expected a tensor"),
        ({"dxdt": A.double()}, TypeError, "dxdt: got a float64.*dtype of output.*float32"),
        ({"x_t": A[:2]}, ValueError, r"x_t: got .*\[2, 2, 4\].*shape of output.*\[3, 2, 4\]"),
        ({"x_t": A[:, :1]}, ValueError, r"x_t: got .*\[3, 1, 4\].*shape of output"),
        ({"jvp": A[0]}, ValueError, r"jvp: got .*\[2, 4\].*shape of output"),
        ({"jvp": A.to("meta")}, ValueError, "jvp: got .*on meta, expected the device of output"),
        ({"t": 0.5}, TypeError, "t: got float 0.5, expected a tensor"),
        ({"t": T.int()}, TypeError, "t: got a int32 tensor.*one of the dtypes"),
        ({"t": T[:2]}, ValueError, r"t: got .*\[2\].*one value a sample, shape \[3\]"),
        ({"t": T[:, None]}, ValueError, r"t: got .*\[3, 1\].*shape \[3\]"),
        ({"t": T.to("meta")}, ValueError, "t: got .*on meta, expected output's device"),
        ({"warmup": 1.5}, ValueError, "warmup: got 1.5, .*at least 0 and at most 1"),
        ({"warmup": -0.1}, ValueError, "warmup: got -0.1, .*at least 0"),
        ({"warmup": float("nan")}, ValueError, "warmup: got nan"),
        ({"warmup": "1"}, TypeError, "warmup: got str '1', expected a number"),
        ({"warmup": torch.ones(2, device=DEVICE)}, ValueError, r"warmup: got .*shape \[3\]"),
        ({"warmup": torch.ones(3, device=DEVICE).int()}, TypeError, "warmup: got a int32"),
        ({"warmup": T[0].to("meta")}, ValueError, "warmup: got .*on meta, expected output's"),
        ({"warmup": T[0].to_sparse()}, TypeError, "warmup: got a tensor of layout sparse_coo"),
        ({"t": T.cpu().numpy()}, TypeError, r"t: got a numpy.ndarray of shape \[3\], expected"),
        (
            {"t": torch.nn.Linear(2, 2)},
            TypeError,
            r"t: got torch.*Linear Linear\(in_features=2, .*",
        ),
        ({"preset": "x" * 99}, ValueError, "preset: got 'xxx"),
        ({"sigma_data": 0.0}, ValueError, "sigma_data: got 0.0, .*above 0"),
        ({"sigma_data": -1.0}, ValueError, "sigma_data: got -1.0, .*above 0"),
        ({"sigma_data": None}, TypeError, "sigma_data: got NoneType None, expected a number"),
        ({"c": -0.1}, ValueError, "c: got -0.1, .*at least 0"),
        ({"c": float("inf")}, ValueError, "c: got inf, expected a finite number"),
        ({"c": 10**400}, ValueError, "c: got int beyond all floats, expected a finite number"),
        ({"output": A[0].to_sparse()}, TypeError, "output: got .*sparse_coo, expected a dense"),
        ({"dxdt": A.to_sparse()}, TypeError, "dxdt: got a tensor of layout sparse_coo, expected"),
        ({"t": T.to_sparse()}, TypeError, "t: got a tensor of layout sparse_coo, expected a dense"),
        ({"preset": "papr"}, ValueError, "preset: got 'papr', expected one of 'paper', 'rms'"),
        ({"preset": None}, TypeError, "preset: got None, expected one of 'paper'"),
        ({"nan_policy": "skip"}, ValueError, "nan_policy: got 'skip', .*'propagate', 'zero'"),
    ],
)
def test_bad_input(function, change, error, message):
    call = dict(zip(NAMES, (A, A, A, A, T), strict=True)) | change
    with pytest.raises(error, match=message):
        function(**call)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_weight": 0.0}, TypeError, "log_weight: got float 0.0, expected a tensor"),
        ({"log_weight": T[:, None]}, ValueError, r"log_weight: got .*\[3, 1\].*shape \[3\]"),
        ({"log_weight": T.bool()}, TypeError, "log_weight: got a bool tensor"),
        ({"log_weight": T.to("meta")}, ValueError, "log_weight: got .*output's device"),
        (
            {"log_weight": T, "preset": "rcm"},
            ValueError,
            "log_weight: got .*expected None: .*'rcm'",
        ),
        ({"warmup": 0.5, "preset": "meanflow"}, ValueError, "warmup: got float 0.5, expected 1.0"),
        ({"warmup": T, "preset": "meanflow"}, ValueError, "warmup: got a float32.*expected 1.0"),
        ({"reduction": "sum"}, ValueError, "reduction: got 'sum', expected one of 'mean', 'none'"),
    ],
)
def test_bad_input_of_the_loss(change, error, message):
    call = dict(zip(NAMES, (A, A, A, A, T), strict=True)) | change
    with pytest.raises(error, match=message):
        consistency_loss(**call)


def test_meanflow_has_no_tangent_and_no_x_t():
    with pytest.raises(ValueError, match=r"preset: got 'meanflow'.*no normalised tangent.*'paper'"):
        normalized_tangent(A, A, A, A, T, preset="meanflow")
    assert consistency_loss(A, A, None, A, T, preset="meanflow") == 0


def test_numbers_of_other_types():
    tensors, t, _ = make((3, 2, 4))
    numbers = {"warmup": 0.5, "sigma_data": 0.25, "c": 0.125}
    fractions = {name: Fraction(x) for name, x in numbers.items()}
    for function in (consistency_loss, normalized_tangent):
        assert torch.equal(function(*tensors, t, **fractions), function(*tensors, t, **numbers))


@pytest.mark.parametrize("preset", PRESETS)
def test_meta_tensors(preset):
    """Shapes without data, of values and of derivatives."""
    tensors, t, _ = make((3, 2, 4), torch.float32)
    F, V, X, J, t = (x.to("meta") for x in (*tensors, t))
    loss = consistency_loss(F.requires_grad_(), V, X, J, t, preset=preset)
    (dF,) = torch.autograd.grad(loss, F)
    assert loss.shape == ()
    assert dF.shape == F.shape
    assert dF.is_meta
    if preset != "meanflow":
        tangent = normalized_tangent(F, V, X, J, t, preset=preset)
        assert tangent.is_meta
        assert tangent.shape == F.shape

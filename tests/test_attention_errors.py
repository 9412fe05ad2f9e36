"""Bad input to attention: TypeError or ValueError that names the argument, what it got, what it
expected. And the choice of a backend: by name, by the environment, by what each refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

import scm_kernels
from scm_kernels import _backends, attention_jvp, scaled_dot_product_attention


def tensors(b=2, h=4, hk=4, m=5, n=7, d=8, e=6, dtype=torch.float32) -> dict:
    shapes = {"query": (b, h, m, d), "key": (b, hk, n, d), "value": (b, hk, n, e)}
    shapes |= {f"t_{name}": shape for name, shape in shapes.items()}
    return {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}


def zeros(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


MASK = zeros(2, 4, 5, 7)
F64, F16, INT = torch.float64, torch.float16, torch.int64

# "argument: what is wrong with it": the value, and the error and what it says it expected. What
# depends on two arguments has a dict of both.
BAD = {
    "query: list": ([[1.0]], TypeError, "a tensor"),
    "query: none": (None, TypeError, "a tensor"),
    "query: int": (zeros(2, 4, 5, 8, dtype=INT), TypeError, "float32"),
    "query: complex": (zeros(2, 4, 5, 8, dtype=torch.complex64), TypeError, "float32"),
    "query: vector": (zeros(8), ValueError, "[B, H, tokens, features]"),
    "query: empty": (
        {"query": zeros(2, 4, 5, 0), "key": zeros(2, 4, 7, 0)},
        ValueError,
        "one feature",
    ),
    "key: number": (1.0, TypeError, "a tensor"),
    "key: dtype": (zeros(2, 4, 7, 8, dtype=F64), TypeError, "dtype of query"),
    "key: device": (zeros(2, 4, 7, 8, device="meta"), ValueError, "device of query"),
    "key: rank": (zeros(8), ValueError, "leading dimensions"),
    "key: features": (zeros(2, 4, 7, 9), ValueError, "query's last dimension, 8"),
    "key: heads": (zeros(2, 3, 7, 8), ValueError, "enable_gqa=True"),
    "key, value: batch": ({"key": zeros(3, 4, 7, 8)}, ValueError, "broadcast with query's, [2]"),
    "value: dtype": (zeros(2, 4, 7, 6, dtype=F16), TypeError, "dtype of query"),
    "value: tokens": (zeros(2, 4, 6, 6), ValueError, "as many tokens as key, 7"),
    "value: heads": (zeros(2, 2, 7, 6), ValueError, "enable_gqa=True"),
    "value: empty": (zeros(2, 4, 7, 0), ValueError, "one feature"),
    "key, value: gqa": (
        {"key": zeros(2, 3, 7, 8), "value": zeros(2, 3, 7, 6), "enable_gqa": True},
        ValueError,
        "a divisor of query's 4",
    ),
    "key, value: unequal gqa": (
        {"key": zeros(2, 2, 7, 8), "enable_gqa": True},
        ValueError,
        "as many in both",
    ),
    "enable_gqa: number": (2, TypeError, "a bool"),
    "t_query: shape": (zeros(2, 4, 5, 9), ValueError, "shape of query"),
    "t_query: broadcast": (zeros(1, 4, 5, 8), ValueError, "shape of query"),
    "t_query: dtype": (zeros(2, 4, 5, 8, dtype=F16), TypeError, "dtype of query"),
    "t_query: zero": (0.0, TypeError, "a tensor"),
    "t_key: shape": (zeros(2, 4, 8, 8), ValueError, "shape of key"),
    "t_key: device": (zeros(2, 4, 7, 8, device="meta"), ValueError, "device of key"),
    "t_value: shape": (zeros(2, 4, 7, 8), ValueError, "shape of value"),
    "attn_mask: list": ([True], TypeError, "a tensor"),
    "attn_mask: int": (MASK.int(), TypeError, "bool"),
    "attn_mask: half": (MASK.half(), TypeError, "float32"),
    "attn_mask: double": (MASK.double(), TypeError, "float32"),
    "attn_mask: shape": (zeros(5, 6), ValueError, "broadcasts to [2, 4, 5, 7]"),
    "attn_mask: keys": (zeros(2, 7), ValueError, "broadcasts to [2, 4, 5, 7]"),
    "attn_mask: batch": (zeros(3, 1, 5, 7), ValueError, "broadcasts to [2, 4, 5, 7]"),
    "attn_mask: rank": (MASK[None], ValueError, "broadcasts to [2, 4, 5, 7]"),
    "attn_mask: device": (zeros(5, 7, device="meta"), ValueError, "query's device"),
    "t_attn_mask: alone": (MASK, ValueError, "both or None"),
    "t_attn_mask: bool": (
        {"attn_mask": MASK > 0, "t_attn_mask": MASK},
        ValueError,
        "expected None: attn_mask is bool",
    ),
    "t_attn_mask: shape": (
        {"attn_mask": MASK, "t_attn_mask": zeros(5, 7)},
        ValueError,
        "shape of attn_mask",
    ),
    "is_causal: and mask": ({"attn_mask": MASK, "is_causal": True}, ValueError, "one of the two"),
    "is_causal: number": (1, TypeError, "a bool"),
    "is_causal: tensor": (torch.tensor(True), TypeError, "a bool"),
    "scale: text": ("1", TypeError, "a number"),
    "scale: nan": (float("nan"), ValueError, "a finite number"),
    "scale: inf": (float("inf"), ValueError, "a finite number"),
    "scale: huge": (10**400, ValueError, "a finite number"),
    "scale: tensor": (torch.tensor(0.5), TypeError, "a number"),
}


def bad(name: str):
    """The arguments, the name of the one to blame, the value, the error and what it expected."""
    value, error, expected = BAD[name]
    argument = name.partition(":")[0]
    change = value if isinstance(value, dict) else {argument: value}
    arguments = tensors() | change
    for primal in ("query", "key", "value"):  # tangents fit, unless they are what is wrong
        if isinstance(change.get(primal), torch.Tensor):
            arguments[f"t_{primal}"] = torch.zeros_like(change[primal])
    return arguments, argument, change.get(argument), error, expected


@pytest.mark.parametrize("name", BAD)
def test_bad_argument_of_attention_jvp(name):
    arguments, argument, value, error, expected = bad(name)
    with pytest.raises(error) as raised:
        attention_jvp(**arguments)
    message = str(raised.value)
    assert message.startswith(f"{argument}: got"), message
    assert expected in message, message
    if isinstance(value, torch.Tensor) and not argument.startswith("t_attn_mask"):
        heads = f"got {value.shape[1]} heads" if value.ndim == 4 else ""
        assert str(list(value.shape)) in message or (heads and heads in message), message
    elif not isinstance(value, (torch.Tensor, bool, float)) and value is not None:
        assert type(value).__name__ in message, message


LAYOUTS = {
    "sparse_coo": torch.Tensor.to_sparse,
    "sparse_csr": lambda x: x[0, 0].to_sparse_csr(),
    "_mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda x: torch.nested.nested_tensor([*x]),
}


@pytest.mark.filterwarnings("ignore")  # PyTorch on the state of its sparse and nested tensors
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("argument", ["query", "key", "t_value", "attn_mask"])
def test_a_layout_that_is_not_dense(argument, layout):
    arguments = tensors() | {"attn_mask": MASK}
    arguments[argument] = LAYOUTS[layout](arguments[argument])
    expected = f"^{argument}: got a tensor of layout {layout}, expected a dense"
    with pytest.raises(TypeError, match=expected):
        attention_jvp(**arguments)


IN_A_JVP = [n for n in BAD if not n.startswith(("t_", "query", "key: device"))]


@pytest.mark.parametrize("name", IN_A_JVP)
def test_bad_argument_beside_a_dual_tensor(name):
    arguments, argument, _, error, expected = bad(name)
    arguments = {k: x for k, x in arguments.items() if not k.startswith("t_")}
    query = arguments.pop("query")
    with pytest.raises(error, match=f"^{argument}: got") as raised:
        torch.func.jvp(
            lambda q: scaled_dot_product_attention(q, **arguments), (query,), (query.clone(),)
        )
    assert expected in str(raised.value)


@pytest.mark.parametrize(
    ("dropout_p", "error", "text"),
    [(0.1, NotImplementedError, "share one dropout mask"), ("0", TypeError, "a number")],
)
def test_dropout_beside_a_dual_tensor(dropout_p, error, text):
    x = tensors()
    with pytest.raises(error, match=r"^dropout_p: got") as raised:
        torch.func.jvp(
            lambda q: scaled_dot_product_attention(q, x["key"], x["value"], None, dropout_p),
            (x["query"],), (x["t_query"],),
        )  # fmt: skip
    assert text in str(raised.value)


def test_tangents_are_not_optional_by_position():
    x = tensors()
    with pytest.raises(TypeError, match="t_value"):
        attention_jvp(*list(x.values())[:5])
    with pytest.raises(TypeError, match="positional"):
        attention_jvp(*x.values(), None)


# --- backends -------------------------------------------------------------------------------------

ALL = ("reference", "cpu", "triton", "cuda")
MISSING = [n for n in ALL if not scm_kernels.backends()[n].startswith("available")]


def test_backends_says_what_is_there_and_why_not():
    status = scm_kernels.backends()
    assert tuple(status) == ALL
    assert status["reference"].startswith("available")
    for text in status.values():
        assert re.match(r"available|not available: .+", text), text


@pytest.mark.parametrize("name", ["", "gpu", "Reference", "auto "])
def test_an_unknown_backend(name):
    with pytest.raises(ValueError, match=r"expected one of .*'reference'") as raised:  # noqa: SIM117
        with scm_kernels.backend(name):
            pass
    assert f"name: got {name!r}" in str(raised.value)


@pytest.mark.parametrize("name", MISSING)
def test_a_backend_that_is_not_available(name):
    with pytest.raises(RuntimeError, match=f"backend '{name}' is not available"):  # noqa: SIM117
        with scm_kernels.backend(name):
            pass


def test_the_innermost_backend_goes_and_is_undone():
    assert _backends.requested() == ""
    with scm_kernels.backend("reference"):
        with scm_kernels.backend("auto"):
            assert _backends.requested() == "auto"
        assert _backends.requested() == "reference"
    with pytest.raises(KeyError), scm_kernels.backend("reference"):
        raise KeyError
    assert _backends.requested() == ""


SCRIPT = """
import torch, scm_kernels
x = [torch.randn(1, 1, 3, 4) for _ in range(6)]
scm_kernels.attention_jvp(*x)
with scm_kernels.backend("reference"):
    print("ran", scm_kernels.attention_jvp(*x)[1].shape)
"""


@pytest.mark.parametrize(
    ("value", "text"),
    [("reference", "ran"), ("fpga", "SCM_KERNELS_BACKEND: got 'fpga'")]
    + [(name, f"backend '{name}' is not available") for name in MISSING[:1]],
)
def test_environment_variable(value, text):
    environment = os.environ | {"SCM_KERNELS_BACKEND": value}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode == 0) == (text == "ran"), done.stderr
    assert text in done.stdout + done.stderr


PLANTED = """
from scm_kernels.attention import reference
CALLS = []
def unavailable(): return {unavailable}
def refuses(problem): return {refuses}
def forward(problem):
    CALLS.append("forward")
    reference.forward(problem)
def backward(problem):
    CALLS.append("backward")
    reference.backward(problem)
"""


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """Put a file `scm_kernels/attention/cpu.py` before the package's own."""
    package = sys.modules["scm_kernels.attention"]

    def write(*, unavailable=None, refuses="None", text=PLANTED):
        content = text.format(unavailable=repr(unavailable), refuses=refuses)
        (tmp_path / "cpu.py").write_text(content)
        monkeypatch.setattr(package, "__path__", [str(tmp_path), *package.__path__])
        monkeypatch.delitem(sys.modules, "scm_kernels.attention.cpu", raising=False)
        _backends.forget()

    yield write
    sys.modules.pop("scm_kernels.attention.cpu", None)
    _backends.forget()


def planted_calls() -> list:
    module = sys.modules.get("scm_kernels.attention.cpu")
    return module.CALLS if module else []


def run_both(**changes) -> None:
    x = {k: y.requires_grad_() for k, y in tensors().items()}
    outputs = attention_jvp(**x | changes)
    (outputs[0].sum() + outputs[1].sum()).backward()


def test_a_planted_backend_is_found_and_used(plant):
    plant()
    assert scm_kernels.backends()["cpu"].startswith("available (attention")
    run_both()
    assert planted_calls() == ["forward", "backward"]
    with scm_kernels.backend("reference"):
        run_both()
    assert planted_calls() == ["forward", "backward"]


def test_the_backend_of_the_forward_serves_its_backward(plant):
    plant()
    x = {k: y.requires_grad_() for k, y in tensors().items()}
    with scm_kernels.backend("reference"):
        outputs = attention_jvp(**x)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert planted_calls() == []


def test_auto_passes_by_a_backend_that_refuses(plant):
    plant(refuses="'no causal mask yet' if problem.causal else None")
    run_both(is_causal=True)
    assert planted_calls() == []
    run_both()
    assert planted_calls() == ["forward", "backward"]


def test_a_forced_backend_that_refuses_raises_and_names_both(plant):
    plant(refuses="'no causal mask yet' if problem.causal else None")
    with (
        scm_kernels.backend("cpu"),
        pytest.raises(NotImplementedError, match="no causal mask yet") as raised,
    ):
        attention_jvp(**tensors(), is_causal=True)
    assert "backend 'cpu' was forced" in str(raised.value)
    assert "Backend 'reference' takes it" in str(raised.value)


def test_auto_passes_by_a_backend_that_is_unavailable(plant, monkeypatch):
    monkeypatch.setattr(_backends, "OPS", ("attention",))  # the tangent's own may be available
    plant(unavailable="no compiler: run pip install it")
    assert "no compiler: run pip install it" in scm_kernels.backends()["cpu"]
    run_both()
    assert planted_calls() == []
    with pytest.raises(RuntimeError, match="no compiler: run pip install it"):  # noqa: SIM117
        with scm_kernels.backend("cpu"):
            pass


def test_an_error_inside_a_backend_is_not_hidden(plant):
    """A kernel that fails is a bug to be seen; only `refuses` sends a problem elsewhere."""
    plant(text=PLANTED.replace('CALLS.append("forward")', 'raise RuntimeError("kernel failed")'))
    with pytest.raises(RuntimeError, match="kernel failed"):
        attention_jvp(**tensors())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_problems_reach_a_backend_as_promised(plant, backend):
    """A contiguous last dimension, four-dimensional masks, and nothing empty."""
    plant(refuses="print(problem.q.stride(), problem.mask.shape) or None")
    x = tensors()
    x["query"] = x["query"].mT.contiguous().mT
    mask = torch.zeros(7)
    seen = []
    run = _backends.run
    with pytest.MonkeyPatch.context() as patch, scm_kernels.backend(backend):
        patch.setattr(_backends, "run", lambda o, s, p, r: seen.append(p) or run(o, s, p, r))
        attention_jvp(**x, attn_mask=mask)
        attention_jvp(**tensors(b=0), attn_mask=mask)
    (problem,) = seen
    assert all(y.stride(-1) == 1 for y in (problem.q, problem.k, problem.v, problem.out))
    assert problem.mask.shape == (1, 1, 1, 7)
    assert problem.lse.is_contiguous()
    assert problem.mu.is_contiguous()

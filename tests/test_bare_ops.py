"""`torch.ops.scm_kernels`, called as such: what does not fit is refused before it is read."""

import pytest
import torch

import scm_kernels  # noqa: F401  (which registers them)

OPS = torch.ops.scm_kernels
Q = torch.randn(2, 4, 5, 8)
KEYS = torch.randn(2, 2, 7, 8)
FORWARD = {
    **{"q": Q, "k": KEYS, "v": KEYS[..., :6], "tq": Q, "tk": KEYS, "tv": KEYS[..., :6]},
    **{"mask": torch.zeros(1, 1, 5, 7), "tmask": torch.zeros(1, 1, 5, 7)},
}
OPTIONS = {"causal": False, "scale": 0.3, "tangent_grad": True, "backend": ""}
ROWS = {name: torch.randn(3, 10) for name in "fvxj"}
TIMES = {"t": torch.rand(3), "warmup": None}
TANGENT = {"r": 1.0, "sigma_data": 0.5, "c": 0.1, "preset": "paper", "zero": False, "backend": ""}


def backward() -> dict:
    out, t_out, lse, mu, low = OPS.attention_jvp(*FORWARD.values(), *OPTIONS.values())
    given = {"dout": out, "dt_out": out, **FORWARD, "out": out, "t_out": t_out}
    given |= {"lse": lse, "mu": mu, "lse_low": low, "causal": False, "scale": 0.3}
    return given | {"wanted": [True] * 8, "backend": ""}


def gradient() -> dict:
    losses, *numbers = OPS.tangent_loss(*ROWS.values(), *TIMES.values(), None, *TANGENT.values())
    names = ("coefficients", "distances", "weights")
    given = ROWS | dict(zip(names, numbers, strict=True))
    return given | {"log_weight": torch.zeros(3), "dlosses": losses, "backend": ""}


CALLS = {
    "attention_jvp": lambda: FORWARD | OPTIONS,
    "attention_jvp_backward": backward,
    "tangent_loss": lambda: ROWS | TIMES | {"log_weight": torch.zeros(3)} | TANGENT,
    "tangent_normalize": lambda: ROWS | TIMES | TANGENT,
    "tangent_gradient": gradient,
}


@pytest.mark.parametrize("how", ["shape", "dtype", "device"])
@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_that_does_not_fit(name, how):
    op, given = getattr(OPS, name), CALLS[name]()
    op(*given.values())
    tensors = [place for place, x in given.items() if isinstance(x, torch.Tensor)]
    for place in tensors:
        x = given[place]
        wrong = {
            "shape": x.new_zeros(*x.shape[:-1], x.shape[-1] + 1),
            "dtype": x.half() if x.dtype != torch.float16 else x.float(),
            "device": x.to("meta"),
        }[how]
        with pytest.raises((ValueError, NotImplementedError, RuntimeError), match=r"got|device"):
            op(*(given | {place: wrong}).values())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("attention_jvp", {"q": Q[0]}, "q: got a float32 tensor of shape"),
        ("attention_jvp", {"q": Q[:, :3], "tq": Q[:, :3]}, "got 3 heads, expected a multiple of 2"),
        ("attention_jvp_backward", {"dout": None, "dt_out": None}, "dout, dt_out: got none"),
        ("attention_jvp_backward", {"mu": None}, "mu: got None with a dt_out"),
        ("attention_jvp_backward", {"tq": None}, "wanted: got"),
        ("attention_jvp_backward", {"wanted": [True]}, "wanted: got"),
        ("tangent_loss", {"preset": "bogus"}, "preset: got 'bogus', expected one of 'paper'"),
    ],
)
def test_what_else_does_not_fit(name, change, message):
    with pytest.raises(ValueError, match=message):
        getattr(OPS, name)(*(CALLS[name]() | change).values())

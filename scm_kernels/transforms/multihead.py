"""`nn.MultiheadAttention` on dual tensors.

It reaches a mode as one call, `F.multi_head_attention_forward`, whose inside runs with the mode
popped; entering the mode again would send the call back here. So the function runs from a copy that
does not look for modes, inside the
mode: its linear layers, products and attention then take their own rules.
"""

import types

import torch.nn.functional as F

_forward = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {**vars(F), "has_torch_function": lambda tensors: False},
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


def multi_head_attention(mode, *args, **kwargs):
    """`F.multi_head_attention_forward`, seen through by the mode."""
    with mode:
        return _forward(*args, **kwargs)

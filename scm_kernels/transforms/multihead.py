"""`nn.MultiheadAttention` on dual tensors.

It reaches a mode as one call, `F.multi_head_attention_forward`, whose inside runs with the mode
popped; entering the mode again would send the call back here. So the function runs from a copy that
does not look for modes, inside the
mode: its linear layers, products and attention then take their own rules.
"""

import types

import torch.nn.functional as F


def _check_key_padding_mask(key_padding_mask, src_len, bsz) -> None:
    """PyTorch's own, whose message Dynamo cannot make a constant of where it traces that file."""
    if tuple(key_padding_mask.shape) != (bsz, src_len):
        raise AssertionError(
            f"key_padding_mask: got shape {list(key_padding_mask.shape)}, expected {[bsz, src_len]}"
        )


_forward = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    {
        **vars(F),
        "has_torch_function": lambda tensors: False,
        "_check_key_padding_mask": _check_key_padding_mask,
    },
    "multi_head_attention_forward",
    F.multi_head_attention_forward.__defaults__,
)


def multi_head_attention(mode, *args, **kwargs):
    """`F.multi_head_attention_forward`, seen through by the mode."""
    with mode:
        return _forward(*args, **kwargs)

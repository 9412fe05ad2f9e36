"""Unmodified models of timm and transformers, in float64 against the truth."""

import pytest
import torch
from networks import close, gradients, true_jvp
from torch import nn

import scm_kernels

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}
WINDOWS = {
    "img_size": 32,
    "patch_size": 2,
    "window_size": 4,
    "embed_dim": 12,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "num_classes": 5,
}
TIMM = {
    "vit": ("vit_tiny_patch16_224", {**SMALL, "patch_size": 8}),
    "vit with norms of q and k": (
        "vit_tiny_patch16_224",
        {**SMALL, "patch_size": 8, "qk_norm": True, "init_values": 0.1, "reg_tokens": 1},
    ),
    "eva with rope": ("eva02_tiny_patch14_224", {**SMALL, "patch_size": 8}),
    "swin": ("swin_tiny_patch4_window7_224", WINDOWS),
    "swin v2": ("swinv2_tiny_window8_256", WINDOWS),
    "convnext": (
        "convnext_atto",
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 5},
    ),
    "resnet": ("resnet18", {"num_classes": 5, "channels": (8, 8, 16, 16)}),
}

COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 20,
    "attn_implementation": "sdpa",
}
IMAGES = {"image_size": 16, "patch_size": 4}
LEFT = torch.tensor([[0] * 3 + [1] * 4, [1] * 7])  # padding, as a causal model has it
RIGHT = LEFT.flip(1)
# name: (model, options of its configuration, options of the call)
TRANSFORMERS = {
    "llama": ("Llama", {**COMMON, "num_key_value_heads": 2}, {"use_cache": False}),
    "llama with padding": (
        "Llama",
        {**COMMON, "num_key_value_heads": 2},
        {"use_cache": False, "attention_mask": LEFT},
    ),
    "llama with a cache": ("Llama", {**COMMON, "num_key_value_heads": 2}, {"use_cache": True}),
    "qwen3 with a window": (
        "Qwen3",
        {
            **COMMON,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 1,
        },
        {"use_cache": False},
    ),
    "bert": ("Bert", COMMON, {"attention_mask": RIGHT}),
    "clip": ("CLIPVision", {**COMMON, **IMAGES}, {}),
    "dinov2": ("Dinov2", {**COMMON, **IMAGES}, {}),
    "t5": (
        "T5Encoder",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        {},
    ),
}


class Function(nn.Module):
    def __init__(self, model, name=None, options=None):
        super().__init__()
        self.model, self.name, self.options = model, name, options or {}

    def forward(self, x):
        if self.name is None:
            return self.model(x)
        return self.model(**{self.name: x}, **self.options).last_hidden_state


def timm_model(name):
    timm = pytest.importorskip("timm")
    architecture, options = TIMM[name]
    return Function(timm.create_model(architecture, **options)), (2, 3, 32, 32)


def transformers_model(name):
    transformers = pytest.importorskip("transformers")
    architecture, options, call = TRANSFORMERS[name]
    config = architecture.removesuffix("Encoder")
    config = getattr(transformers, f"{config}Config")(**options)
    model = getattr(transformers, f"{architecture}Model")(config)
    if "image_size" in options:
        return Function(model, "pixel_values", call), (2, 3, 16, 16)
    return Function(model, "inputs_embeds", call), (2, 7, 32)


def check(network, shape):
    network = network.double().eval()
    parameters = list(network.parameters())
    x, tx = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        plain = network(x)
        with scm_kernels.fused():
            assert torch.equal(network(x), plain)
    truth = true_jvp(network, (x,), (tx,))
    assert truth[1].abs().max() > 0
    for through in (False, True):
        result = scm_kernels.jvp(network, (x,), (tx,), tangent_grad=through)
        close(tuple(result), tuple(truth), 1e-11)
        want = gradients(*truth, parameters, through_tangent=through)
        got = gradients(*result, parameters, through_tangent=through)
        assert all(x.isfinite().all() for x in got)
        if not all(x.isfinite().all() for x in want):
            continue  # rows without a key: the gradient of eager attention's tangent is NaN there
        close(got, want, 1e-10, f"gradient, tangent_grad={through}")


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    torch.manual_seed(0)
    check(*timm_model(name))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name):
    torch.manual_seed(0)
    check(*transformers_model(name))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("name", ["vit", "swin", "resnet", "llama", "bert", "t5"])
def test_gradient_checkpointing(name):
    torch.manual_seed(0)
    network, shape = timm_model(name) if name in TIMM else transformers_model(name)
    network = network.double().eval()
    parameters = list(network.parameters())
    x, tx = torch.randn(2, *shape, dtype=torch.float64)
    plain = scm_kernels.jvp(network, (x,), (tx,))
    if name in TIMM:
        network.model.set_grad_checkpointing()
    else:
        network.model.gradient_checkpointing_enable({"use_reentrant": False})
        train_without_dropout(network)
    result = scm_kernels.jvp(network, (x,), (tx,))
    close(tuple(result), tuple(plain), 1e-7)  # norms of some are in float32
    want = gradients(*plain, parameters, through_tangent=False)
    close(gradients(*result, parameters, through_tangent=False), want, 1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_of_a_decoder():
    """What comes of token ids, and a mask, are made to require a gradient inside of the jvp."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    model = transformers.T5Model(
        transformers.T5Config(**config, vocab_size=20, dropout_rate=0.0)
    ).train()
    ids = torch.randint(0, 20, (2, 6))
    x, tx = torch.randn(2, 2, 7, 16)

    def network(x):
        return model(inputs_embeds=x, decoder_input_ids=ids, use_cache=False).last_hidden_state

    results = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        result = scm_kernels.jvp(network, (x,), (tx,))
        got = gradients(*result, list(model.parameters()), through_tangent=False)
        results.append((*result, *got))
    close(results[1], results[0], 1e-5)


def train_without_dropout(network):
    """transformers has checkpoints in training alone."""
    for module in network.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout_prob", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)

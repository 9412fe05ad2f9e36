"""Unmodified diffusion models of diffusers: the jvp in latents and time, and its gradients.

Tiny random models in float64 against the truth; those that force a part of themselves to float32
against the same model, as near as float32 allows.
"""

import warnings

import pytest
import torch
from networks import close, gradients, true_jvp
from torch import nn

import scm_kernels

diffusers = pytest.importorskip("diffusers")
TEXT, WIDTH = 5, 12
MASK = torch.tensor([[1.0] * 3 + [0.0] * 2, [1.0] * TEXT])


def text(seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, TEXT, WIDTH, generator=generator, dtype=torch.float64)


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    return model, {"class_labels": torch.tensor([1, 2])}, (2, 4, 8, 8)


def pixart():
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=2,
        use_additional_conditions=False,
    )
    conditions = {"resolution": None, "aspect_ratio": None}
    options = {"encoder_hidden_states": text(), "encoder_attention_mask": MASK}
    return model, {**options, "added_cond_kwargs": conditions}, (2, 4, 8, 8)


def sana():
    model = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=WIDTH,
        sample_size=8,
        patch_size=1,
    )
    options = {"encoder_hidden_states": text(), "encoder_attention_mask": MASK}
    return model, options, (2, 4, 8, 8)


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,),
    )
    options = {"encoder_hidden_states": text(), "pooled_projections": text()[:, 0]}
    return model, options, (2, 4, 8, 8)


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 2, 2),
    )
    options = {
        "encoder_hidden_states": text(),
        "pooled_projections": text()[:, 0],
        "img_ids": torch.arange(48.0).reshape(16, 3) % 4,
        "txt_ids": torch.zeros(TEXT, 3),
    }
    return model, options, (2, 16, 4)


def qwen_image():
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )
    options = {
        "encoder_hidden_states": text(),
        "encoder_hidden_states_mask": torch.ones(2, TEXT, dtype=torch.long),
        "img_shapes": [[(1, 4, 4)]] * 2,
    }
    return model, options, (2, 16, 16)


def lumina():
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        hidden_size=24,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(50, 10, 10),
        cap_feat_dim=WIDTH,
    )
    options = {"encoder_hidden_states": text(), "encoder_attention_mask": MASK.bool()}
    return model, options, (2, 4, 8, 8)


def unet_condition():
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return model, {"encoder_hidden_states": text()}, (2, 4, 8, 8)


def unet():
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return model, {}, (2, 3, 8, 8)


def wan():
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return model, {"encoder_hidden_states": text()}, (2, 4, 2, 4, 4)


def cosmos():
    model = diffusers.CosmosTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        patch_size=(1, 2, 2),
    )
    options = {"encoder_hidden_states": text(), "padding_mask": torch.zeros(1, 1, 4, 4)}
    return model, options, (2, 4, 2, 4, 4)


# (model, dtype, tolerance): the last two have parts that stay in float32 whatever they are told.
MODELS = [
    *((model, torch.float64, 1e-11) for model in (dit, pixart, sana, sd3, flux, qwen_image)),
    *((model, torch.float64, 1e-11) for model in (lumina, unet_condition, unet)),
    (wan, torch.float64, 1e-5),
    (cosmos, torch.float32, 2e-5),
]
EVERY = pytest.mark.parametrize(
    ("build", "dtype", "rtol"), MODELS, ids=lambda x: getattr(x, "__name__", "")
)


class Network(nn.Module):
    """A model as a function of latents and time."""

    def __init__(self, model, options):
        super().__init__()
        self.model, self.options = model, options
        self.latents = "sample" if "UNet" in type(model).__name__ else "hidden_states"

    def forward(self, x, t):
        inputs = {self.latents: x, "timestep": t, **self.options}
        return self.model(**inputs, return_dict=False)[0]


def make(build, dtype):
    """(network of (x, t), primals, tangents)."""
    torch.manual_seed(0)
    model, options, shape = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model.to(dtype).eval()
    for parameter in model.parameters():  # the zeros that training starts from hide errors
        if not parameter.abs().max() > 0 or parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    options = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.dtype == torch.float64 else x
        for name, x in options.items()
    }

    x, tx = torch.randn(2, *shape, dtype=dtype)
    t, tt = torch.rand(2, shape[0], dtype=dtype)
    return Network(model, options), (x, t), (tx, tt)


@EVERY
def test_jvp_and_gradients(build, dtype, rtol):
    network, primals, tangents = make(build, dtype)
    parameters = list(network.parameters())
    truth = true_jvp(network, primals, tangents)
    assert truth[1].abs().max() > 0
    for through in (False, True):
        result = scm_kernels.jvp(network, primals, tangents, tangent_grad=through)
        close(tuple(result), tuple(truth), rtol)
        want = gradients(*truth, parameters, through_tangent=through)
        got = gradients(*result, parameters, through_tangent=through)
        close(got, want, 10 * rtol, f"gradient, tangent_grad={through}")


@EVERY
def test_fused_and_without_duals(build, dtype, rtol):
    network, primals, tangents = make(build, dtype)
    with torch.no_grad():
        plain = network(*primals)
        with scm_kernels.fused():
            assert torch.equal(network(*primals), plain)
            got = torch.func.jvp(network, primals, tangents)
        truth = true_jvp(network, primals, tangents)
    close(tuple(got), tuple(truth), rtol)


@pytest.mark.parametrize("build", [dit, sana], ids=lambda f: f.__name__)
def test_bfloat16_autocast(build):
    """The error of the pass is that of autocast with PyTorch's own jvp."""
    network, primals, tangents = make(build, torch.float32)
    truth = true_jvp(network, primals, tangents)
    with torch.autocast("cpu", torch.bfloat16):
        eager = true_jvp(network, primals, tangents)
        got = scm_kernels.jvp(network, primals, tangents)
    for x, lo, true in zip(got, eager, truth, strict=True):
        assert x.dtype == lo.dtype
        error, lo_error = ((y.float() - true).abs().mean() for y in (x, lo))
        assert error <= 2 * lo_error + 1e-3 * true.abs().mean()


@pytest.mark.parametrize(
    ("build", "dtype", "rtol"),
    [MODELS[i] for i in (0, 2, 4, 8, 9)],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_gradient_checkpointing(build, dtype, rtol):
    """Parts that stay in float32 are rounded as by another formula of the same derivative."""
    network, primals, tangents = make(build, dtype)
    parameters = list(network.parameters())
    plain = scm_kernels.jvp(network, primals, tangents)
    network.model.enable_gradient_checkpointing()
    result = scm_kernels.jvp(network, primals, tangents)
    close(tuple(result), tuple(plain), max(rtol, 1e-7))
    want = gradients(*plain, parameters, through_tangent=False)
    got = gradients(*result, parameters, through_tangent=False)
    close(got, want, max(10 * rtol, 1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("build", [dit, sana, unet, wan], ids=lambda f: f.__name__)
def test_compiled(build):
    torch._dynamo.reset()
    network, primals, tangents = make(build, torch.float32)
    truth = true_jvp(network, primals, tangents)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(primals, tangents):
        return scm_kernels.jvp(network, primals, tangents)

    close(tuple(step(primals, tangents)), tuple(truth), 2e-5)

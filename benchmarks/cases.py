"""What is measured: the shapes that users run, a sweep of lengths, and how much of both at once."""

from dataclasses import dataclass, replace

import torch

# What a case of attention runs: (matrix products that the mathematics needs, 2 B H M N D operations
# each; those of an ordinary attention that gives the same without a tangent, 0 if there is none).
ATTENTION_RUNS = {
    "forward": (6, 2),  # out and its tangent
    "absent": (4, 2),  # the same with a tangent of the query alone, as over a constant context
    "out": (6 + 5, 2 + 5),  # and the gradient through out: how a consistency model is trained
    "both": (6 + 15, 0),  # and the gradient of all six inputs through both outputs
}
# What a case of the tangent runs: tensors of the sample's shape that have to be read or written.
TANGENT_RUNS = {"tangent": 5, "loss": 4, "loss, backward": 9}
MODELS = ("dit", "sana", "wan", "edm2", "flux", "cosmos")
HALF = ("bfloat16",)


@dataclass(frozen=True)
class Case:
    """One set of inputs, and what is run on them.

    shape: of attention B, H, M, N, D; of the tangent that of a batch of samples; of a DiT's block
    and training step batch, tokens, width, depth, heads.
    """

    kind: str  # "attention", "tangent", "block", "step"
    run: str
    model: str  # whose shape it is
    shape: tuple[int, ...]
    dtype: str
    masked: bool = False  # keys are padding beyond a length of each sample's own

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def label(self) -> str:
        mask = ", padded keys" if self.masked else ""
        shape = "x".join(map(str, self.shape))
        return f"{self.kind}, {self.run}: {self.model} {shape} {self.dtype}{mask}"


@dataclass(frozen=True)
class Shape:
    """A row of the table of shapes in the specification of attention."""

    model: str
    name: str
    b: int
    h: int
    m: int
    n: int
    d: int
    dtypes: tuple[str, ...] = HALF
    masked: bool = False

    @property
    def cross(self) -> bool:
        return self.m != self.n


def _shapes(model: str, name: str, batches, heads, lengths, d: int, **rest) -> list[Shape]:
    """A shape for each batch, number of heads, and pair of lengths."""
    return [
        Shape(model, name, b, h, m, n, d, **rest)
        for b in batches
        for h in heads
        for m, n in lengths
    ]


# A batch of 2,048 over 64 devices; B is a device's.
SHAPES = [
    Shape("edm2", "EDM2-XXL 16x16", 32, 21, 256, 256, 64, ("float16",)),
    Shape("edm2", "EDM2-XXL 8x8", 32, 28, 64, 64, 64, ("float16",)),
    *_shapes(
        *("dit", "DiT-XL/2", (8, 32), (16,), ((256, 256), (1024, 1024)), 72),
        dtypes=("float32", "bfloat16"),
    ),
    Shape("dit", "LightningDiT-XL/1", 32, 16, 256, 256, 72),
    Shape("sana", "SANA-Sprint 0.6B", 16, 16, 1024, 300, 72, ("float32",), masked=True),
    Shape("sana", "SANA-Sprint 1.6B", 16, 20, 1024, 300, 112, ("float32",), masked=True),
    *_shapes("wan", "Wan2.1 1.3B", (1,), (12,), ((32760, 32760), (32760, 512)), 128),
    *_shapes("wan", "Wan2.1 14B", (1,), (5,), ((32760, 32760), (32760, 512)), 128),
    *_shapes("cosmos", "Cosmos-Predict2 2B", (1, 4), (16,), ((4080, 4080), (4080, 512)), 128),
    *_shapes("cosmos", "Cosmos-Predict2 14B", (1, 4), (40,), ((4080, 4080), (4080, 512)), 128),
    Shape("flux", "FLUX.1", 1, 24, 4608, 4608, 128),
]


def of_model(model: str, runs: tuple[str, ...]) -> list[Case]:
    """The cases of a model's shapes; over a context, that has no tangent, "forward" is "absent"."""
    cases = []
    for s in (s for s in SHAPES if s.model == model):
        for dtype in s.dtypes:
            shape = (s.b, s.h, s.m, s.n, s.d)
            case = Case("attention", "", s.name, shape, dtype, s.masked)
            mine = ("absent",) if s.cross else runs
            cases += [replace(case, run=run) for run in mine]
    return list(dict.fromkeys(cases))


def sweep(lengths, dtypes, runs, b: int = 1, h: int = 8, d: int = 64) -> list[Case]:
    """The same attention at growing lengths."""
    return [
        Case("attention", run, "sweep", (b, h, n, n, d), dtype)
        for dtype in dtypes
        for run in runs
        for n in lengths
    ]


def tangents(shapes, dtypes, runs=tuple(TANGENT_RUNS)) -> list[Case]:
    return [
        Case("tangent", run, "latents", shape, dtype)
        for dtype in dtypes
        for shape in shapes
        for run in runs
    ]


def networks(blocks, steps, dtypes) -> list[Case]:
    """A DiT's block with its tangent, and a whole training step, of each shape."""
    rows = [("block", "jvp", shape) for shape in blocks] + [("step", "sCM", s) for s in steps]
    return [Case(kind, run, "DiT", shape, dtype) for dtype in dtypes for kind, run, shape in rows]


TINY = [
    *sweep((64, 96), ("float32",), ("forward", "out"), h=2, d=32),
    *tangents([(4, 4, 16, 16)], ("float32",), ("tangent",)),
    *networks([(2, 64, 64, 1, 2)], [(2, 64, 64, 1, 2)], ("float32",)),
]
HEAD_DIMS = (64, 72, 96, 112, 128)
LATENTS = [(256, 4, 64, 64), (64, 16, 128, 128), (1, 2_000_000), (8, 16, 21, 60, 104)]
XL_BLOCK, B_STEP, XL_STEP = (8, 256, 1152, 1, 16), (8, 256, 768, 12, 12), (32, 256, 1152, 28, 16)


def _quick(device: str) -> list[Case]:
    runs, long = tuple(ATTENTION_RUNS), ("forward", "out", "both")
    if device == "cuda":
        return [
            *sweep((256, 1024, 4096, 8192), HALF, runs),
            *tangents(LATENTS[:2], HALF),
            *networks([XL_BLOCK], [B_STEP], HALF),
            *(case for d in HEAD_DIMS for case in sweep((4096,), HALF, long, h=16, d=d)),
            *of_model("dit", ("forward", "out")),
        ]
    return [
        *sweep((128, 256, 512, 1024), ("float32",), ("forward", "out")),
        *networks([(2, 256, 384, 1, 6)], [(2, 256, 256, 2, 4)], ("float32",)),
        *tangents(LATENTS[:1], ("float32",)),
        *sweep((512,), ("float32",), ("absent", "both")),
        *(case for case in of_model("dit", ("forward",)) if case.shape[:3] == (8, 16, 256)),
        *sweep((512,), HALF, ("forward", "out")),
        *tangents(LATENTS[:1], HALF, ("tangent",)),
    ]


def _short_and_long(dtypes) -> list[Case]:
    """What a CPU is measured on beside the sweep: long rows, wide heads, many short sequences."""
    return [
        *sweep((4096,), dtypes, ("forward",), h=4),
        *sweep((1024,), dtypes, ("forward",), d=128),
        *sweep((64,), dtypes, ("forward",), b=64, h=4, d=32),
    ]


def _default(device: str) -> list[Case]:
    cuda = device == "cuda"
    dtypes = ("bfloat16", "float32") if cuda else ("float32", "bfloat16")
    lengths = (256, 512, 1024, 2048, *((4096, 8192, 16384) if cuda else ()))
    trained = ("forward", "out")
    return [
        *sweep(lengths, dtypes, ATTENTION_RUNS if cuda else trained),
        *networks([XL_BLOCK], [B_STEP, XL_STEP] if cuda else [(4, 256, 384, 6, 6)], dtypes[:1]),
        *sweep((1024,), dtypes, ("absent", "both")),
        *sweep((256,), dtypes, trained, b=8, h=16, d=72),
        *([] if cuda else _short_and_long(dtypes)),
        *(case for model in MODELS if cuda for case in of_model(model, trained)),
        *tangents(LATENTS, dtypes),
    ]


def _full(device: str) -> list[Case]:
    dtypes = ("float32", "bfloat16", "float16")
    lengths = (64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    return [
        *(case for d in (64, 128) for case in sweep(lengths, dtypes, ATTENTION_RUNS, d=d)),
        *(case for model in MODELS for case in of_model(model, tuple(ATTENTION_RUNS))),
        *tangents(LATENTS, dtypes),
        *networks([XL_BLOCK], [B_STEP, XL_STEP], dtypes[:2]),
    ]


def select(scale: str, device: str, models: tuple[str, ...] = ()) -> list[Case]:
    """The cases of a scale ("tiny", "quick", "default", "full"), or of the models named."""
    if models:
        runs = {"tiny": ("forward",), "quick": ("forward",), "default": ("forward", "out")}
        mine = runs.get(scale, tuple(ATTENTION_RUNS))
        return [case for model in models for case in of_model(model, mine)]
    if scale == "tiny":
        return TINY
    chosen = {"quick": _quick, "default": _default, "full": _full}[scale]
    return list(dict.fromkeys(chosen(device)))

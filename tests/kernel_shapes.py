"""The kernels' test cases: every op in regular, ragged, tiny and batched shapes. Emulator and CUDA tests share them."""

from mlx_fastvlm.kernels.catalog import (
    ADD_RMS_NORM,
    DEPTHWISE_CONV,
    DEPTHWISE_PAIR,
    LINEAR_EPILOGUE,
    QUANTIZED_SWIGLU,
    ROTARY_HEADS,
    SELF_ATTENTION,
    SQUEEZE_EXCITE,
    SWIGLU,
    Case,
)

MAPS = {"regular": (1, 16, 16, 32), "ragged": (1, 13, 18, 20), "tiny": (1, 2, 3, 8), "batch": (2, 9, 7, 12)}
# kernel size, stride, multiplier, GELU: the stem's and the four downsamplings, RepMixer and conv_exp, ConvFFN and RepCPE
CONVOLUTIONS = ((3, 2, 1, True), (7, 2, 2, True), (3, 1, 1, False), (3, 1, 2, False), (7, 1, 1, False))


def _convolutions(kind, shape):
    channels = shape[-1]
    for kernel, stride, multiplier, gelu in CONVOLUTIONS:
        outputs = channels * multiplier
        label = f"{kernel}x{kernel}/{stride} x{multiplier} {kind}"
        shapes = (shape, (outputs, kernel, kernel, 1), (outputs,))
        yield Case(DEPTHWISE_CONV, label, 1, shapes, options={"stride": stride, "gelu": gelu})


def _pairs(kind, shape):
    channels = shape[-1]
    weights = ((channels, 3, 3, 1), (channels,), (channels, 7, 7, 1), (channels,))
    yield Case(DEPTHWISE_PAIR, kind, 1, (shape, *weights))


def _squeezes():
    for kind, (batch, positions, channels, squeezed) in {
        "regular": (1, 64, 64, 8),
        "ragged": (1, 77, 72, 5),
        "tiny": (1, 2, 8, 1),
        "batch": (3, 20, 40, 12),
    }.items():
        weights = ((squeezed, channels), (squeezed,), (channels, squeezed), (channels,))
        yield Case(SQUEEZE_EXCITE, kind, 1, ((batch, positions, channels), *weights))


def _attentions():
    for kind, (batch, tokens, heads, head_dim) in {
        "regular": (1, 128, 2, 32),
        "ragged": (1, 77, 3, 32),
        "tiny": (1, 3, 1, 32),
        "batch": (2, 40, 2, 32),
        "wide heads": (1, 40, 1, 64),
    }.items():
        yield Case(SELF_ATTENTION, kind, 1, ((batch, tokens, 3 * heads * head_dim),), options={"head_dim": head_dim})


def _norms():
    for kind, (rows, width) in {"regular": (4, 1024), "ragged": (3, 900), "tiny": (1, 8), "wide": (2, 3584)}.items():
        yield Case(ADD_RMS_NORM, kind, 1, ((rows, width), (rows, width), (width,)), options={"eps": 1e-6})


def _heads():
    for kind, (batch, length, heads, kv_heads, head_dim) in {
        "regular": (1, 4, 14, 2, 64),
        "ragged": (1, 3, 3, 1, 24),
        "tiny": (1, 1, 1, 1, 8),
        "batch": (2, 5, 6, 2, 128),
        "large batch": (9, 1, 2, 1, 16),
    }.items():
        joint = (heads + 2 * kv_heads) * head_dim
        options = {"heads": heads, "kv_heads": kv_heads, "base": 1e6}
        offsets = tuple(37 - 4 * row for row in range(batch))
        yield Case(ROTARY_HEADS, kind, 1, ((batch, length, joint), (joint,)), offsets, options)


def _gates():
    for kind, shape in {"regular": (2, 2048), "ragged": (3, 2 * 52), "tiny": (1, 8)}.items():
        yield Case(SWIGLU, kind, 1, (shape,))


def _linears():
    for kind, (rows, inputs, outputs) in {
        "regular": (64, 64, 64),
        "ragged": (70, 44, 76),
        "tiny": (64, 8, 8),
        "long": (129, 100, 36),
    }.items():
        for gelu in (True, False):
            extra = (outputs,) if gelu else (rows, outputs)
            label = f"{kind} {'gelu' if gelu else 'residual'}"
            options = {"gelu": gelu, "residual": not gelu}
            yield Case(
                LINEAR_EPILOGUE, label, 1, ((rows, inputs), (outputs, inputs), (outputs,), extra), options=options
            )


def _quantized():
    for kind, (rows, inputs, outputs, group_size, bits) in {
        "regular": (1, 512, 64, 64, 4),
        "ragged": (1, 576, 37, 32, 8),
        "tiny": (1, 32, 1, 32, 4),
        "batch": (3, 640, 21, 128, 8),
    }.items():
        options = {"group_size": group_size, "bits": bits}
        yield Case(QUANTIZED_SWIGLU, kind, 1, ((rows, inputs), (2 * outputs, inputs)), options=options)


CASES = [
    *(case for kind, shape in MAPS.items() for case in (*_convolutions(kind, shape), *_pairs(kind, shape))),
    *_squeezes(),
    *_attentions(),
    *_norms(),
    *_heads(),
    *_gates(),
    *_linears(),
    *_quantized(),
]


def case_name(case: Case) -> str:
    return f"{case.op} {case.label}".replace(" ", "-")

"""What MLX sees of a part of the network: `python -m tests.traced_products tower 0.5b 256` prints it as JSON."""

import json
import math
import sys

import mlx.core as mx

from mlx_fastvlm.benchmarks.random_model import random_config
from mlx_fastvlm.fastvithd import FastViTHD
from mlx_fastvlm.kernels import plain_ops
from mlx_fastvlm.qwen2 import Qwen2


def traced_products(function, *arrays: mx.array) -> list[tuple[str, float]]:
    """(kind, operations) of every matrix product and convolution that MLX sees; nothing is computed."""
    seen: list[dict] = []
    with plain_ops():
        mx.export_function(seen.append, function, *arrays)
    products = []
    for node in seen:
        if node["type"] != "primitive" or node["name"] not in ("AddMM", "Matmul", "Convolution"):
            continue
        (_, left, _), (_, right, _) = node["inputs"][:2]
        outputs = math.prod(node["outputs"][0][1])
        depth = math.prod(right[1:]) if node["name"] == "Convolution" else left[-1]
        depthwise = node["name"] == "Convolution" and right[-1] == 1 and right[0] == left[-1]
        kind = "product" if node["name"] != "Convolution" else "depthwise" if depthwise else "convolution"
        products.append((kind, 2.0 * outputs * depth))
    return products


def of_tower(config: str, resolution: int) -> list[tuple[str, float]]:
    tower = FastViTHD(random_config(config).vision_config)
    return traced_products(tower, mx.zeros((1, resolution, resolution, 3)))


def of_decoder(config: str, tokens: int) -> list[tuple[str, float]]:
    """Of a prefill of so many tokens and the logits that follow."""
    decoder = Qwen2(random_config(config).text_config)

    def step(ids: mx.array) -> mx.array:
        hidden = decoder.hidden_states(decoder.embed_tokens(ids), decoder.make_cache())
        return decoder.logits(hidden[:, -1])

    return traced_products(step, mx.zeros((1, tokens), mx.int32))


if __name__ == "__main__":
    part, config, size = sys.argv[1:]
    print(json.dumps({"tower": of_tower, "decoder": of_decoder}[part](config, int(size))))

"""The tables of docs/quantization.md, rendered from the results that `quantization` has saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .docs_page import fill, markdown_table

Row = dict[str, str]  # column → cell
SAVED = ("quantization", "quantization-kv", "quantization-0.5b")  # names of the results that the page shows


def demo_rows(result: Mapping[str, Any]) -> list[Row]:
    """Size, fidelity and accuracy of the demo model, a row a recipe."""
    return [_demo_row(model) for model in result["models"]]


def kv_rows(result: Mapping[str, Any]) -> list[Row]:
    """What fewer bits for keys and values cost the demo model, a row a number of bits."""
    return [
        {
            "bits": str(model["kv_bits"]),
            "KL, nats": f"{model['fidelity']['next_token']['kl_mean']:.1e}",
            "top-1 agreement": f"{model['fidelity']['next_token']['top1_agreement']:.1%}",
            "perplexity": f"{model['fidelity']['next_token']['perplexity_change']:+.2%}",
            "same answers": f"{model['fidelity']['answers']['identical']:.0%}",
        }
        for model in result["models"]
    ]


def full_size_rows(result: Mapping[str, Any]) -> list[Row]:
    """Size, memory and speed of a model of real size, a row a recipe."""
    first = result["models"][0]
    return [_full_size_row(model, first) for model in result["models"]]


def claim(demo: Mapping[str, Any], full: Mapping[str, Any]) -> str:
    """What is true here of "INT8 takes 40% less memory at 98% of the accuracy", in one sentence."""
    reference, int8 = (_by_recipe(demo, name) for name in (demo["models"][0]["recipe"], "int8"))
    stored, small = (_by_recipe(full, name) for name in (full["models"][0]["recipe"], "int8"))
    accuracy = int8["easy_vqa_test"]["exact_match"] / reference["easy_vqa_test"]["exact_match"]
    disk = 1 - small["weight_bytes"] / stored["weight_bytes"]
    memory = 1 - small["peak_rss_bytes"]["median"] / stored["peak_rss_bytes"]["median"]
    return (
        f"Recipe `int8` stores {full['model']}, a model of FastVLM-0.5B's size, in {disk:.0%} less room and answers in "
        f"{_less(memory)} peak memory ({full['dtype']} on the {full['machine']['mlx_device']}), and the demo model keeps "
        f"{accuracy:.1%} of its easy-VQA accuracy "
        f"({int8['easy_vqa_test']['exact_match']:.2%} against {reference['easy_vqa_test']['exact_match']:.2%} of "
        f"{int8['easy_vqa_test']['questions']:,} questions)."
    )


def fill_docs(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with every generated block renewed.

    Args:
        text: Markdown with `<!-- begin NAME -->` and `<!-- end NAME -->` around what is generated: "claim", "demo",
            "kv" and "full-size".
        results: each of SAVED → the saved result.

    Raises:
        BenchmarkError: a mark is missing.
    """
    demo, full = results["quantization"], results["quantization-0.5b"]
    blocks = {
        "claim": claim(demo, full),
        "demo": markdown_table(demo_rows(demo)),
        "kv": markdown_table(kv_rows(results["quantization-kv"])),
        "full-size": markdown_table(full_size_rows(full)),
    }
    return fill(text, blocks)


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) for `report.format_table`."""
    return list(rows[0]), [list(row.values()) for row in rows]


def _demo_row(model: Mapping[str, Any]) -> Row:
    fidelity, accuracy = model["fidelity"], model["easy_vqa_test"]
    tokens = fidelity["next_token"]
    return {
        "recipe": model["recipe"],
        "bits per weight": f"{model['bits_per_weight']:.2f}",
        "MB": f"{fidelity['candidate']['weight_bytes'] / 1e6:.2f}",
        "of reference": f"{fidelity['size_ratio']:.0%}",
        "image features, cosine": f"{fidelity['image_features']['mean']:.5f}",
        "worst row": f"{fidelity['image_features']['worst']:.5f}",
        "KL, nats": f"{tokens['kl_mean']:.1e}",
        "top-1 agreement": f"{tokens['top1_agreement']:.1%}",
        "perplexity": f"{tokens['perplexity_change']:+.2%}",
        "same answers": f"{fidelity['answers']['identical']:.0%}",
        "easy-VQA": f"{accuracy['exact_match']:.2%}",
    }


def _full_size_row(model: Mapping[str, Any], first: Mapping[str, Any]) -> Row:
    memory = model["peak_rss_bytes"]["median"]
    return {
        "recipe": model["recipe"],
        "bits per weight": f"{model['bits_per_weight']:.2f}",
        "MB": f"{model['weight_bytes'] / 1e6:,.0f}",
        "of reference": f"{model['weight_bytes'] / first['weight_bytes']:.0%}",
        "peak memory, GB": f"{memory / 1e9:.2f}",
        "of reference's": f"{memory / first['peak_rss_bytes']['median']:.0%}",
        "held by MLX, GB": f"{model['peak_mlx_bytes']['median'] / 1e9:.2f}",
        "time to first token, ms": f"{model['ttft_s']['median'] * 1e3:,.0f}",
        "decoding, tok/s": f"{model['decode_tps']['median']:.1f}",
    }


def _by_recipe(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(model for model in result["models"] if model["recipe"] == name)


def _less(share: float) -> str:
    return f"{share:.0%} less" if share >= 0 else f"{-share:.0%} more"

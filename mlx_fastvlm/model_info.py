"""What a converted model is, read from its files without loading the weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx.utils import tree_flatten

from mlx_fastvlm.clip_head import ClipHead
from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.errors import CheckpointError
from mlx_fastvlm.json_file import read_json_object
from mlx_fastvlm.model import FastVLM
from mlx_fastvlm.quantization import Storage
from mlx_fastvlm.safetensors_file import SafetensorsFile

_NORM = "language_model.norm.weight"  # never quantized: its type is the model's
_PARTS = ("vision_tower", "mm_projector", "language_model")


def describe_model(folder: Path) -> dict[str, Any]:
    """Facts about a converted model.

    Returns:
        folder, bytes on disk, dtype, quantization (None if there is none), parameters by part and in all, image size and
        rows, sizes of tower and decoder, the width of CLIP's head (None without one), and conversion.json's content as
        `provenance` (None if there is none).

    Raises:
        ConfigError, CheckpointError: the folder is not a sound converted model.
    """
    config = FastVLMConfig.from_folder(folder)
    weights = SafetensorsFile(folder / "model.safetensors")
    parameters = dict.fromkeys(_PARTS, 0)
    strange = [name for name in weights.names() if name.partition(".")[0] not in parameters]
    if strange:
        raise CheckpointError(
            f"{weights.path} holds {strange[0]}, which is no part of FastVLM; convert the model again."
        )
    if _NORM not in weights:
        raise CheckpointError(f"{weights.path} lacks {_NORM}; convert the model again.")
    # Counted before any quantization: packed weights are fewer numbers than they stand for.
    for name, array in tree_flatten(FastVLM(replace(config, quantization=None)).parameters()):
        parameters[name.partition(".")[0]] += array.size
    vision, text = config.vision_config, config.text_config
    clip_head = ClipHead.in_folder(folder)
    return {
        "folder": str(folder),
        "bytes": weights.path.stat().st_size,
        "dtype": weights.dtype(_NORM),
        "quantization": None if config.quantization is None else config.quantization.to_dict(),
        "parameters": {**parameters, "total": sum(parameters.values())},
        "image_size": vision.image_size,
        "image_tokens": vision.num_image_tokens,
        "vision_tower": {
            "embed_dims": list(vision.embed_dims),
            "layers": list(vision.layers),
            "hidden_size": vision.hidden_size,
        },
        "language_model": {
            "hidden_size": text.hidden_size,
            "layers": text.num_hidden_layers,
            "attention_heads": text.num_attention_heads,
            "key_value_heads": text.num_key_value_heads,
            "vocab_size": text.vocab_size,
            "context": text.max_position_embeddings,
            "tied_embeddings": text.tie_word_embeddings,
        },
        "clip_head": None if clip_head is None else clip_head.width,
        "provenance": _read_record(folder / "conversion.json"),
    }


def _read_record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    record = read_json_object(path, CheckpointError)
    missing = sorted({"source", "revision", "license", "folded", "self_check", "created", "converter"} - set(record))
    if missing:
        raise CheckpointError(f"{path} is damaged ({missing[0]!r} is missing); convert the model again.")
    return record


def format_model_info(facts: dict[str, Any]) -> str:
    """`describe_model`'s facts as lines for people."""
    vision, text, parameters = facts["vision_tower"], facts["language_model"], facts["parameters"]
    lines = [
        ("folder", facts["folder"]),
        ("weights", f"{facts['bytes'] / 1e6:,.1f} MB, {facts['dtype']}"),
        ("image", f"{facts['image_size']}×{facts['image_size']} pixels → {facts['image_tokens']} tokens"),
        (
            "vision_tower",
            f"{_millions(parameters['vision_tower'])}: widths {_list(vision['embed_dims'])}, depths {_list(vision['layers'])}",
        ),
        ("mm_projector", f"{_millions(parameters['mm_projector'])}: {vision['hidden_size']} → {text['hidden_size']}"),
        (
            "language_model",
            f"{_millions(parameters['language_model'])}: {text['layers']} layers of {text['hidden_size']}, "
            f"{text['attention_heads']} heads on {text['key_value_heads']}, vocabulary {text['vocab_size']}"
            f"{', tied' if text['tied_embeddings'] else ''}, context {text['context']}",
        ),
        ("clip_head", f"{vision['hidden_size']} → {facts['clip_head']}" if facts["clip_head"] else "none"),
        ("parameters", _millions(parameters["total"])),
    ]
    if facts["quantization"]:
        parts = facts["quantization"]["parts"].items()
        chosen = "; ".join(f"{part} {Storage(**storage)}" for part, storage in parts if storage)
        lines.append(("quantized", f"{facts['quantization']['recipe']}: {chosen}"))
    record = facts["provenance"]
    if record:
        revision = f" at {record['revision']}" if record["revision"] else ""
        folded = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in record["folded"].items() if count)
        lines += [
            ("source", f"{record['source']}{revision}"),
            ("license", record["license"]),
            ("folded", folded),
            (
                "self-check",
                f"{record['self_check']['max_relative_error']:.1e} relative over {record['self_check']['sites']} parts",
            ),
            ("converted", f"{record['created']} by {record['converter']}"),
        ]
    width = max(len(label) for label, _ in lines)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in lines)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.2f} M"


def _list(numbers: list[int]) -> str:
    return "/".join(map(str, numbers))

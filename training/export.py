"""Write and read the demo checkpoint as a hub-style LlavaQwen2 folder."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from training.config import generation_config, model_config
from training.model import FastVLM


def export(model: FastVLM, folder: Path, vocab_size: int) -> None:
    """Save weights (training form, float32) and configs beside the tokenizer's files, which must be there already."""
    config = model_config(vocab_size)
    save_file(
        {k: v.contiguous() for k, v in model.named_state().items()}, folder / "model.safetensors", {"format": "pt"}
    )
    for name, content in (("config.json", config), ("generation_config.json", generation_config(config))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def load(folder: Path) -> FastVLM:
    """The exported model, in eval mode."""
    model = FastVLM(json.loads((folder / "config.json").read_text()))
    model.load_named_state(load_file(folder / "model.safetensors"))
    return model.eval()

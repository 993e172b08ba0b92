"""Exported folders where they are meant to go: PyTorch (timm, transformers) and mlx-vlm load them and agree with us."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import generate_step, load
from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.export import export
from mlx_fastvlm.generate import prefill
from mlx_fastvlm.sampling import make_sampler
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.reference.presets import preset
from tests.tolerances import FEATURES, LOGITS, relative_error

PROMPT = "What is in this picture?"
# mlx-vlm knows Apple's tower only, and no token beyond the tokenizer's: with a small picture and a tiny decoder.
STANDARD_TOWER = {"mm_hidden_size": 3072, "mm_vision_tower": "mobileclip_l_256", "vision_config": None}
TOKENS = {"vocab_size": 459}
SHORTENED = {"num_hidden_layers": 2, "vocab_size": 2048, "mm_vision_tower": "mobileclip_l_256"}


def greedy(model, embeddings, count=16):
    cache = model.make_cache()
    logits = prefill(model, embeddings, cache)
    return list(generate_step(logits, model, cache, max_tokens=count, sampler=make_sampler()))


def with_clip_head(folder, copy):
    """The folder with zeros for CLIP's head, which the strict reference wants as wide as Apple's."""
    shutil.copytree(folder, copy)
    width = json.loads((folder / "config.json").read_text())["mm_hidden_size"]
    head = "model.vision_tower.vision_tower.model.head.proj"
    mx.save_safetensors(str(copy / "head.safetensors"), {head: mx.zeros((width, 768))})
    weight_map = dict.fromkeys(Checkpoint(folder).names(), "model.safetensors") | {head: "head.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return copy


@pytest.mark.parametrize(
    ("form", "lm_head"), [("inference", "absent"), ("training", "absent"), ("inference", "untied")]
)
def test_pytorch_gives_our_logits(form, lm_head, tmp_path):
    pytest.importorskip("timm", reason="install the extra 'parity'")
    from tests.reference.torch_reference import load_reference

    source = write_hub_checkpoint(tmp_path / "source", config="tiny", form=form, lm_head=lm_head)
    ours = convert(source, tmp_path / "ours", dtype="float32")
    hub = export(ours, tmp_path / "hub", "hub", with_clip_head=False)
    assert_reference_agrees(load(ours, dtype="float32"), load_reference(with_clip_head(hub, tmp_path / "copy")))


def test_pytorch_loads_every_tensor_at_apples_widths(tmp_path):
    """CLIP's head among them: the strict reference takes the folder as it is."""
    pytest.importorskip("timm", reason="install the extra 'parity'")
    from tests.reference.torch_reference import load_reference

    source = write_hub_checkpoint(tmp_path / "source", config=preset("0.5b") | SHORTENED)
    ours = convert(source, tmp_path / "ours", dtype="float32")
    hub = export(ours, tmp_path / "hub", "hub", max_shard_bytes=200_000_000)
    assert len(list(hub.glob("*.safetensors"))) > 2
    assert_reference_agrees(load(ours, dtype="float32"), load_reference(hub))


def assert_reference_agrees(ours, reference):
    model, processor = ours
    pixels = np.random.default_rng(7).random((1, 256, 256, 3), dtype=np.float32)
    nchw = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    ids = processor.tokenize(PROMPT, num_images=1)
    features = model.encode_images(mx.array(pixels))
    assert relative_error(model.vision_tower(mx.array(pixels)), reference.image_features(nchw)) < FEATURES["float32"]
    assert relative_error(model(ids, features), reference.logits(ids, nchw)) < LOGITS["float32"]
    assert greedy(model, model.embed(ids, features)) == reference.greedy(ids, nchw, 16)


@pytest.mark.parametrize("use_fast", [True, False])
def test_transformers_reads_the_tokenizer(use_fast, converted_folder, tmp_path):
    transformers = pytest.importorskip("transformers", reason="install the extra 'parity'")
    hub = export(converted_folder("inference"), tmp_path / "hub", "hub")
    tokenizer = transformers.AutoTokenizer.from_pretrained(hub, use_fast=use_fast)
    text = "<|im_start|>user\nWhat is written? 你好<|im_end|>\n"
    _, processor = load(converted_folder("inference"))
    assert tokenizer(text, add_special_tokens=False).input_ids == processor.tokenizer.encode(text).ids
    assert tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("lm_head", ["absent", "untied"])
def test_mlx_vlm_gives_our_logits_and_answers(lm_head, tmp_path):
    mlx_vlm = pytest.importorskip("mlx_vlm", reason="mlx-vlm is compared where it is installed")
    changes = STANDARD_TOWER | TOKENS | {"tie_word_embeddings": lm_head == "absent"}
    source = write_hub_checkpoint(tmp_path / "source", config=preset("tiny") | changes, lm_head=lm_head)
    ours = convert(source, tmp_path / "ours")
    folder = export(ours, tmp_path / "mlx-vlm", "mlx-vlm", dtype="float32")
    shutil.rmtree(source)
    model, processor = load(ours, dtype="float32")
    theirs, their_processor = mlx_vlm.load(str(folder))  # strict by default

    pixels = np.random.default_rng(7).random((1, 256, 256, 3), dtype=np.float32)
    ids = processor.tokenize(PROMPT, num_images=1)
    features = model.encode_images(mx.array(pixels))
    wanted = theirs(mx.array([ids]), mx.array(pixels.transpose(0, 3, 1, 2)), mask=None).logits
    assert relative_error(model(ids, features), wanted) < LOGITS["float32"]

    picture = tmp_path / "picture.png"
    Image.fromarray((pixels[0] * 255).astype(np.uint8)).save(picture)
    framed = mlx_vlm.apply_chat_template(their_processor, theirs.config, PROMPT, num_images=1)
    responses = mlx_vlm.stream_generate(theirs, their_processor, framed, [str(picture)], max_tokens=8, temperature=0.0)
    found = [response.token for response in responses if response.finish_reason is None]
    features = model.encode_images(processor.preprocess(picture))
    assert found and found == greedy(model, model.embed(ids, features))[: len(found)]

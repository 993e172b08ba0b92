"""Several images and turns, with everything reused that can be, against the reference's one pass over all of it."""

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("timm", reason="install the extra 'parity'")
pytest.importorskip("torch", reason="install the extra 'parity'")

from mlx_fastvlm import Reuse, load, stream_generate
from mlx_fastvlm.answer import StageClock
from mlx_fastvlm.convert import convert
from mlx_fastvlm.options import GenerationOptions
from tests.parity.test_parity import SHORTENED, nchw
from tests.reference.hub_checkpoint import write_hub_checkpoint
from tests.reference.presets import preset
from tests.reference.torch_reference import load_reference
from tests.tolerances import LOGITS, relative_error

pytestmark = pytest.mark.filterwarnings("ignore::mlx_fastvlm.errors.FastVLMWarning")


@pytest.fixture(scope="module", params=["tiny", "0.5b"])
def case(request, tmp_path_factory):
    """(our model, our processor, reference, three uint8 pictures of the tower's size)."""
    changes = SHORTENED if request.param == "0.5b" else {}
    folder = tmp_path_factory.mktemp("parity")
    source = write_hub_checkpoint(
        folder / "hub", config=preset(request.param) | changes, form="inference", dtype="float32"
    )
    model, processor = load(convert(source, folder / "converted"), dtype="float32")
    side = model.config.vision_config.image_size
    pictures = np.random.default_rng(11).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    return model, processor, load_reference(source), pictures


def pixels(pictures):
    return nchw(np.stack(pictures).astype(np.float32) / np.float32(255))


def test_turns_with_images_anywhere(case):
    model, processor, reference, (a, b, c) = case
    reuse = Reuse(model, processor)
    said, shown = [], []
    for words, images in [
        ("What is this?", [a]),
        ("And between <image> and <image>, which is larger?", [b, c]),
        ("Why?", []),
        ("<image>Again?", [a]),
    ]:
        marked = words if "<image>" in words else "<image>\n" * len(images) + words
        said.append({"role": "user", "content": marked})
        shown += images
        ids = processor.tokenize(said, len(shown))
        with reuse.prefilled(ids, shown, GenerationOptions(max_tokens=8), StageClock()) as prompt:
            logits = prompt.logits
        wanted = reference.logits(ids, pixels(shown))
        assert prompt.prompt_tokens == wanted.shape[1]
        assert prompt.cached_tokens > (0 if len(said) == 1 else len(shown) - len(images)) * 16
        assert relative_error(logits[0], wanted[0, -1]) < LOGITS["float32"]
        responses = list(stream_generate(model, processor, said, shown, reuse=reuse, max_tokens=8))
        found = [response.token for response in responses]
        assert found == reference.greedy(ids, pixels(shown), 8)[: len(found)]
        said.append({"role": "assistant", "content": "".join(response.text for response in responses)})


def test_several_images_in_one_question(case):
    model, processor, reference, (a, b, c) = case
    for words, images in [("<image>x<image>", [b, a]), ("Compare.", [a, b, c]), ("x<image><image><image>", [a, a, c])]:
        ids = processor.tokenize(words, len(images))
        rows = [model.encode_images(mx.array(image[None].astype(np.float32) / 255))[0] for image in images]
        assert relative_error(model(ids, rows), reference.logits(ids, pixels(images))) < LOGITS["float32"]

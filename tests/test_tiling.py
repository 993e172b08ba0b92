"""Pictures in tiles: which tiles, in which order their rows stand, and that every way to an answer counts and sees the same."""

import dataclasses
import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import BatchGenerator, Conversation, GenerationOptions, Reuse, caption_images, load
from mlx_fastvlm.embedding import embed_images
from mlx_fastvlm.errors import FastVLMWarning, OptionError
from mlx_fastvlm.generate import stream_generate
from mlx_fastvlm.image_processing import ImageProcessor
from mlx_fastvlm.tiling import DEFAULT_GRIDS, Tiling, parse_grids

QUESTION = "Describe this image."
TILES = pytest.mark.filterwarnings("ignore:This model was trained on whole pictures")
SIDE = 256  # of the demo's input: 16 rows


@pytest.fixture(scope="module")
def loaded():
    """The demo model with a processor of its own, whose tiling tests may change."""
    model, processor = load("demo")
    return model, processor


@pytest.fixture(autouse=True)
def as_loaded(loaded):
    _, processor = loaded
    before = processor.image_processor
    yield
    processor.image_processor = before


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def with_merge(processor, merge):
    tiling = dataclasses.replace(processor.image_processor.tiling, merge=merge)
    processor.image_processor = dataclasses.replace(processor.image_processor, tiling=tiling)


# Tiles


def test_a_picture_of_the_grids_size_is_cut_and_not_changed():
    picture = noise(2 * SIDE, 3 * SIDE)
    cut = ImageProcessor(SIDE, fit="tiles", tiling=Tiling(((2, 3), (2, 2)))).tiles(picture)
    assert cut.layout.grid == (2, 3)
    pixels = np.asarray(picture, np.float32) / 255
    for number, tile in enumerate(cut.tiles[1:]):
        row, column = divmod(number, 2)
        wanted = pixels[row * SIDE : (row + 1) * SIDE, column * SIDE : (column + 1) * SIDE]
        assert np.allclose(tile, wanted, atol=1e-7)
    overview = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    assert np.allclose(cut.tiles[0], overview, atol=1e-7)


def test_what_the_grid_leaves_over_is_black_on_both_sides():
    white = Image.new("RGB", (600, 300), "white")
    cut = ImageProcessor(SIDE, fit="tiles", tiling=Tiling(((2, 2),))).tiles(white)
    assert cut.layout.resized == (512, 256)
    assert cut.tiles[0].min() > 0.99  # the overview keeps no shape, so it has no padding
    for tile, shown in ((cut.tiles[1], slice(128, None)), (cut.tiles[3], slice(None, 128))):
        assert tile[shown].min() > 0.99
        assert tile.sum() == pytest.approx(tile[shown].sum())


@pytest.mark.parametrize(
    ("size", "grid"),
    [((400, 300), (2, 2)), ((900, 300), (3, 1)), ((300, 900), (1, 3)), ((500, 250), (2, 1)), ((50, 50), (1, 2))],
)
def test_the_grid_suits_the_picture(size, grid):
    assert Tiling().layout(*size, SIDE).grid == grid


def test_grids_of_a_config():
    assert Tiling.of_model([[256, 512], [512, 256]], "spatial_unpad", 256) == Tiling(((1, 2), (2, 1)), "spatial_unpad")
    assert Tiling.of_model("[(512, 512)]", "flat", 256).grids == ((2, 2),)
    # What configs carry along from another tower, or what is no list of pairs, is not for this one.
    for pinpoints in (None, [], [[336, 672]], "(1x1),...,(6x6)", "nothing", [[256]], 7, [[0, 256]], [[25600, 25600]]):
        assert Tiling.of_model(pinpoints, "unknown", 256) == Tiling(DEFAULT_GRIDS, "flat")


def test_a_models_folder_says_its_grids(loaded, tmp_path):
    from mlx_fastvlm.loading import resolve_model

    folder = shutil.copytree(resolve_model("demo"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {"image_grid_pinpoints": [[256, 768]], "mm_patch_merge_type": "spatial"}
    (folder / "config.json").write_text(json.dumps(config))
    _, processor = load(folder)
    assert processor.image_processor.tiling == Tiling(((1, 3),), "spatial")
    assert loaded[1].image_processor.tiling == Tiling()
    assert processor.image_processor.fit == "pad"  # tiles are never the default


# Rows


def test_spatial_rows_stand_as_in_the_picture():
    """Rows that say where they are from come out line by line; unpadding takes lines from both ends."""
    layout = Tiling(((2, 2),), "spatial").layout(500, 500, SIDE)
    places = np.array([[y, x] for row in (0, 1) for column in (0, 1) for y in range(4 * row, 4 * row + 4)
                       for x in range(4 * column, 4 * column + 4)], np.float32)  # fmt: skip
    features = mx.array(np.concatenate([np.full((16, 2), -1, np.float32), places]).reshape(5, 16, 2))
    merged = np.array(layout.merged(features))
    assert (merged[:16] == -1).all()
    assert merged[16:].tolist() == [[y, x] for y in range(8) for x in range(8)]

    wide = Tiling(((2, 2),), "spatial_unpad").layout(600, 300, SIDE)
    kept = np.array(wide.merged(features))[16:]
    assert kept.tolist() == [[y, x] for y in range(2, 6) for x in range(8)]
    flat = dataclasses.replace(wide, merge="flat")
    assert np.array_equal(np.array(flat.merged(features)), np.array(features).reshape(-1, 2))


def test_very_narrow_pictures_keep_their_overview():
    layout = Tiling(((3, 1),), "spatial_unpad").layout(30000, 3, SIDE)
    features = mx.random.uniform(shape=(4, 16, 3))
    assert layout.rows == 16
    assert mx.array_equal(layout.merged(features), features[0]).item()


# Answers


@TILES
@pytest.mark.parametrize(
    ("merge", "size", "rows"),
    [
        ("flat", (520, 500), 5 * 16),
        ("spatial", (520, 500), 5 * 16),
        ("spatial_unpad", (520, 390), 16 + 8 * 6),
        ("flat", (900, 250), 4 * 16),
    ],
)
def test_every_way_to_an_answer_gives_the_same(loaded, merge, size, rows):
    model, processor = loaded
    with_merge(processor, merge)
    picture = noise(*size)
    options = {"fit": "tiles", "max_tokens": 8}
    answer = list(stream_generate(model, processor, QUESTION, picture, **options))
    text = "".join(response.text for response in answer)
    words = len(processor.tokenize(QUESTION, 1)) - 1
    assert answer[-1].prompt_tokens == words + rows

    reuse = Reuse(model, processor)
    for cached in (False, True):
        again = list(stream_generate(model, processor, QUESTION, picture, reuse=reuse, **options))
        assert "".join(response.text for response in again) == text
        assert again[-1].prompt_tokens == words + rows
        assert (again[-1].cached_tokens > rows) is cached

    generator = BatchGenerator(model, processor)
    tickets = [
        generator.add(QUESTION, picture, options=GenerationOptions(**options)),
        generator.add(QUESTION, picture, options=GenerationOptions(max_tokens=8)),  # a whole one in the same batch
    ]
    texts = dict.fromkeys(tickets, "")
    while generator.decoding or generator.waiting:
        for ticket, event in generator.step():
            texts[ticket] += event.text
    assert texts[tickets[0]] == text
    (caption,) = caption_images(model, processor, [picture], QUESTION, **options)
    assert (caption.text, caption.prompt_tokens) == (text, words + rows)

    conversation = Conversation(model, processor, **options)
    assert conversation.ask(QUESTION, image=picture) == text


@TILES
def test_flat_tiles_are_read_as_images_one_after_the_other(loaded):
    model, processor = loaded
    picture = noise(500, 500)
    chosen = processor.images_at(None, "tiles")
    cut = chosen.tiles(picture)
    ids = processor.tokenize(QUESTION, 1)
    place = ids.index(-200)
    apart = ids[:place] + [-200] * len(cut.tiles) + ids[place + 1 :]
    rows = cut.layout.merged(model.encode_images(mx.array(cut.tiles)))
    together = model(ids, [rows])
    assert mx.allclose(together, model(apart, list(model.encode_images(mx.array(cut.tiles)))), atol=1e-4).item()


def test_whoever_asks_for_tiles_is_told_once(loaded):
    _, processor = load("demo")
    with pytest.warns(FastVLMWarning, match="trained on whole pictures"):
        processor.images_at(None, "tiles")


@TILES
def test_a_prompt_that_tiles_make_too_long_is_refused_before_any_picture(loaded):
    model, processor = loaded
    processor.tile(((6, 6),))
    with pytest.raises(OptionError, match="context"):
        caption_images(model, processor, [noise(64, 64)], fit="tiles", max_tokens=600).send(None)


@TILES
def test_what_cannot_be_had_says_why(loaded):
    model, processor = loaded
    with pytest.raises(OptionError, match="Tiles all have one resolution"):
        processor.images_at("auto", "tiles")
    with pytest.raises(OptionError, match="has no one vector"):
        embed_images(model, processor, [], features="pooled", fit="tiles")
    with pytest.raises(OptionError, match="choose another fit"):
        processor.images_at(None, "tiles").to_array(noise(64, 64))
    for grids in ((), ((0, 1),), ((7, 6),)):
        with pytest.raises(OptionError, match="from 1 to 36 tiles"):
            processor.tile(grids)
    for text in ("", "2", "2x", "2x2;3x1", "axb"):
        with pytest.raises(OptionError, match="columns x rows"):
            parse_grids(text)
    assert parse_grids("2x2, 3x1") == ((2, 2), (3, 1))


# The command


def test_describe_in_tiles(loaded, tmp_path, command_line, monkeypatch):
    monkeypatch.setattr("mlx_fastvlm.cli.describe.load_model", lambda *args: loaded)
    noise(500, 500).save(tmp_path / "picture.png")
    given = ["describe", tmp_path / "picture.png", "--model", "demo", "--json", "--max-tokens", 2]

    def described(*arguments):
        code, out, errors = command_line(*given, *arguments)
        return errors if code else json.loads(out)["prompt_tokens"]

    whole = described()
    assert described("--fit", "tiles") == whole + 4 * 16
    assert described("--fit", "tiles", "--tile-grid", "3x2") == whole + 6 * 16
    assert "give --fit tiles too" in described("--tile-grid", "3x2")
    assert "columns x rows" in described("--fit", "tiles", "--tile-grid", "much")

"""Captions through Ray Data: a batch in, the same batch with captions out; and the example on a local cluster."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_fastvlm import generate, load
from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.ray_data import CaptionBatches
from tests.demo_pictures import draw

ROOT = Path(__file__).parent.parent
QUESTION = "Describe this image."


@pytest.fixture
def paths(tmp_path):
    """Two pictures and a file that is none."""
    for number in (0, 1):
        draw(tmp_path / f"{number}.png", number)
    (tmp_path / "bad.png").write_text("no picture")
    return [str(tmp_path / name) for name in ("0.png", "bad.png", "1.png")]


@pytest.fixture(scope="module")
def demo():
    return load("demo")


def objects(values):
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def test_paths_and_bytes_and_pixels_give_the_same_captions(paths, demo):
    good = [paths[0], paths[2]]
    expected = [generate(*demo, QUESTION, image=path) for path in good]
    pixels = np.stack([np.asarray(Image.open(path)) for path in good])
    batches = {
        "path": np.array(good),
        "bytes": objects([Path(path).read_bytes() for path in good]),
        "image": pixels,  # what Ray makes of images of one size
    }
    for column, values in batches.items():
        captioned = CaptionBatches("demo", column=column)({column: values, "id": np.arange(2)})
        assert list(captioned["caption"]) == expected, column
        assert list(captioned["error"]) == ["", ""] and list(captioned["id"]) == [0, 1]
        np.testing.assert_array_equal(captioned[column], values)


def test_what_cannot_be_read_has_its_error_beside_it(paths):
    batches = CaptionBatches("demo", "Describe this image.", output="text", error="why", max_tokens=2)
    result = batches({"path": objects([paths[1], "gone.png", paths[0]])})
    assert [bool(text) for text in result["text"]] == [False, False, True]
    assert "bad.png is text" in result["why"][0] and "There is no file gone.png" in result["why"][1]
    assert result["why"][2] == ""


def test_it_travels_without_its_model(paths):
    batches = CaptionBatches("demo", max_tokens=2)
    size = len(pickle.dumps(batches))
    before = batches({"path": np.array(paths[:1])})["caption"][0]
    assert len(pickle.dumps(batches)) == size < 1000
    assert pickle.loads(pickle.dumps(batches))({"path": np.array(paths[:1])})["caption"][0] == before


def test_mistakes_are_known_before_a_model_is_loaded():
    with pytest.raises(OptionError, match="max_tokens is 0"):
        CaptionBatches("no-such-model", max_tokens=0)
    with pytest.raises(OptionError, match="three different names"):
        CaptionBatches("no-such-model", column="text", output="text")
    with pytest.raises(OptionError, match="no column 'path'; it has image"):
        CaptionBatches("no-such-model")({"image": np.zeros((1, 2, 2, 3), np.uint8)})


def test_ray_is_not_imported():
    program = "import sys, mlx_fastvlm.ray_data; print('ray' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout == "False\n"


def test_the_example_on_a_local_cluster_equals_generate(tmp_path, demo):
    pytest.importorskip("ray")
    for number in range(8):
        draw(tmp_path / f"{number}.png", number)
    (tmp_path / "3.jpg").write_text("no picture")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "caption_with_ray.py", ".", "captions.jsonl"]
        + ["--model", "demo", "--batch-size", "3"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["path"] for row in rows] == ["0.png", "1.png", "2.png", "3.jpg", *(f"{n}.png" for n in range(3, 8))]
    for row in rows:
        if row["path"] == "3.jpg":
            assert row["caption"] == "" and "3.jpg is text" in row["error"]
        else:
            assert row == {
                "path": row["path"],
                "caption": generate(*demo, QUESTION, image=tmp_path / row["path"]),
                "error": "",
            }

"""Towers exported to Core ML as Apple's script does, read back: what went in, or what float16 leaves of it."""

import json
import shutil
import sys
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_fastvlm import load
from mlx_fastvlm.config import FastVLMConfig
from mlx_fastvlm.convert import convert
from mlx_fastvlm.convert.checkpoint import Checkpoint
from mlx_fastvlm.convert.coreml import read_tower
from mlx_fastvlm.convert.key_map import tower_sites
from mlx_fastvlm.convert.tensors import row_blocks
from mlx_fastvlm.errors import CheckpointError
from tests.reference.layouts import write_apple_export
from tests.tolerances import FEATURES, relative_error

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def tower(hub_folder):
    pytest.importorskip("torch", reason="install the extra 'parity'")
    from tests.reference.apple_tower import load_apple_tower

    return load_apple_tower(hub_folder("inference"), read_config(hub_folder("inference")))


@pytest.fixture(scope="module")
def package(tower, tmp_path_factory):
    """precision → an .mlpackage, by the settings of ml-fastvlm@592b4ad model_export/export_vision_encoder.py."""
    coremltools = pytest.importorskip("coremltools", reason="install the extra 'coreml'")
    if coremltools.__version__ <= "9.0" and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip("coremltools 9.0 makes no packages beside numpy 2.4, though it reads them")
    import torch

    pixels = torch.rand(1, 3, 256, 256)
    traced = torch.jit.trace(tower, pixels)
    made = {}

    def folder(precision):
        if precision not in made:
            made[precision] = tmp_path_factory.mktemp("coreml") / f"{precision}.mlpackage"
            coremltools.convert(
                traced,
                inputs=[coremltools.TensorType(name="images", shape=pixels.shape)],
                outputs=[coremltools.TensorType(name="image_features", dtype=np.float32)],
                convert_to="mlprogram",
                minimum_deployment_target=coremltools.target.iOS16,
                compute_precision=getattr(coremltools.precision, precision),
                skip_model_load=True,
            ).save(str(made[precision]))
        return made[precision]

    return folder


@pytest.mark.parametrize(("precision", "tolerance"), [("FLOAT32", 1e-6), ("FLOAT16", 1e-3)])
def test_a_package_folds_to_what_its_checkpoint_folds_to(precision, tolerance, package, hub_folder):
    source = hub_folder("inference")
    found, wanted = read_tower(package(precision), read_config(source)), Checkpoint(source)
    sites = tower_sites(FastVLMConfig.from_folder(source).vision_config)
    assert set(found.names()) == {name for site in sites for name in site.sources(found)}
    for site in sites:
        for name, array in site.fold(wanted).items():
            assert relative_error(site.fold(found)[name], array) <= tolerance, name


def test_tensors_are_read_by_rows(package, hub_folder):
    found = read_tower(package("FLOAT16"), read_config(hub_folder("inference")))
    for name in found.names():
        whole = found[name]
        assert tuple(whole.shape) == found.shape(name) and whole.dtype == mx.float32 and found.dtype(name) == "F16"
        assert mx.array_equal(mx.concatenate([rows for _, rows in row_blocks(found, name, 512)]), whole).item(), name


@pytest.mark.parametrize("precision", ["FLOAT32", "FLOAT16"])
def test_apples_export_with_its_package_converts(precision, package, tower, hub_folder, golden_pixels, tmp_path):
    """Through the converter and the model, against the torch module that was exported."""
    import torch

    export = write_apple_export(hub_folder("inference"), tmp_path / "export")
    shutil.copytree(package(precision), export / "fastvithd.mlpackage")
    model, _ = load(convert(export, tmp_path / "ours", dtype="float32"), dtype="float32")
    with torch.inference_mode():
        wanted = tower(torch.from_numpy(np.ascontiguousarray(golden_pixels.transpose(0, 3, 1, 2))))
    assert relative_error(model.vision_tower(mx.array(golden_pixels)), wanted) < FEATURES[precision.lower()]


def test_another_graph_is_refused(package, hub_folder, tmp_path):
    config = read_config(hub_folder("inference"))

    def refused(folder, match, **changes):
        with pytest.raises(CheckpointError, match=match):
            tower = read_tower(folder, config | changes)
            [tower[name] for name in tower.names()]

    larger = config["vision_config"] | {"layers": [1, 2, 2, 2, 1]}
    refused(
        package("FLOAT32"),
        "no operation reads .*network_7_1.* convert apple/FastVLM-7B instead",
        vision_config=larger,
        hidden_size=3584,
    )
    refused(tmp_path / "nothing.mlpackage", "model.mlmodel cannot be read")
    damaged = shutil.copytree(package("FLOAT32"), tmp_path / "damaged.mlpackage")
    (damaged / WEIGHTS).write_bytes((damaged / WEIGHTS).read_bytes()[:200_000])
    refused(damaged, "weight.bin is cut off")
    (damaged / WEIGHTS).unlink()
    (damaged / WEIGHTS).symlink_to(package("FLOAT32") / WEIGHTS)
    refused(damaged, "not a file of the package")


def argument(name):
    return SimpleNamespace(arguments=[SimpleNamespace(name=name)])


def operation(kind, output, **inputs):
    inputs = {key: argument(name) for key, name in inputs.items()}
    return SimpleNamespace(type=kind, outputs=[SimpleNamespace(name=output)], inputs=inputs, attributes={})


FC1 = "vision_tower_model_network_0_0_convffn_fc1_weight"


@pytest.mark.parametrize(
    "operations",
    [
        [operation("conv", "y", x="moved", weight=FC1), operation("reshape", "moved", x="moved")],
        [operation("conv", "y", x="x", weight=FC1), operation("batch_norm", "x", gamma="g"), operation("const", "g")],
        [SimpleNamespace(type="conv", outputs=[], inputs={"weight": argument(FC1), "x": argument("x")})],
    ],
    ids=["a circle", "a constant without a value", "no output"],
)
def test_a_damaged_graph_is_one_clear_error(operations, hub_folder, monkeypatch, tmp_path):
    config = read_config(hub_folder("inference"))
    sites = [site for site in tower_sites(FastVLMConfig.from_dict(config).vision_config) if "convffn" in str(site)]
    monkeypatch.setattr("mlx_fastvlm.convert.coreml.tower_sites", lambda config: sites[:1])
    monkeypatch.setattr("mlx_fastvlm.convert.coreml._read_operations", lambda model: operations)
    with pytest.raises(CheckpointError, match="does not hold FastViTHD as Apple exports it"):
        read_tower(tmp_path / "fastvithd.mlpackage", config)


def test_without_coremltools_the_message_says_what_to_do(hub_folder, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "coremltools", None)
    config = read_config(hub_folder("inference")) | {"hidden_size": 1536}
    with pytest.raises(CheckpointError, match=r"mlx-fastvlm\[coreml\].*apple/FastVLM-1.5B"):
        read_tower(tmp_path / "fastvithd.mlpackage", config)

"""Shared fixtures: tiny random checkpoints in the hub's layout, converted once for the whole run."""

import io
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_fastvlm import cli, load
from mlx_fastvlm.convert import convert
from tests.fake_gpu import fake_gpu  # noqa: F401, a fixture for all
from tests.reference.hub_checkpoint import write_hub_checkpoint

GOLDEN = Path(__file__).parent / "golden"


def golden_seed(form: str) -> int:
    """The seed of the random checkpoint that the golden numbers of this form are of."""
    return int(np.load(GOLDEN / f"tiny_{form}.npz")["seed"])


@pytest.fixture(scope="session")
def hub_folder(tmp_path_factory):
    """form → a tiny bfloat16 checkpoint as the hub would hold it; the same bytes the golden files were made from."""
    made = {}

    def folder(form: str) -> Path:
        if form not in made:
            seed = golden_seed(form)
            made[form] = write_hub_checkpoint(
                tmp_path_factory.mktemp("hub") / form, config="tiny", form=form, seed=seed
            )
        return made[form]

    return folder


@pytest.fixture(scope="session")
def converted_folder(hub_folder, tmp_path_factory):
    """form → that checkpoint through the real converter, stored as float32."""
    made = {}

    def folder(form: str) -> Path:
        if form not in made:
            destination = tmp_path_factory.mktemp("converted") / form
            made[form] = convert(hub_folder(form), destination, dtype="float32")
        return made[form]

    return folder


@pytest.fixture(scope="session")
def tiny(converted_folder):
    """(model, processor) of the inference-form tiny checkpoint."""
    return load(converted_folder("inference"), dtype="float32")


@pytest.fixture(scope="session")
def golden_pixels():
    """(2, 256, 256, 3) float32 in [0, 1]: the golden files' pictures."""
    return np.load(GOLDEN / "pixels.npz")["pixels"].astype(np.float32) / np.float32(255)


@pytest.fixture
def command_line(capsys, monkeypatch):
    """Run `mlx-fastvlm` in this process: arguments → (exit code, stdout, stderr)."""

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["mlx-fastvlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as end:
            cli.main()
        signal.signal(signal.SIGTERM, before)
        return (end.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture(scope="session", autouse=True)
def ctrl_c_interrupts():
    """As in a terminal, also where the tests run in the background of a shell, which has Ctrl-C ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or writes the user's cache, or asks the hub."""
    monkeypatch.setenv("MLX_FASTVLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub-cache"))

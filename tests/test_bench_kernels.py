"""The kernels benchmark, on ops made up here: which version is timed, against what, and how far apart they are."""

from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_fastvlm.benchmarks import kernels
from mlx_fastvlm.kernels import timing
from mlx_fastvlm.kernels.choice import KERNELS_VARIABLE, current_mode
from tests.benchmark_output import result_of

SECONDS = {"auto": 0.002, "off": 0.006, "reference": 0.012}


class Clock:
    """Shows the time that its `slow_op` takes, and none of what else the machine does."""

    now = 0.0

    def __call__(self):
        return self.now

    def slow_op(self, x):
        """Takes as long as its mode says, and is a thousandth off where a kernel would run."""
        self.now += SECONDS[current_mode()]
        return (x * (1.001 if current_mode() == "auto" else 1.0),)


@pytest.fixture
def case(monkeypatch):
    """count → a case of an op that is timed by a clock of its own."""
    clock = Clock()
    monkeypatch.setattr(timing, "perf_counter", clock)

    def make(count=3):
        return SimpleNamespace(
            op="double", label="4", count=count, arrays=lambda dtype: (mx.full((4,), 2, dtype),), run=clock.slow_op
        )

    return make


@pytest.mark.parametrize(("against", "factor"), [("off", 3), ("reference", 6)])
def test_speed_up_is_over_the_chosen_version(case, against, factor, monkeypatch):
    monkeypatch.setattr(kernels, "_SECONDS", 0.02)
    measured = kernels.measure_case(case(), mx.float32, against, 2)
    assert len(measured["speed_up"].samples) == 2
    assert measured["speed_up"].median == pytest.approx(factor)
    assert measured["max_relative_error"] == pytest.approx(1e-3, rel=0.01)


def test_ours_runs_our_kernels_whatever_the_environment_says(case, monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "off")
    monkeypatch.setattr(kernels, "_SECONDS", 0.02)
    assert kernels.measure_case(case(), mx.float32, "off", 1)["speed_up"].median == pytest.approx(3)


def test_the_error_is_the_worst_result_s_and_nan_is_never_hidden():
    one, ten = mx.array([1.0, -4.0]), mx.array([10.0])
    assert kernels.max_relative_error([one, ten], [one, mx.array([8.0])]) == pytest.approx(0.25)
    broken = kernels.max_relative_error([mx.array([float("nan")]), ten], [one[:1], mx.array([8.0])])
    assert broken != broken


def test_the_table_adds_up_by_count(case, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "_SECONDS", 0.02)
    asked = []
    monkeypatch.setattr(kernels, "cases", lambda *shape: asked.append(shape) or [case(count=3), case(count=5)])
    result, table = result_of(kernels, capsys, "--size", "0.5b", "--repeat", 1)
    ((config, resolution, prompt_tokens),) = asked
    assert (config.text_config.hidden_size, resolution, prompt_tokens) == (896, 1024, 256 + 24)
    first, second = result["ops"]
    ours = 3 * first["ours_s"]["median"] + 5 * second["ours_s"]["median"]
    theirs = 3 * first["against_s"]["median"] + 5 * second["against_s"]["median"]
    assert f"All, x count: {ours * 1e3:,.1f} ms against {theirs * 1e3:,.1f} ms, {theirs / ours:.2f} times" in table
    assert "double 4" in table


def test_the_demo_s_own_ops_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "_SECONDS", 0.001)
    result, _ = result_of(kernels, capsys, "--repeat", 1, "--resolution", 64, "--prompt-tokens", 2)
    assert {"depthwise_conv", "swiglu", "self_attention"} <= {op["op"] for op in result["ops"]}
    for op in result["ops"]:
        assert op["max_relative_error"] < 1e-3, op

"""The video benchmark: every kind is measured as it says, and growth is what it says. No number is a result."""

import pytest

pytest.importorskip("av")

from mlx_fastvlm.benchmarks import video  # noqa: E402
from mlx_fastvlm.benchmarks.video import Sample  # noqa: E402
from tests.benchmark_output import result_of  # noqa: E402


def test_all_kinds_are_measured(capsys, monkeypatch):
    monkeypatch.setattr(video, "_WARM_UP", 0.1)
    monkeypatch.setattr(video, "_CLIP_SECONDS", 1)
    result, table = result_of(video, capsys, "--seconds", 1, "--max-tokens", 2)
    assert list(result["kinds"]) == ["file", "live", "live-4"]
    for name, kind in result["kinds"].items():
        assert kind["described"] > 0 and kind["seconds"] >= 0.5
        assert kind["described_per_second"] == pytest.approx(kind["described"] / kind["seconds"])
        assert 1 <= kind["tokens_per_description"] <= 2
        assert kind["samples"][-1]["described"] <= kind["described"]
        if name != "file":
            assert kind["described"] + kind["dropped"] <= kind["arrived"] <= video.RATE * 1.5
    assert "At least 15 frames/s: file" in table and "Memory at most 1.05 times" in table


def test_growth_is_the_last_tenth_over_the_second():
    samples = [Sample(float(second), second, rss, 0, 0) for second, rss in enumerate([50] * 4 + [100] * 30 + [120] * 6)]
    assert video._growth(samples) == pytest.approx(1.2)
    assert video._growth(samples[:9]) is None

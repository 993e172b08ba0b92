"""The captioning and caption-memory benchmarks: equal captions, rates of one round, growth. No number is a result."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import mlx_fastvlm
from mlx_fastvlm.benchmarks import caption_memory, caption_pictures, captioning, captioning_runners, peers
from mlx_fastvlm.benchmarks.caption_memory import Sample
from mlx_fastvlm.benchmarks.command import BenchmarkError
from tests.benchmark_output import result_of
from tests.test_bench_reuse import fake_mlx_vlm  # noqa: F401, a fixture

SIDES = ("ours", "ours-loop", "ours-loop-loaded")


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(peers, "_PAUSE_SECONDS", 0)


def test_scenes_are_the_same_every_time_and_no_two_alike(tmp_path):
    paths = list(caption_pictures.write_pictures(tmp_path, 40))
    assert len({path.read_bytes() for path in paths}) == 40
    assert {caption_pictures.draw_scene(number).shape[1::-1] for number in range(40)} == set(caption_pictures.SIZES)
    for number in (0, 7):
        np.testing.assert_array_equal(caption_pictures.draw_scene(number), caption_pictures.draw_scene(number))
        assert len(np.unique(caption_pictures.draw_scene(number).reshape(-1, 3), axis=0)) > 1


def test_captions_of_the_batch_are_the_loop_s(capsys, converted_folder):
    result, table = result_of(
        captioning, capsys, converted_folder("inference"), "--images", 3, "--batch-size", 2, "--repeat", 2,
        "--max-tokens", 3, "--peers",
    )  # fmt: skip
    assert tuple(result["runners"]) == SIDES
    assert {name: side["same_as_loop"] for name, side in result["runners"].items()} == dict.fromkeys(SIDES, 3)
    assert len(result["captions"]) == 3 and all(result["captions"])
    rates = {name: side["images_per_s"]["samples"] for name, side in result["runners"].items()}
    assert all(len(samples) == 2 for samples in rates.values())
    ratios = [one / loop for one, loop in zip(rates["ours"], rates["ours-loop"], strict=True)]
    assert result["runners"]["ours-loop"]["ours_over"]["samples"] == pytest.approx(ratios)
    assert result["runners"]["ours"]["ours_over"]["samples"] == [1.0, 1.0]
    ratios = [one / loop for one, loop in zip(rates["ours"], rates["ours-loop-loaded"], strict=True)]
    assert result["runners"]["ours-loop-loaded"]["ours_over"]["samples"] == pytest.approx(ratios)
    assert result["within_limit"] is (result["runners"]["ours-loop"]["ours_over"]["median"] >= captioning.LIMIT)
    assert table.count("all 3") == 3


class FakeSide:
    """Captions in the seconds and with the texts it is given, one request after the other."""

    ready = {"ready": "fake", "blas": "none"}

    def __init__(self, seconds, texts=("one", "two words"), asked=None):
        self.seconds, self.texts, self.asked = iter(seconds), texts, asked

    def ask(self, **request):
        if self.asked is not None:
            self.asked.append(request)
        return {
            "seconds": next(self.seconds),
            "cpu_seconds": 4.0,
            "texts": list(self.texts),
            "peak_rss": 10**9,
            "device_peak": 0,
        }


def run_with(sides, monkeypatch, capsys, converted_folder, *arguments):
    """The benchmark with fake sides in place of processes."""
    monkeypatch.setattr(captioning, "start_all", lambda *_: sides)
    monkeypatch.setattr(captioning, "computes_on_cpu", lambda choice: True)
    return result_of(captioning, capsys, converted_folder("inference"), "--images", 2, *arguments)


def test_rates_and_differing_captions_are_counted(monkeypatch, capsys, converted_folder):
    asked = []
    sides = {
        "ours": FakeSide([9.0, 1.0, 1.0], asked=asked),
        "ours-loop": FakeSide([8.0, 4.0, 5.0]),
        "ours-loop-loaded": FakeSide([8.0, 2.0, 2.0]),
        "mlx-vlm": FakeSide([10.0], texts=("one", "too")),
    }
    result, table = run_with(sides, monkeypatch, capsys, converted_folder, "--repeat", 2, "--max-tokens", 3)
    ours, loop, peer = (result["runners"][name] for name in ("ours", "ours-loop", "mlx-vlm"))
    assert loop["ours_over"]["samples"] == [4.0, 5.0]  # the first round is not counted
    assert (ours["first_images_per_s"], ours["cpu_s_per_image"]["median"]) == (2 / 9, 2.0)
    assert (peer["images_per_s"]["samples"], peer["ours_over"]["samples"]) == ([0.2], [10.0])
    assert result["runners"]["ours-loop-loaded"]["first_images_per_s"] is None  # it was captioned as a batch
    assert (peer["same_as_loop"], result["within_limit"]) == (1, True)
    assert "1 of 2" in table and "within the limit: 4.50 times the loop" in table
    assert {len(request["images"]) for request in asked} == {2} and asked[0]["max_tokens"] == 3


def test_the_limit_takes_speed_and_the_loop_s_captions(monkeypatch, capsys, converted_folder):
    def sides(seconds, texts):
        loops = {name: FakeSide([4.0] * 2, ("a", "b")) for name in SIDES[1:]}
        return {"ours": FakeSide([seconds] * 2, texts), **loops}

    for seconds, texts in ((2.0, ("a", "b")), (1.0, ("a", "c"))):
        result, table = run_with(sides(seconds, texts), monkeypatch, capsys, converted_folder, "--repeat", 1)
        assert result["within_limit"] is False
        assert "NOT within the limit" in table


def test_captions_that_are_missing_or_change_are_refused(monkeypatch, capsys, converted_folder):
    with pytest.raises(BenchmarkError, match="ours could not caption 1 of the pictures"):
        captioning.tell_rate("ours", {"texts": ["a", None], "seconds": 1.0})
    rounds = [{}, *({"ours": {**FakeSide([1.0]).ask(), "texts": [text]}} for text in "ab")]
    with pytest.raises(BenchmarkError, match="ours gave different captions to the same pictures"):
        captioning.summarize("ours", {}, rounds)


def test_mlx_vlm_gets_batches_of_the_same_size_and_equal_prompts(fake_mlx_vlm, tmp_path):  # noqa: F811
    (tmp_path / "config.json").write_text("{}")
    caption = captioning_runners.load_mlx_vlm_batch({"folder": str(tmp_path)})
    assert caption(["a", "b", "c"], "What?", 9, 2) == ["a!", "b!", "c!"]
    assert [(images, prompts) for images, prompts, _ in fake_mlx_vlm.asked] == [
        (["a", "b"], ["What?"] * 2),
        (["c"], ["What?"]),
    ]


def test_the_loaded_loop_is_a_loop_from_its_second_request_on(converted_folder, monkeypatch, tmp_path):
    used = []
    caption_images, generate = mlx_fastvlm.caption_images, mlx_fastvlm.generate
    monkeypatch.setattr(mlx_fastvlm, "caption_images", lambda *a, **k: used.append("batch") or caption_images(*a, **k))
    monkeypatch.setattr(mlx_fastvlm, "generate", lambda *a, **k: used.append("loop") or generate(*a, **k))
    options = {"folder": str(converted_folder("inference")), "dtype": "float32"}
    caption = captioning_runners.load_our_loop(options, after_batch=True)
    pictures = [str(path) for path in caption_pictures.write_pictures(tmp_path, 2)]
    assert caption(pictures, "What?", 3, 2) == caption(pictures, "What?", 3, 2)
    assert used == ["batch", "loop", "loop"]


def samples_of(*megabytes):
    return [Sample(done, value * 10**6) for done, value in enumerate(megabytes, start=1)]


def test_growth_is_the_end_over_a_tenth():
    steady = samples_of(*[100] * 50, *[102] * 50)
    leaking = samples_of(*range(100, 200))
    assert caption_memory.growth_of(steady) == 1.02
    assert caption_memory.growth_of(leaking) == 194.5 / 109  # medians of 190-199 and of the tenth picture
    assert caption_memory.held(leaking, 100).done == 100
    assert caption_memory.growth_of(samples_of(100)) is None
    spike = [*samples_of(*[100] * 99), Sample(100, 10**9)]  # one moment is not what is held
    assert caption_memory.growth_of(spike) == 1.0


def test_rows_are_counted_as_they_are_written(tmp_path):
    rows = caption_memory._RowCount(tmp_path / "rows")
    assert rows.update() == 0
    with (tmp_path / "rows").open("w") as file:
        for text, count in (("a\nb", 1), ("\n", 2), ("", 2), ("c\nd\n", 4)):
            file.write(text)
            file.flush()
            assert rows.update() == count


@pytest.mark.parametrize("through", ["command", "python"])
def test_memory_is_watched_to_the_last_picture(through, capsys, monkeypatch):
    monkeypatch.setattr(caption_memory, "_LEAST_IMAGES", 10)
    monkeypatch.setattr(caption_memory, "_POLL_SECONDS", 0.002)
    result, table = result_of(caption_memory, capsys, "--images", 20, "--through", through, "--batch-size", 2)
    samples = result["samples"]
    assert samples[-1]["done"] == 20
    assert [sample["done"] for sample in samples] == sorted({sample["done"] for sample in samples})
    assert all(20e6 < sample["rss"] < 4e9 for sample in samples)  # an interpreter with MLX
    assert all((sample["mlx_active"] is None) is (through == "command") for sample in samples)
    assert "20 pictures in" in table
    assert result["within_limit"] is (result["growth"] is not None and result["growth"] <= caption_memory.LIMIT)


def test_few_pictures_are_refused(capsys):
    with pytest.raises(SystemExit) as end:
        caption_memory.main(["--images", "99"])
    assert end.value.code == 1
    assert "--images is 99; growth shows in 100 pictures or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "key"), [(KeyboardInterrupt(), 130, "interrupted"), (BenchmarkError("It broke."), 1, "error")]
)
def test_what_was_seen_before_the_end_is_shown(error, code, key, capsys, converted_folder, monkeypatch):
    def watch(model, pictures, args):
        assert len(list(pictures.iterdir())) == 100
        yield from samples_of(*[100] * 60)
        raise error

    monkeypatch.setitem(caption_memory._THROUGH, "command", watch)
    with pytest.raises(SystemExit) as end:
        caption_memory.main(["--model", str(converted_folder("inference")), "--images", "100"])
    assert end.value.code == code
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert key in result and result["samples"][-1]["done"] == 60 and result["growth"] == 1.0


def test_pictures_without_a_caption_are_told(capsys, converted_folder, monkeypatch):
    monkeypatch.setitem(caption_memory._THROUGH, "command", lambda *_: (sample for sample in samples_of(1, 2)))
    with pytest.raises(SystemExit) as end:
        caption_memory.main(["--model", str(converted_folder("inference")), "--images", "100"])
    assert end.value.code == 1
    assert "2 of 100 pictures have a caption" in capsys.readouterr().err


def test_a_captioning_process_that_fails_says_why(converted_folder, monkeypatch, tmp_path):
    script = tmp_path / "mlx-fastvlm"
    script.write_text(f"#!{sys.executable}\nimport sys\nprint('fine')\nsys.exit('It is odd.')\n")
    script.chmod(0o755)
    monkeypatch.setattr(caption_memory, "installed_command", lambda: script)
    (tmp_path / "pictures").mkdir()
    with pytest.raises(BenchmarkError, match="Captioning failed: It is odd"):
        list(caption_memory._watch_command(tmp_path, tmp_path / "pictures", SimpleNamespace(batch_size=2)))
    assert caption_memory._why(-9, "") == "The captioning process was killed, probably for want of memory."

"""The peers and headline benchmarks: turns, ratios within a round, and what is said about them. No number is a result."""

import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import MagicMock

import mlx.core as mx
import pytest

from mlx_fastvlm.benchmarks import headline, headline_runners, peers, report, runner, runners
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.benchmarks.report import Summary
from mlx_fastvlm.benchmarks.runner_process import RunnerProcess, Unavailable
from mlx_fastvlm.benchmarks.runners import Implementation
from mlx_fastvlm.blas import OFF_SWITCH
from mlx_fastvlm.safetensors_file import SafetensorsFile
from tests.benchmark_output import result_of
from tests.conftest import GOLDEN

PICTURE = GOLDEN / "images" / "landscape.png"
OPTIONS = {"device": "auto", "blas": "auto"}


class FakeRunner:
    """Replies from a list, and notes in `asked` when it is its turn."""

    start_seconds = 1.0
    ready = {"ready": "fake", "blas": "none"}

    def __init__(self, name, asked, ttfts, tokens=(1, 2, 3), seconds=1.0):
        self.name, self.asked, self.ttfts = name, asked, iter(ttfts)
        self.tokens, self.seconds = tokens, seconds

    def ask(self, **request):
        self.asked.append((self.name, request))
        ttft = next(self.ttfts)
        return {
            "ttft": ttft,
            "ttft_cpu": 2 * ttft,
            "seconds": ttft + self.seconds,
            "tokens": list(self.tokens),
            "peak_rss": 10**9,
            "device_peak": None,
        }


@pytest.fixture(autouse=True)
def no_pause(monkeypatch):
    monkeypatch.setattr(peers, "_PAUSE_SECONDS", 0)


def test_runners_take_turns_and_the_slow_one_only_its_rounds():
    asked = []
    runners = {name: FakeRunner(name, asked, [1.0] * 4) for name in ("ours", "mlx-vlm", peers.SLOW)}
    rounds = peers.ask_in_turns(runners, {"prompt": "?"}, 3, {peers.SLOW: 2})
    both = ["ours", "mlx-vlm"]
    assert [name for name, _ in asked] == [*both, *both, peers.SLOW, *both, peers.SLOW, *both]
    assert all(request == {"prompt": "?"} for _, request in asked)
    assert [list(answers) for answers in rounds] == [both, [*both, peers.SLOW], [*both, peers.SLOW], both]


def test_ratios_pair_the_rounds_that_both_took_part_in():
    asked = []
    ours = FakeRunner("ours", asked, [9.0, 1.0, 2.0], seconds=0.5)
    slow = FakeRunner(peers.SLOW, asked, [10.0], seconds=2.0)
    rounds = peers.ask_in_turns({"ours": ours, peers.SLOW: slow}, {}, 2, {peers.SLOW: 1})
    results = {runner.name: peers.summarize(runner.name, runner, rounds) for runner in (ours, slow)}
    for result in results.values():
        peers.compare(result, results["ours"])
    assert results["ours"]["ttft_s"].samples == (1.0, 2.0)  # the 9 of the first round is not counted
    assert results["ours"]["first_ttft_s"] == 9.0
    assert results["ours"]["decode_tps"].samples == (4.0, 4.0)  # two tokens after the first, in half a second
    assert results[peers.SLOW]["ttft_over_ours"].samples == (10.0,)
    assert results[peers.SLOW]["our_decode_tps_over"].samples == (4.0,)
    text = peers._report("small: ttft ms", results, {"torch": "not there"})
    assert "Ours against mlx-vlm-as-installed: time to first token 10.00 times less (10.00-10.00)" in text
    assert "decoding 4.00 times faster (4.00-4.00); 1 round." in text
    assert "Skipped torch: not there" in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("ours")]
    assert row[1:6] == ["1,500.0", "1,000.0-2,000.0", "1.00", "1.00-1.00", "3,000.0"]  # the last is processor time


def test_other_answers_are_counted_from_the_beginning():
    asked = []
    ours, other = FakeRunner("ours", asked, [1.0] * 2), FakeRunner("torch", asked, [1.0] * 2, tokens=(1, 2, 4))
    rounds = peers.ask_in_turns({"ours": ours, "torch": other}, {}, 1, {})
    result = peers.summarize("torch", other, rounds)
    peers.compare(result, peers.summarize("ours", ours, rounds))
    assert (result["same_tokens_as_ours"], result["same_first_tokens"]) == (False, 2)


def test_greedy_answers_that_change_are_refused():
    rounds = [{"torch": {"tokens": [1]}}, {"torch": {"tokens": [2]}}]
    with pytest.raises(BenchmarkError, match="torch gave different answers"):
        peers.summarize("torch", FakeRunner("torch", [], []), rounds)


def test_an_empty_answer_is_refused():
    with pytest.raises(BenchmarkError, match="ended its answer before the first token"):
        peers.ask_in_turns({"ours": FakeRunner("ours", [], [1.0], tokens=())}, {}, 1, {}, {})


class BreaksLater(FakeRunner):
    def ask(self, **request):
        if len([name for name, _ in self.asked if name == self.name]) == 1:
            raise BenchmarkError(f"The {self.name} runner broke.")
        return super().ask(**request)


def test_a_peer_that_breaks_does_not_take_the_others_with_it():
    asked, broken = [], {}
    runners = {"ours": FakeRunner("ours", asked, [1.0] * 3), "torch": BreaksLater("torch", asked, [1.0] * 3)}
    rounds = peers.ask_in_turns(runners, {}, 2, {}, broken)
    assert broken == {"torch": "The torch runner broke."}
    assert [list(answers) for answers in rounds] == [["ours", "torch"], ["ours"], ["ours"]]
    with pytest.raises(BenchmarkError, match="The ours runner broke"):
        peers.ask_in_turns({"ours": BreaksLater("ours", [], [1.0] * 3)}, {}, 2, {}, {})


@pytest.mark.parametrize(("on_cpu", "first_round"), [(True, []), (False, [peers.SLOW])])
def test_the_slow_one_is_warmed_up_where_it_is_not_slow(on_cpu, first_round, monkeypatch, capsys, tmp_path):
    asked = []

    def start(name, work, args):
        runner = FakeRunner(name, asked, [1.0] * 2)
        return nullcontext(runner)

    monkeypatch.setattr(peers, "start", start)
    monkeypatch.setattr(peers, "computes_on_cpu", lambda choice: on_cpu)
    result_of(peers, capsys, tmp_path, "--image", PICTURE, "--repeat", 1, "--peers", peers.SLOW)
    assert [name for name, _ in asked] == ["ours", *first_round, "ours", peers.SLOW]


@pytest.mark.parametrize(("one", "other", "common"), [([1, 2, 3], [1, 2, 4], 2), ([], [1], 0), ([1, 2], [1, 2], 2)])
def test_answers_are_compared_from_the_beginning(one, other, common):
    assert peers._common_start(one, other) == common


def test_the_stopwatch_sees_the_first_token_and_the_end(monkeypatch):
    clock, cpu_clock = iter([10.0, 12.0, 17.0]), iter([1.0, 4.0])
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(runner.time, "process_time", lambda: next(cpu_clock))
    implementation = Implementation(lambda image, prompt, count: iter(range(count)), lambda: 5)
    reply = runner.answer(implementation, "x.png", "?", 3)
    assert (reply["ttft"], reply["ttft_cpu"], reply["seconds"], reply["tokens"]) == (2.0, 3.0, 7.0, [0, 1, 2])
    assert reply["device_peak"] == 5


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_everyone_gets_the_same_type(dtype, hub_folder, tmp_path):
    for name in ("ours", "mlx-vlm", "mlx-vlm-as-installed"):
        file = SafetensorsFile(peers.prepare(name, hub_folder("inference"), tmp_path, dtype) / "model.safetensors")
        found = {file.dtype(tensor) for tensor in file.names()} - {"I64"}  # BatchNorms count batches
        assert found == {{"float32": "F32", "float16": "F16"}[dtype]}
    assert len(list(tmp_path.iterdir())) == 2  # both mlx-vlm read one copy


def test_only_the_one_as_installed_keeps_mlx_s_blas(monkeypatch, hub_folder, tmp_path):
    started = []
    monkeypatch.setattr(peers, "RunnerProcess", lambda name, python, options: started.append((name, python, options)))
    args = SimpleNamespace(
        checkpoint=hub_folder("inference"),
        dtype="float32",
        device="auto",
        blas="auto",
        peer_python="P",
        torch_python="T",
    )
    for name in ("ours", *peers.PEERS):
        peers.start(name, tmp_path, args)
    assert {name: options["blas"] for name, _, options in started} == {
        name: "off" if name == peers.SLOW else "auto" for name in ("ours", *peers.PEERS)
    }
    pythons = {name: python for name, python, _ in started}
    assert pythons["ours"] == sys.executable
    assert {name for name in pythons if pythons[name] == "P"} == {"mlx-vlm", "mlx-vlm-as-installed"}
    assert {name for name in pythons if pythons[name] == "T"} == {"torch", "torch-bfloat16", "torch-compiled"}


def test_peers_runs_with_ours_alone(capsys, hub_folder):
    result, table = result_of(
        peers, capsys, hub_folder("inference"), "--image", PICTURE, "--repeat", 1, "--max-tokens", 5, "--peers"
    )
    ours = result["runners"]["ours"]
    assert len(ours["tokens"]) == 5
    assert 0 < ours["ttft_s"]["median"] < ours["start_s"] + 60
    assert ours["ttft_over_ours"]["median"] == ours["our_decode_tps_over"]["median"] == 1.0
    assert "all 5" in table


def test_a_peer_that_is_not_there_is_named_with_the_reason(tmp_path):
    with pytest.raises(Unavailable, match="cannot be started"):
        RunnerProcess("mlx-vlm", str(tmp_path / "no-python"), OPTIONS)


def test_blas_off_is_off_in_the_process_that_answers(converted_folder):
    options = {"device": "auto", "blas": "off", "folder": str(converted_folder("inference")), "dtype": "float32"}
    with RunnerProcess("ours", sys.executable, options) as ours:
        assert ours.ready["blas"] == f"off: {OFF_SWITCH}=off"


def test_a_runner_that_was_killed_says_so(converted_folder):
    options = {**OPTIONS, "folder": str(converted_folder("inference")), "dtype": "float32"}
    with RunnerProcess("ours", sys.executable, options) as ours:
        ours._process.kill()
        with pytest.raises(BenchmarkError, match="The ours runner was killed, probably for want of memory"):
            ours.ask(image=str(PICTURE), prompt="?", max_tokens=1)


def test_pytorch_s_model_is_looked_for_in_the_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "modules", {**sys.modules, **dict.fromkeys(("torch", "transformers"), MagicMock())})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BenchmarkError, match="run from the root of a clone"):
        runners.load_torch({**OPTIONS, "folder": "x", "dtype": "float32"})


def test_a_runner_that_breaks_is_one_line():
    with pytest.raises(BenchmarkError, match="The unheard-of runner broke: KeyError"):
        RunnerProcess("unheard-of", sys.executable, OPTIONS)


def headline_result(encode, prefill, tokens):
    times = {"encode": encode, "prefill": prefill, "ttft": [e + p for e, p in zip(encode, prefill, strict=True)]}
    return {
        "visual_tokens": tokens,
        "peak_rss_bytes": 10**9,
        "ttft_cpu_s": Summary.of([1.0]),
        **{f"{stage}_s": Summary.of(samples) for stage, samples in times.items()},
    }


HEADLINE = {
    "ours": headline_result([1.0, 2.0], [1.0, 2.0], 256),
    "fastvlm-torch": headline_result([2.0, 4.0], [2.0, 4.0], 256),
    "onevision-torch": headline_result([10.0, 30.0], [30.0, 50.0], 7371),
}


def test_headline_ratios_are_taken_by_stage_and_round():
    comparison = headline.onevision_over_fastvlm(HEADLINE)
    assert list(comparison) == ["onevision-torch over ours", "onevision-torch over fastvlm-torch"]
    assert comparison["onevision-torch over ours"]["ttft"].samples == (20.0, 20.0)
    assert comparison["onevision-torch over ours"]["encode"].samples == (10.0, 15.0)
    assert comparison["onevision-torch over fastvlm-torch"]["prefill"].samples == (15.0, 12.5)


def test_the_paper_s_ratio_is_the_paper_s():
    assert headline.PAPER_RATIOS["ttft"] == pytest.approx(85, abs=0.5)
    for times in headline.PAPER_MS.values():
        assert times["encode"] + times["prefill"] == pytest.approx(times["ttft"], abs=1.5)


def test_the_headline_says_what_differs_and_shrunk_tiles_first():
    comparison = headline.onevision_over_fastvlm(HEADLINE)
    text = headline._report(HEADLINE, comparison, "float32", 10)
    assert "onevision-torch over ours" in text and "7,371" in text and "85.1" in text
    assert "NOT the paper's comparison" not in text
    (row,) = [line.split() for line in text.splitlines() if line.startswith("ours")]
    assert row[3:7] == ["1,500.0", "1,500.0", "3,000.0", "2,000.0-4,000.0"]  # encode, prefill, both and their range
    shrunk = headline._report(HEADLINE, comparison, "float32", 5)
    assert "TILES: 5 instead of 10 (768 pixels instead of 1152): NOT the paper's comparison." in shrunk


@pytest.mark.parametrize(("tiles", "side"), [(10, 3), (5, 2), (2, 1)])
def test_tiles_are_an_overview_and_a_square_grid(tiles, side):
    assert headline_runners.grid_side(tiles) == side
    assert 1 + side**2 == tiles


def test_stages_of_the_headline_make_up_the_total():
    reply = headline_runners._time_stages(
        lambda: mx.zeros((1, 7, 2)), lambda features: int(features.sum().item()), lambda: 3
    )
    assert reply["encode"] + reply["prefill"] == pytest.approx(reply["ttft"])
    assert (reply["visual_tokens"], reply["tokens"], reply["device_peak"]) == (7, [0], 3)
    assert json.loads(json.dumps(reply)) == reply


@pytest.mark.parametrize("on_cpu", [True, False])
def test_the_headline_runs_with_fake_sides(on_cpu, capsys, monkeypatch):
    asked = []

    class FakeSide(FakeRunner):
        def __init__(self, name, python, options):
            super().__init__(name.removeprefix("headline-"), asked, [1.0] * 3, tokens=(1,))
            self.factor = 20 if "onevision" in name else 1
            assert options["tiles"] == 5

        def ask(self, **request):
            reply = super().ask(**request)
            stages = {"encode": 0.25 * self.factor, "prefill": 0.75 * self.factor, "ttft": self.factor}
            return {**reply, **stages, "visual_tokens": 256}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(headline, "RunnerProcess", FakeSide)
    monkeypatch.setattr(headline, "computes_on_cpu", lambda choice: on_cpu)
    result, _ = result_of(headline, capsys, "--tiles", 5, "--repeat", 2)
    small, all_three = ["ours", "fastvlm-torch"], ["ours", "fastvlm-torch", "onevision-torch"]
    assert [name for name, _ in asked] == [*(small if on_cpu else all_three), *all_three * 2]
    assert result["ratios"]["onevision-torch over ours"]["ttft"]["samples"] == [20.0, 20.0]
    assert result["paper_onevision_over_fastvlm"]["ttft"] == report.Summary.of([14124 / 166]).median


def test_a_headline_needs_both_sides(capsys):
    with pytest.raises(SystemExit) as end:
        headline.main(["--sides", "ours", "fastvlm-torch"])
    assert end.value.code == 1
    assert "choose --sides with one of each" in capsys.readouterr().err

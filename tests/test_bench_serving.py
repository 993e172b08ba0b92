"""The serving benchmark: what a client sees of a real server, and figures made of it. No number is a result."""

import json

import pytest

from mlx_fastvlm.benchmarks import serving, serving_client
from mlx_fastvlm.benchmarks.command import BenchmarkError
from mlx_fastvlm.benchmarks.report import Summary
from mlx_fastvlm.benchmarks.serving import Asker, Picture, Rates
from mlx_fastvlm.benchmarks.serving_client import ServedAnswer, serve
from tests.benchmark_output import result_of


@pytest.fixture(scope="module", autouse=True)
def server_installed():
    for module in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(module)


def test_everything_is_measured_on_a_real_server(capsys):
    result, table = result_of(
        serving, capsys, "demo", "--ttft-repeat", 1, "--clients", 3, "--requests", 2, "--greedy", 3, "--repeat", 1,
        "--max-tokens", 8,
    )  # fmt: skip
    for kind in (serving.SCENE, serving.FRAME):
        ttft = result["ttft"][kind]
        (server,), (library,), (more,) = (ttft[name]["samples"] for name in ("server_s", "library_s", "overhead_s"))
        assert more == pytest.approx(server - library) and library > 0
        assert sum(stage["median"] for stage in ttft["server_stages_s"].values()) < server
        assert "encode" in ttft["server_stages_s"]  # the picture was new
    load = result["load"]
    assert load["together"]["tokens_per_s"]["median"] > 0 and load["one_by_one"]["requests_per_s"]["median"] > 0
    assert load["together"]["ttft_p95_s"]["median"] >= load["together"]["ttft_median_s"]["median"]
    assert [set(each) for each in load["memory_bytes"]] == [{"rss", "kept"}] * 2
    assert load["memory_bytes"][1]["kept"] > load["memory_bytes"][0]["kept"] > 0
    assert result["greed"]["alone_s"]["median"] > 0 and 0 <= result["greed"]["greedy_answers_meanwhile"]["median"] <= 3
    assert "the limit of 15 ms" in table and "3 clients" in table


def test_a_client_sees_what_the_server_says(monkeypatch):
    first, second = (next(pictures) for pictures in (serving.scenes(), serving.frames()))
    with serve("demo", "float32") as server:
        asker = Asker(server, "Describe this image.", 6)
        answers = asker.in_turn("one", [first, second, first])
        assert [answer.tokens for answer in answers] == [6] * 3
        assert all(answer.start < answer.first <= answer.end and answer.text for answer in answers)
        assert answers[0].text == answers[2].text and "encode" not in answers[2].stages
        assert server.rss() > 10**7
        assert server.figures()["generated_tokens_total"] == 18
        with pytest.raises(BenchmarkError, match="The server answers 400"):
            asker.at_once({"one": [first], "other": [Picture(b"none", "image/png")]})
    with pytest.raises(BenchmarkError, match="ended before its time"):
        server.rss()


def test_a_server_that_does_not_start_says_why():
    with pytest.raises(BenchmarkError, match="does not start: .*nowhere"), serve("./nowhere", "float32"):
        pass


def test_rates_are_of_the_whole_round():
    def answer(start, first, end):
        return ServedAnswer(start, first, end, "words", 10, {})

    rates = Rates.of({"a": [answer(0, 1, 2), answer(2, 3, 4)], "b": [answer(0, 3, 6), answer(6, 7, 10)]})
    assert rates.tokens_per_s == 4 and rates.requests_per_s == 0.4
    assert rates.ttfts == [1, 1, 1, 3]
    assert rates.answers_at_half == (0, 2)


def test_the_limit_is_for_every_kind_of_picture():
    def ttft(*medians):
        return {str(number): {"overhead_s": Summary.of([median])} for number, median in enumerate(medians)}

    assert serving.is_within_limit(ttft(0.001, 0.014))
    assert not serving.is_within_limit(ttft(0.001, 0.016))


def test_events_are_read_as_they_come():
    chunks = [
        {"choices": [{"delta": {"role": "assistant", "content": ""}}]},
        {"choices": [{"delta": {"content": "A "}}]},
        {"choices": [{"delta": {"content": "cat"}}]},
        {"choices": [{"delta": {}}], "timings": {"stages": {"encode": 1.0}}},
        {"choices": [], "usage": {"completion_tokens": 3}},
    ]
    lines = [line for chunk in chunks for line in (f"data: {json.dumps(chunk)}\n".encode(), b"\n")]
    answer = serving_client._read(0.0, iter([*lines, b"data: [DONE]\n"]))
    assert (answer.text, answer.tokens, answer.stages) == ("A cat", 3, {"encode": 1.0})
    broken = [b'data: {"error": {"message": "The server is stopping."}}\n']
    with pytest.raises(BenchmarkError, match="breaks off: The server is stopping"):
        serving_client._read(0.0, iter(broken))

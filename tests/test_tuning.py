"""Tuning: only right kernels win, the fastest of them, plain ops included; what is kept counts here and nowhere else."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.kernels import fused_op, timing, tuning, winners
from mlx_fastvlm.kernels.fused_op import forget_choices
from mlx_fastvlm.kernels.launch_table import PLAIN
from mlx_fastvlm.kernels.winners import Call, find_winner, keep_winner, winners_file
from tests.fake_gpu import INFO, X, broken, evaluated, forget_everything, wrong


@pytest.fixture
def clock(monkeypatch):
    """{size of the launch shape, or "plain": milliseconds}: what timing says from now on."""

    def set_times(kernel, milliseconds):
        def time(runs, seconds):
            def one(run):
                mx.eval(*run())
                return milliseconds[kernel.ran[-1]] / 1e3

            return [one(run) for run in runs]

        monkeypatch.setattr(tuning, "time_in_turns", time)

    return set_times


def tuned(kernel, *rows):
    return list(tuning.tune([kernel.case(count) for count in rows or (3,)], [mx.float32]))


def chosen(kernel, x=X):
    """What runs in a new process: a size, or "plain"."""
    forget_everything()
    kernel(x)
    return kernel.ran[-1]


def test_the_fastest_wins_and_runs_from_then_on_in_new_processes_too(fake_gpu, clock):
    double = fake_gpu()
    clock(double, {"plain": 3.0, 8: 2.0, 4: 1.0, 2: 2.5})
    assert chosen(double) == 8
    (result,) = tuned(double)
    assert result.winner == {"size": 4}
    assert (result.plain_seconds, result.best_seconds) == (0.003, 0.001)
    double(X)
    assert double.ran[-1] == 4
    assert chosen(double) == 4


def test_a_wrong_kernel_never_wins(fake_gpu, clock):
    double = fake_gpu({4: wrong, 2: broken})
    clock(double, {"plain": 3.0, 8: 2.0, 4: 0.1, 2: 0.1})
    (result,) = tuned(double)
    assert result.winner == {"size": 8}
    assert [launch for launch, _ in result.rejected] == [{"size": 4}, {"size": 2}]
    assert "wrong" in result.rejected[0][1] and "Unable to build" in result.rejected[1][1]


def test_a_kernel_that_is_wrong_in_this_shape_alone_never_wins(fake_gpu, clock):
    double = fake_gpu({4: lambda x: x * (2.5 if len(x) == 3 else 2)})
    clock(double, {"plain": 3.0, 8: 2.0, 4: 1.0, 2: 2.5})
    (result,) = tuned(double)
    assert result.winner == {"size": 8}


def test_a_kernel_that_waits_for_tuning_runs_where_it_won(fake_gpu, clock):
    double = fake_gpu(tuned_only=True)
    clock(double, {"plain": 3.0, 8: 2.0, 4: 1.0, 2: 2.5})
    tuned(double)
    assert chosen(double) == 4 and chosen(double, mx.ones((3000, 8))) == "plain"


@pytest.mark.parametrize("bodies", [{}, {8: wrong, 4: wrong, 2: broken}], ids=["slow", "all fail"])
def test_plain_ops_win_where_they_are_faster_or_all_that_is_right(fake_gpu, clock, bodies):
    double = fake_gpu(bodies)
    clock(double, {"plain": 1.0, 8: 2.0, 4: 1.0, 2: 3.0})
    (result,) = tuned(double)
    assert result.winner == PLAIN and result.best_seconds == 0.001
    assert chosen(double) == "plain"


def test_a_winner_is_not_compared_again_but_must_still_compile(fake_gpu, clock):
    double = fake_gpu()
    clock(double, {"plain": 3.0, 8: 2.0, 4: 1.0, 2: 2.5})
    tuned(double)
    double.bodies[4] = broken
    forget_everything()
    found, caught = evaluated(double, X)
    assert mx.array_equal(found, X * 2) and len(caught) == 1 and "Unable to build" in str(caught[0].message)


def test_a_winner_starts_without_plain_ops(fake_gpu, monkeypatch):
    double = fake_gpu()
    keep_winner(Call.of("double", [X], {}), {"size": 4})
    monkeypatch.setattr(fused_op, "agrees", lambda *arrays: pytest.fail("compared again"))
    assert chosen(double) == 4


def test_a_kernel_that_is_wrong_at_other_sizes_never_wins(fake_gpu, clock):
    """Its winner would serve them too: the sample has two rows, what is tuned three."""
    double = fake_gpu({4: lambda x: x * (2 if len(x) == 3 else 2.5)})
    clock(double, {"plain": 3.0, 8: 2.0, 4: 1.0, 2: 2.5})
    (result,) = tuned(double)
    assert result.winner == {"size": 8} and [launch for launch, _ in result.rejected] == [{"size": 4}]


def test_near_sizes_share_a_winner_and_far_ones_do_not(fake_gpu, clock):
    double = fake_gpu()
    clock(double, {"plain": 3.0, 8: 2.0, 4: 1.0, 2: 2.5})
    tuned(double, 100)
    clock(double, {"plain": 3.0, 8: 2.0, 4: 2.5, 2: 1.0})
    tuned(double, 4)
    sizes = {rows: chosen(double, mx.ones((rows, 8))) for rows in (1, 2, 15, 25, 90, 400, 401)}
    assert sizes == {1: 2, 2: 2, 15: 2, 25: 4, 90: 4, 400: 4, 401: 8}
    assert chosen(double, mx.ones((100, 16))) == 8  # another width is another call
    assert chosen(double, mx.ones((100, 8), mx.float16)) == 8


def test_of_calls_alike_in_size_the_same_one_counts(fake_gpu):
    flat, tall = mx.ones((2, 6, 8)), mx.ones((6, 2, 8))
    for x, size in ((flat, 4), (tall, 2)):
        keep_winner(Call.of("double", [x], {}), {"size": size})
    assert (chosen(fake_gpu(), flat), chosen(fake_gpu(), tall)) == (4, 2)


def test_arrays_with_the_firsts_rows_may_grow_with_it():
    call = Call.of("add", [mx.zeros((3, 8)), mx.zeros((3, 8)), mx.zeros((8,))], {"eps": 1e-6})
    longer = Call.of("add", [mx.zeros((5, 8)), mx.zeros((5, 8)), mx.zeros((8,))], {"eps": 1e-6})
    assert call != longer and call.kind == longer.kind
    assert longer.kind != Call.of("add", [mx.zeros((5, 8)), mx.zeros((5, 8)), mx.zeros((8,))], {"eps": 1e-5}).kind
    assert longer.kind != Call.of("add", [mx.zeros((5, 8)), mx.zeros((5, 8)), mx.zeros((4,))], {"eps": 1e-6}).kind


@pytest.mark.parametrize("launch", [{"size": 16}, {"length": 4}, {}])
def test_a_winner_that_the_kernel_does_not_offer_is_ignored(fake_gpu, launch):
    double = fake_gpu()
    keep_winner(Call.of("double", [X], {}), launch)
    assert chosen(double) == 8


@pytest.mark.parametrize(
    "field, value",
    [
        ("chip", "Apple M1"),
        ("architecture", "applegpu_g13g"),
        ("mlx", "0.1.0"),
        ("kernels", "0" * 16),
        ("format", 99),
        ("winners", None),
        ("winners", [{}]),
        ("winners", [{"op": "double", "dtype": "float32", "shapes": [], "options": {}, "winner": "plain"}]),
        (
            "winners",
            [{"op": "double", "dtype": "float32", "shapes": [[3, 8]], "options": {"a": []}, "winner": "plain"}],
        ),
        ("winners", [{"op": "double", "dtype": "float32", "shapes": [[3, 8]], "options": {}, "winner": "fast"}]),
        ("winners", [{"op": "double", "dtype": "float32", "shapes": "3x8", "options": {}, "winner": {"size": 4}}]),
    ],
    ids=str,
)
def test_stale_foreign_and_malformed_files_are_ignored_and_replaced(fake_gpu, field, value):
    double = fake_gpu()
    path = keep_winner(Call.of("double", [X], {}), {"size": 4})
    assert chosen(double) == 4
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert chosen(double) == 8
    keep_winner(Call.of("double", [X], {}), {"size": 2})
    assert chosen(double) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"format": 1}'])
def test_damaged_files_are_ignored(fake_gpu, content):
    double = fake_gpu()
    path = keep_winner(Call.of("double", [X], {}), {"size": 4})
    path.write_bytes(content)
    assert chosen(double) == 8


def test_a_changed_kernel_makes_what_was_tuned_stale(fake_gpu, monkeypatch):
    double = fake_gpu()
    keep_winner(Call.of("double", [X], {}), {"size": 4})
    monkeypatch.setattr(winners, "sources_hash", lambda folder: "others")
    assert chosen(double) == 8


def test_the_hash_of_sources_changes_with_each_of_them(tmp_path):
    hashes = []
    for name, text in (("a.py", "1"), ("b.py", "1"), ("b.py", "2"), ("c.txt", "notes")):
        (tmp_path / name).write_text(text)
        hashes.append(winners.sources_hash(tmp_path))
    (tmp_path / "b.py").rename(tmp_path / "d.py")
    assert len({*hashes, winners.sources_hash(tmp_path)}) == 4 and hashes[2] == hashes[3]


def test_chips_and_versions_have_files_of_their_own(fake_gpu, monkeypatch):
    first = winners_file()
    assert first.name == f"apple-m4-max-mlx-{mx.__version__}.json"
    monkeypatch.setattr(mx, "device_info", lambda *device: {**INFO, "device_name": "Apple M2"})
    forget_everything()
    assert winners_file() != first


def test_winners_add_up_and_can_be_cleared(fake_gpu):
    calls = [Call.of("double", [mx.ones((rows, 8))], {"base": 1e6, "gelu": True}) for rows in (1, 1000)]
    keep_winner(calls[0], PLAIN)
    path = keep_winner(calls[1], {"size": 2})
    forget_everything()
    assert [find_winner(call) for call in calls] == [PLAIN, {"size": 2}]
    assert [item.name for item in path.parent.iterdir()] == [path.name]  # nothing written aside is left
    assert winners.clear_winners() == 1 and not path.exists()
    assert find_winner(calls[0]) is None and winners.clear_winners() == 0


@pytest.mark.parametrize("place", ["file", "~nobody-has-this-name"])
def test_a_folder_that_cannot_be_written_is_one_clear_error(fake_gpu, tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_FASTVLM_CACHE", place)
    with pytest.raises(OptionError, match="(cannot be written|is no folder).*MLX_FASTVLM_CACHE"):
        keep_winner(Call.of("double", [X], {}), PLAIN)
    assert chosen(fake_gpu()) == 8


def test_what_was_found_before_an_interruption_stays(fake_gpu, clock):
    double = fake_gpu()
    clock(double, {"plain": 3.0, 8: 2.0, 4: 1.0, 2: 2.5})
    found = tuning.tune([double.case(rows) for rows in (3, 3000)], [mx.float32])
    next(found)
    found.close()  # as Ctrl-C leaves it
    assert chosen(double) == 4
    assert find_winner(Call.of("double", [mx.ones((3000, 8))], {})) is None


def test_a_dry_run_keeps_nothing_and_doubles_are_tuned_once(fake_gpu, clock):
    double = fake_gpu()
    clock(double, {"plain": 3.0, 8: 2.0, 4: 1.0, 2: 2.5})
    steps = []
    cases = [double.case(3), replace(double.case(3), label="the same"), double.case(5)]
    results = list(
        tuning.tune(cases, [mx.float32], keep=False, on_progress=lambda _, done, total: steps.append((done, total)))
    )
    assert [result.label for result in results] == ["3x8", "5x8"] and not winners_file().exists()
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_what_is_kept_is_what_the_dispatchers_ask_for(fake_gpu, monkeypatch):
    """Each real op's dispatcher looks up the very call that tuning its catalog case would keep."""
    from mlx_fastvlm.benchmarks.random_model import random_config
    from mlx_fastvlm.kernels.catalog import cases, decoder_cases
    from mlx_fastvlm.quantization import Storage

    config = random_config("0.5b")
    asked = []
    monkeypatch.setattr(fused_op, "find_winner", lambda call: asked.append(call) or PLAIN)
    for case in [*cases(config, 512, 5), *decoder_cases(config.text_config, 1, offset=5, gate_up=Storage(4, 64))]:
        arrays = case.arrays(mx.float16)
        asked.clear()
        forget_choices()
        case.run(*arrays)
        assert Call.of(case.op, arrays, case.options) in asked, case.label


class Work:
    """An array whose evaluation takes `milliseconds` on the fake clock, beside `launch` milliseconds for the call."""

    def __init__(self, milliseconds, launch=0.0, nbytes=1000):
        self.milliseconds, self.launch, self.nbytes, self.calls = milliseconds, launch, nbytes, 0


@pytest.fixture
def time_work(monkeypatch):
    """Work → the times that `time_in_turns` gives it, in milliseconds, on a clock that only work moves on."""
    now = [0.0]

    def evaluate(*results):
        for result in results:
            if isinstance(result, Work):
                now[0] += result.milliseconds / 1e3
            else:
                evaluate(*result)

    def call(work):
        now[0] += work.launch / 1e3
        work.calls += 1
        return (work,)

    monkeypatch.setattr(timing, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timing, "mx", SimpleNamespace(eval=lambda *results: evaluate(*results)))
    return lambda *works, **options: [
        seconds * 1e3 for seconds in timing.time_in_turns([partial(call, work) for work in works], 1.0, **options)
    ]


def test_each_call_is_timed_whether_many_fit_a_sample_or_one(time_work):
    works = Work(0.01), Work(0.5), Work(300.0)
    assert time_work(*works) == pytest.approx([0.01, 0.5, 300.0])
    assert works[0].calls > 100 and works[2].calls < 10


def test_the_call_itself_counts_only_where_asked(time_work):
    assert time_work(Work(1.0, launch=2.0)) == pytest.approx([1.0])
    assert time_work(Work(1.0, launch=2.0), lazy=False) == pytest.approx([3.0])


def test_results_that_exist_together_are_bounded(time_work):
    alike = Work(0.01), Work(0.01, nbytes=2**28)
    time_work(*alike)
    assert alike[1].calls < alike[0].calls / 20


def test_real_work_takes_time():
    (seconds,) = timing.time_in_turns([lambda: (mx.ones((64, 64)) @ mx.ones((64, 64)),)], 0.01)
    assert seconds > 0

"""The self-test tells right from wrong, on a GPU's kernels and on a CPU's loops, and its commands say it plainly."""

import json
import sys

import mlx.core as mx
import pytest

from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.kernels import cpu, gpu, selftest, tuning
from mlx_fastvlm.kernels.catalog import FUSED_OPS
from mlx_fastvlm.kernels.choice import current_mode
from mlx_fastvlm.kernels.launch_table import PREFERRED
from mlx_fastvlm.kernels.winners import winners_file
from tests.fake_gpu import INFO, broken, forget_everything, right, wrong
from tests.metal_emulator import available as emulator_missing
from tests.metal_emulator import emulated
from tests.test_kernels import needs_cpu_extra


@pytest.fixture
def quick_clock(monkeypatch):
    """Timing that takes no time: plain 3 ms, kernel 1 ms."""
    monkeypatch.setattr(selftest, "time_in_turns", lambda runs, seconds, lazy=True: [0.003, 0.001])


@pytest.fixture
def no_other_ops(monkeypatch):
    monkeypatch.setattr(selftest, "_other_ops", lambda dtype: ())


def checks(kernel, **options):
    return list(selftest.selftest([kernel.case()], [mx.float32, mx.float16], **options))


def test_every_launch_shape_is_checked_in_every_type(fake_gpu, quick_clock, no_other_ops):
    found = checks(fake_gpu())
    assert [(check.launch["size"], check.dtype) for check in found] == [
        (size, dtype) for dtype in ("float32", "float16") for size in (8, 4, 2)
    ]
    assert all(check.problem is None and check.error == 0 for check in found)
    assert [check.speedup for check in found] == [3.0, None, None] * 2  # the chosen one is timed


def test_the_speedup_is_of_what_is_chosen_over_plain_ops(fake_gpu, no_other_ops, monkeypatch):
    double = fake_gpu()
    times = {"plain": 0.006, 8: 0.002}
    monkeypatch.setattr(
        selftest, "time_in_turns", lambda runs, seconds: [times[(run(), double.ran[-1])[1]] for run in runs]
    )
    assert [check.speedup for check in checks(double, quick=True)] == [3.0, 3.0]


def test_quick_checks_the_chosen_one(fake_gpu, quick_clock, no_other_ops, monkeypatch):
    assert [check.launch for check in checks(fake_gpu(), quick=True)] == [{"size": 8}] * 2
    monkeypatch.setitem(PREFERRED["M4"], "double", ({"size": 4},))
    forget_everything()
    assert [check.launch for check in checks(fake_gpu(), quick=True)] == [{"size": 4}] * 2


def nan(x):
    return right(x) / 0 * 0


def shorter(x):
    return right(x)[:1]


def here_only(body):
    """Wrong on the case's three rows, right on the sample's two."""
    return lambda x: body(x) if len(x) == 3 else right(x)


@pytest.mark.filterwarnings("ignore:The metal kernel")
@pytest.mark.parametrize(
    "body, problem",
    [
        (wrong, "on small ragged arrays: its result is wrong"),
        (broken, "on small ragged arrays: [metal::Device] Unable to build"),
        (here_only(wrong), "its error is 2.5e-01"),
        (here_only(broken), "[metal::Device] Unable to build"),
        (here_only(nan), "not a number"),
        (here_only(shorter), "its result is mlx.core.float"),
    ],
)
@pytest.mark.parametrize("size", [8, 2])
def test_what_is_wrong_fails(fake_gpu, quick_clock, no_other_ops, body, problem, size):
    found = checks(fake_gpu({size: body}))
    assert {check.launch["size"] for check in found if check.problem} == {size}
    assert all(problem in check.problem for check in found if check.problem)
    json.dumps([check.to_dict() for check in found], allow_nan=False)


def test_the_mode_of_the_environment_does_not_matter_and_stays(fake_gpu, quick_clock, no_other_ops, monkeypatch):
    monkeypatch.setenv("MLX_FASTVLM_KERNELS", "off")
    double = fake_gpu()
    assert len(checks(double)) == 6 and "plain" not in double.ran
    assert current_mode() == "off"


def test_ragged_cases_can_be_run_by_every_kernel_they_name():
    found = selftest.ragged_cases()
    assert {case.op for case in found} == {op.name for op in FUSED_OPS}
    for case in found:
        arrays = case.arrays(mx.float16)
        assert case.fused_op.launches(*arrays, **case.options), case.label
        for a, b in zip(case.run(*arrays), case.fused_op.reference(*arrays, **case.options), strict=True):
            assert a.shape == b.shape


@needs_cpu_extra
def test_on_a_cpu_the_ops_outside_the_catalog_take_their_loops(monkeypatch, quick_clock):
    monkeypatch.setenv("MLX_FASTVLM_KERNELS", "reference")  # the self-test decides for itself
    answers = []
    suits = cpu.suits
    monkeypatch.setattr(cpu, "suits", lambda *args: answers.append(suits(*args)) or answers[-1])
    for check in selftest.selftest([], [mx.float32]):
        assert check.problem is None and check.launch is None
        assert True in answers, f"{check.op} {check.shape} took plain ops"
        answers.clear()


@needs_cpu_extra
def test_a_wrong_loop_fails(monkeypatch, quick_clock):
    module = sys.modules["mlx_fastvlm.kernels.gelu"]  # the package's own `gelu` is the function
    monkeypatch.setattr(module, "gelu_cpu", lambda x: x)
    problems = {check.op: check.problem for check in selftest.selftest([], [mx.float32])}
    assert "its error is" in problems["gelu"] and problems["feed_forward"] is None


@pytest.mark.skipif(emulator_missing() is not None, reason=str(emulator_missing()))
def test_real_kernels_pass_and_are_tuned_in_the_emulator(fake_gpu, quick_clock, no_other_ops, monkeypatch):
    cases = [case for case in selftest.ragged_cases() if case.op in ("self_attention", "depthwise_conv")][-2:]
    monkeypatch.setattr(tuning, "time_in_turns", lambda runs, seconds: [2.0] + [1.0] * (len(runs) - 1))
    with emulated() as session:
        assert [check.problem for check in selftest.selftest(cases, [mx.float16], quick=True)] == [None, None]
        launched = len(session.launches)
        results = list(tuning.tune(cases[:1], [mx.float16]))
    assert launched >= len(cases) and len(session.launches) > launched
    assert results[0].rejected == [] and results[0].winner == results[0].seconds[0][0]


def test_the_environment_names_what_a_report_needs(fake_gpu):
    about = selftest.environment()
    assert about["chip"]["name"] == INFO["device_name"] and about["backend"] == "metal"
    assert about["mlx"] == mx.__version__ and {"system", "python", "gpu_cores", "numpy"} <= set(about)


# The commands, without the whole command line around them.


@pytest.fixture
def commands(monkeypatch, fake_gpu, quick_clock, no_other_ops):
    """cli/kernels.py, whose models consist of one fake op."""
    from mlx_fastvlm.cli import kernels as commands

    def use(bodies=None):
        kernel = fake_gpu(bodies)
        monkeypatch.setattr("mlx_fastvlm.kernels.catalog.cases", lambda config, side, tokens: [kernel.case(tokens)])
        monkeypatch.setattr(selftest, "ragged_cases", lambda: [])
        monkeypatch.setattr(tuning, "time_in_turns", lambda runs, seconds: [0.004, 0.003, 0.001, 0.002][: len(runs)])
        return commands

    return use


def test_selftest_prints_a_table_and_json_and_writes_a_file(commands, capsys, tmp_path):
    commands().selftest(json_file=tmp_path / "result.json")
    *table, last = capsys.readouterr().out.splitlines()
    assert json.loads(last)["failed"] == [] and json.loads(last)["chip"]["family"] == "M4"
    assert any(line.split()[:5] == ["double", "41x8", "float16", "pass", "3/3"] for line in table)
    assert len(json.loads((tmp_path / "result.json").read_text())["results"]) == json.loads(last)["checks"]


@pytest.mark.filterwarnings("ignore:The metal kernel")
def test_selftest_fails_if_anything_does(commands, capsys):
    with pytest.raises(FastVLMError, match="checks failed, first double.*its result is wrong"):
        commands({4: wrong}).selftest()
    out = capsys.readouterr().out
    assert "FAIL" in out and len(json.loads(out.splitlines()[-1])["failed"]) == 3  # types


def test_selftest_knows_before_the_work_that_the_file_cannot_be_written(commands, tmp_path):
    with pytest.raises(FastVLMError, match="not a folder"):
        commands().selftest(json_file=tmp_path / "none" / "result.json")


def test_tune_prints_a_table_and_keeps_the_winners(commands, capsys):
    commands().tune(model="demo", seconds_per_kernel=0.1)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["double", "41x8", "float16", "4.000", "1.000", "4.00x", "size=4"]
    assert lines[-1].startswith("Kept in ") and "apple-m4-max" in lines[-1]


def test_tune_takes_resolutions_types_and_prompt_lengths(commands, capsys):
    from mlx_fastvlm.cli.terminal import DType

    module = commands()
    module.tune("demo", resolution=[64, 512], dtype=[DType.float32], seconds_per_kernel=0.1, dry_run=True)
    module.tune("demo", prompt_tokens=7, seconds_per_kernel=0.1, dry_run=True)
    out = capsys.readouterr().out
    assert not winners_file().exists()
    assert "26x8  float32" in out and "89x8  float32" in out and "7x8" in out and "Kept" not in out


def test_tune_of_a_folder_reads_nothing_but_its_config(commands, capsys, tmp_path):
    from mlx_fastvlm.loading import FORMAT_KEY, resolve_model

    raw = json.loads((resolve_model("demo") / "config.json").read_text())
    del raw[FORMAT_KEY]  # as the hub has it: not converted
    (tmp_path / "config.json").write_text(json.dumps(raw))
    commands().tune(str(tmp_path), seconds_per_kernel=0.1, dry_run=True)
    assert "41x8" in capsys.readouterr().out


def test_ctrl_c_shows_what_was_found(commands, capsys, monkeypatch):
    times = iter([[0.004, 0.003, 0.001, 0.002]])

    def interrupted(runs, seconds):
        for measured in times:
            return measured
        raise KeyboardInterrupt

    module = commands()
    monkeypatch.setattr(tuning, "time_in_turns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.tune("demo", resolution=[64, 128], seconds_per_kernel=0.1)
    out = capsys.readouterr().out
    assert "26x8" in out and "29x8" not in out and "Kept in" in out


def test_tune_refuses_impossible_resolutions(commands):
    with pytest.raises(FastVLMError, match="--resolution is 100.*multiple of 64"):
        commands().tune("demo", resolution=[100])


def test_on_a_cpu_there_is_nothing_to_tune(commands, monkeypatch):
    monkeypatch.setattr(gpu, "backend", lambda: None)
    with pytest.raises(FastVLMError, match="nothing to tune"):
        commands().tune("demo")


def test_clear_deletes_what_was_tuned(commands, capsys):
    module = commands()
    module.tune("demo", seconds_per_kernel=0.1)
    module.tune(clear=True)
    module.tune(clear=True)
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "Deleted 1 file of tuned launch shapes.",
        "Deleted 0 files of tuned launch shapes.",
    ]

"""`mlx-fastvlm bench`: the benchmarks' own parsers behind the command line, and nothing of them for other commands."""

from importlib.util import find_spec

import pytest

from mlx_fastvlm.benchmarks import COMMANDS
from tests.conftest import GOLDEN

PICTURE = GOLDEN / "images" / "landscape.png"


@pytest.fixture
def bench(command_line):
    return lambda *arguments: command_line("bench", *arguments)


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_the_group_lists_its_commands(arguments, bench):
    code, out, _ = bench(*arguments)
    assert code == 0
    for name, summary in COMMANDS.items():
        assert name in out and summary in out


@pytest.mark.parametrize(
    "name", [name for name in COMMANDS if find_spec(f"mlx_fastvlm.benchmarks.{name.replace('-', '_')}")]
)
def test_every_command_explains_itself(name, bench):
    code, out, _ = bench(name, "--help")
    assert code == 0
    assert out.startswith(f"usage: mlx-fastvlm bench {name} ")
    assert "--save" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("ttft", "--wrong"),
            "mlx-fastvlm bench ttft: unrecognized arguments: --wrong. See: mlx-fastvlm bench ttft --help",
        ),
        (("ttft", "--resolution", "100"), "expected a positive multiple of 64"),
        (("ttft", "--model", "demo", "--random-weights", "0.5b"), "not allowed with argument --model"),
        (("peers",), "the following arguments are required: FOLDER"),
        (("peers", "x", "--peers", "nobody"), "invalid choice: 'nobody'"),
        (("headline", "--tiles", "4"), "invalid choice: 4"),
        (("kernels", "--against", "luck"), "invalid choice: 'luck'"),
        (("nonsense",), "mlx-fastvlm: No such command 'nonsense'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_1(arguments, message, bench):
    code, out, err = bench(*arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1


def test_arguments_reach_the_benchmark_as_they_are(monkeypatch, bench, tmp_path):
    code, _, err = bench("ttft", "--model", tmp_path / "nowhere")
    assert code == 1
    assert err.splitlines()[-1].startswith(f"ttft: There is no folder {tmp_path / 'nowhere'}")

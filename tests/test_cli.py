"""The command line: what goes to stdout, to stderr, and as exit code; every mistake is one line and exit code 1."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib

import pytest

from mlx_fastvlm import __version__, cli
from tests.conftest import GOLDEN

PICTURE = str(GOLDEN / "images" / "landscape.png")
OTHER = str(GOLDEN / "images" / "portrait.png")


@pytest.fixture
def run(command_line):
    return command_line


@pytest.fixture
def model(converted_folder):
    return str(converted_folder("inference"))


def test_describe_prints_the_answer_alone(run, model, tiny):
    code, out, err = run("describe", PICTURE, "--model", model, "--max-tokens", 8)
    assert (code, err) == (0, "")
    from mlx_fastvlm import generate

    assert out == generate(*tiny, "Describe this image.", image=PICTURE, max_tokens=8) + "\n"


def test_json_is_one_object_with_everything(run, model):
    code, out, _ = run("describe", PICTURE, "Why?", "-m", model, "--max-tokens", 5, "--json")
    record = json.loads(out)
    assert code == 0
    assert (record["prompt"], record["image"], record["generation_tokens"]) == ("Why?", PICTURE, 5)
    assert record["finish_reason"] == "length"
    assert {"text", "ttft", "prompt_tokens", "generation_tps", "peak_memory"} <= set(record)
    assert set(record["timings"]) == {"decode", "resize", "encode", "project", "tokenize", "prefill", "first_token"}


def test_stats_go_to_stderr(run, model):
    code, out, err = run("describe", PICTURE, "-m", model, "--max-tokens", 5, "--stats")
    assert code == 0
    assert "Time to first token" in err and "tok/s" in err
    assert "tok/s" not in out


def test_a_picture_from_standard_input(run, model):
    with open(PICTURE, "rb") as file:
        code, out, _ = run("describe", "-", "-m", model, "--max-tokens", 5, stdin=file.read())
    assert code == 0
    assert out == run("describe", PICTURE, "-m", model, "--max-tokens", 5)[1]


@pytest.mark.parametrize("preset", cli.Preset)
def test_presets_ask_their_question(preset, run, model):
    _, out, _ = run("describe", PICTURE, "-m", model, "--preset", preset.value, "--max-tokens", 2, "--json")
    assert json.loads(out)["prompt"] == cli.PRESET_PROMPTS[preset]


def test_fit_changes_what_is_seen(run, model):
    fits = ("pad", "crop", "native")
    answers = [run("describe", PICTURE, "-m", model, "--fit", fit, "--max-tokens", 12)[1] for fit in fits]
    assert len(set(answers)) == 3


def test_resolution_is_that_of_every_picture_and_is_noticed_once(run, model, tiny):
    arguments = ("-m", model, "--image", OTHER, "--max-tokens", 4, "--json", "--resolution", 128, "--fit", "native")
    code, out, err = run("describe", PICTURE, "Which?", *arguments)
    notes = err.splitlines()
    assert code == 0 and len(notes) == 2  # the other is that of several pictures
    assert "trained mainly on images of 256x256 pixels; at 128" in notes[1] and "rectangles" in notes[1]
    ids = tiny[1].tokenize("Which?", 2)
    assert json.loads(out)["prompt_tokens"] == len(ids) - 2 + 2 + 2  # both are 64 by 128, or 128 by 64


def test_several_pictures_come_with_a_notice(run, model, tiny):
    import warnings

    from mlx_fastvlm import generate

    arguments = ("-m", model, "--image", OTHER, "--max-tokens", 8)
    code, out, err = run("describe", PICTURE, "Is <image> like <image>?", *arguments)
    assert code == 0
    assert err.startswith("Note: FastVLM was trained on one image") and err.count("\n") == 1
    with warnings.catch_warnings(action="ignore"):
        wanted = generate(*tiny, "Is <image> like <image>?", [PICTURE, OTHER], max_tokens=8)
    assert out == wanted + "\n"
    record = json.loads(run("describe", PICTURE, *arguments, "--json")[1])
    assert record["images"] == [PICTURE, OTHER]
    assert run("describe", PICTURE, "just <image>", *arguments)[0] == 1


def test_a_picture_is_encoded_once_with_an_image_cache(run, model):
    records = [
        json.loads(run("describe", PICTURE, question, "-m", model, "--max-tokens", 5, "--image-cache", "--json")[1])
        for question in ("What?", "What?", "Why?")
    ]
    assert ["encode" in record["timings"] for record in records] == [True, False, False]
    plain = json.loads(run("describe", PICTURE, "What?", "-m", model, "--max-tokens", 5, "--json")[1])
    assert records[0]["text"] == records[1]["text"] == plain["text"]


@pytest.mark.parametrize(
    "option", [("--seed", 7, "--temp", 2), ("--stop", "zzzz"), ("--top-k", 3, "--temp", 1, "--top-p", 0.9)]
)
def test_sampling_options_are_taken(option, run, model):
    assert run("describe", PICTURE, "-m", model, "--max-tokens", 3, *option)[0] == 0


def test_convert_then_info(run, hub_folder, tmp_path):
    code, out, _ = run("convert", hub_folder("training"), tmp_path / "out", "--dtype", "float16")
    assert code == 0 and "float16" in out
    code, out, _ = run("info", tmp_path / "out", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["dtype"] == "F16" and facts["image_tokens"] == 16
    assert facts["parameters"]["total"] == sum(v for k, v in facts["parameters"].items() if k != "total")
    code, out, _ = run("info", tmp_path / "out")
    assert code == 0 and "49 batch norms" in out


def test_version_and_help(run):
    assert run("--version") == (0, f"mlx-fastvlm {__version__}\n", "")
    for arguments in ([], ["--help"], ["describe", "--help"], ["convert", "--help"], ["info", "--help"]):
        code, out, err = run(*arguments)
        assert code == 0 and "Usage:" in out and err == ""


def bomb(path):
    """A PNG header that claims 10^5 × 10^5 pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 10**5, 10**5, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def cut(path):
    with open(PICTURE, "rb") as file:
        path.write_bytes(file.read()[:2000])


BAD_IMAGES = {
    "missing": (lambda path: None, "no file"),
    "text": (lambda path: path.write_text("hello, I am not a picture"), "picture.png is text"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "cut off": (cut, "cut off"),
    "folder": (lambda path: path.mkdir(), "folder"),
    "bomb": (bomb, "100000"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images(name, run, model, tmp_path):
    make, text = BAD_IMAGES[name]
    make(tmp_path / "picture.png")
    code, out, err = run("describe", tmp_path / "picture.png", "-m", model)
    assert (code, out) == (1, "")
    assert text in err.lower()
    assert err.count("\n") == 1


BAD_COMMANDS = [
    (["describe"], "image"),
    (["describe", PICTURE, "-m", "no-such-model"], "no folder"),
    (["describe", PICTURE, "-m", __file__], "is a file"),
    (["describe", PICTURE, "-m", str(GOLDEN)], "config.json"),
    (["describe", PICTURE], "--model demo"),
    (["describe", PICTURE, "why?", "--preset", "read", "-m", "demo"], "--preset"),
    (["describe", PICTURE, "--preset", "poem", "-m", "demo"], "poem"),
    (["describe", PICTURE, "--fit", "stretch", "-m", "demo"], "stretch"),
    (["describe", PICTURE, "--resolution", "1000"], "960 or 1024 is nearest"),  # before any download
    (["describe", PICTURE, "--resolution", "4096", "-m", "demo"], "2048 is nearest"),
    (["describe", PICTURE, "--resolution", "large", "-m", "demo"], "resolution"),
    (["describe", PICTURE, "--dtype", "int8", "-m", "demo"], "int8"),
    (["describe", PICTURE, "--max-tokens", "0", "-m", "demo"], "max-tokens"),
    (["describe", PICTURE, "--max-tokens", "many", "-m", "demo"], "max-tokens"),
    (["describe", PICTURE, "--temp", "-1", "-m", "demo"], "temp"),
    (["describe", PICTURE, "--top-p", "1.5", "--temp", "1", "-m", "demo"], "top_p"),
    (["describe", PICTURE, "--repetition-penalty", "0", "-m", "demo"], "repetition_penalty"),
    (["describe", PICTURE, "--seed", "-1", "-m", "demo"], "seed"),
    (["describe", PICTURE, "--seed", str(2**64), "-m", "demo"], "seed"),
    (["describe", PICTURE, "--top-p", "5", "--temp", "1"], "top_p"),  # before any download
    (["describe", PICTURE, "caf\udce9", "-m", "demo"], "Unicode"),
    (["describe", PICTURE, "--revision", "v1", "-m", "demo"], "revision"),
    (["describe", PICTURE, "--colour", "blue"], "--colour"),
    (["describe", "-", "-m", "demo"], "Standard input is empty"),
    (["describe", "http://127.0.0.1:9/picture.png", "-m", "demo"], "127.0.0.1"),
    (["convert", "no-such-folder", "out"], "neither a folder, a zip nor a hub id"),
    (["convert", str(GOLDEN), "no/such/place"], "no/such"),
    (["convert", "apple/FastVLM-0.5B", "out"], "neither in the cache nor"),
    (["convert", str(GOLDEN), "out", "-q", "int9"], "no recipe 'int9'"),
    (["convert", str(GOLDEN), "out", "--vision", "8"], "give one with --quantize"),
    (["convert", str(GOLDEN), "out", "--to", "onnx"], "onnx"),
    (["convert", str(GOLDEN), "out", "-q", "int4", "--to", "hub"], "leave it away"),
    (["quantize", "demo", "out", "-q", "int4", "--decoder", "4:48"], "4:48"),
    (["quantize", "demo", "out", "--images", "nowhere"], "nowhere"),
    (["quantize", "demo", "out", "--images", str(GOLDEN)], "holds no pictures"),
    (["describe", PICTURE, "--kv-bits", "7"], "kv_bits"),  # before any download
    (["verify", str(GOLDEN)], "no conversion.json"),
    (["fidelity", "demo", "nowhere"], "nowhere"),
    (["fidelity", "demo", "demo", "--save-to-model"], "demo is not the folder"),
    (["fidelity", "demo", "demo", "--images", "nowhere"], "nowhere"),
    (["info", str(GOLDEN)], "config.json"),
    (["paint"], "paint"),
]


@pytest.mark.parametrize(
    "arguments, text", BAD_COMMANDS, ids=lambda value: " ".join(value[-3:]) if isinstance(value, list) else ""
)
def test_mistakes_are_one_line_and_exit_code_1(arguments, text, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert text in err
    assert err.startswith("mlx-fastvlm: ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_from_a_checkpoint_to_a_small_model_and_its_report(run, hub_folder, tmp_path):
    big, small = tmp_path / "big", tmp_path / "small"
    assert run("convert", hub_folder("inference"), big)[0] == 0
    code, out, _ = run("quantize", big, small, "-q", "int8", "--decoder", "8:32", "--embeddings", "8:32")
    assert code == 0 and "int8 (decoder 8:32, embeddings 8:32)" in out and "bits per weight" in out
    code, out, _ = run("info", small)
    assert code == 0 and "decoder 8 bits, groups of 32" in out
    code, out, _ = run("verify", small, "--json")
    assert code == 0 and json.loads(out)["problems"] == []
    code, out, _ = run(
        "fidelity", big, small, "--max-tokens", 4, "--speed-rounds", 0, "--save-to-model", "--json", tmp_path / "f.json"
    )
    assert code == 0 and "top-1 agreement" in out
    assert json.loads((tmp_path / "f.json").read_text())
    assert "top-1 agreement" in (small / "README.md").read_text()
    assert run("verify", small)[0] == 0  # the report is no change of the model


def test_verify_of_a_damaged_model_exits_with_1(run, model, tmp_path):
    damaged = shutil.copytree(model, tmp_path / "model")
    (damaged / "tokenizer.json").write_text("{}")
    code, out, err = run("verify", damaged)
    assert code == 1 and "checksums" in out and "tokenizer.json is changed" in err


def test_a_checkpoint_goes_to_the_hubs_layout_and_comes_back(run, hub_folder, tmp_path):
    code, _, err = run("convert", hub_folder("training"), tmp_path / "hub", "--to", "hub")
    assert code == 0, err
    assert json.loads((tmp_path / "hub" / "config.json").read_text())["model_type"] == "llava_qwen2"
    answers = [
        run("describe", PICTURE, "-m", folder, "--max-tokens", 6)[1]
        for folder in (hub_folder("training"), tmp_path / "hub")
    ]
    assert answers[0] == answers[1]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_wrong_checkpoint_names_what_was_found(run, hub_folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "llava", "architectures": ["Llava"]}))
    code, _, err = run("describe", PICTURE, "-m", tmp_path / "other")
    assert code == 1 and "'llava'" in err and err.count("\n") == 1


def test_a_cache_that_cannot_be_used(run, hub_folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_FASTVLM_CACHE", str(tmp_path / "file"))
    code, _, err = run("describe", PICTURE, "-m", hub_folder("inference"))
    assert code == 1 and "MLX_FASTVLM_CACHE" in err and err.count("\n") == 1


def hear_ctrl_c():
    """For a child process: shells start background jobs, and so a whole test run there, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(*arguments):
    """The installed command line as a process of its own."""
    command = [sys.executable, "-c", "from mlx_fastvlm.cli import main; main()", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_an_answer_cleanly(number, model):
    process = start("describe", PICTURE, "-m", model, "--max-tokens", "30000", "--temp", "5", "--top-k", "50")
    process.stdout.read(1)
    process.send_signal(number)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == "\nStopped.\n"


def test_a_reader_that_leaves_early_is_no_error(model):
    process = start("describe", PICTURE, "-m", model, "--max-tokens", "3000", "--temp", "5", "--top-k", "50")
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=20) == 0
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk that is always full")
def test_a_full_disk_behind_stdout_is_one_line():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", "from mlx_fastvlm.cli import main; main()", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("mlx-fastvlm: ") and done.stderr.count("\n") == 1


def test_ctrl_c_in_a_conversion_leaves_nothing(hub_folder, tmp_path):
    script = (
        "import sys, time\nfrom mlx_fastvlm.convert import convert\n"
        "def slowly(*report): print('.', flush=True); time.sleep(0.2)\n"
        "convert(sys.argv[1], sys.argv[2], on_progress=slowly)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(hub_folder("inference")), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=hear_ctrl_c,
    )
    process.stdout.read(1)
    assert len(list(tmp_path.iterdir())) == 1  # the folder being written aside
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert list(tmp_path.iterdir()) == []

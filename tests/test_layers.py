"""The layers of the project, read from the source: who may import what, and that nothing heavy is loaded to answer."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_fastvlm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

ROOT = Path(__file__).parent.parent
RUNTIME = sorted((ROOT / "mlx_fastvlm").rglob("*.py"))
CONVERTER = sorted((ROOT / "convert").rglob("*.py"))
SERVER = "mlx_fastvlm/server"
CLI = [f"mlx_fastvlm/cli/{path.name}" for path in (ROOT / "mlx_fastvlm" / "cli").glob("*.py")]

# module → the only files that may import it at all
ONLY_IN = {
    "torch": {"convert/torch_file.py"},
    "typer": set(CLI),
    "rich": {f"mlx_fastvlm/cli/{name}.py" for name in ("terminal", "chat_view", "chat_markdown")},
    "markdown_it": {"mlx_fastvlm/cli/chat_markdown.py"},
    "prompt_toolkit": {"mlx_fastvlm/cli/chat_editor.py"},
    "PIL": {f"mlx_fastvlm/{name}.py" for name in ("image_decoding", "image_processing", "auto_resolution")},
    "huggingface_hub": {"mlx_fastvlm/hub.py"},
    "httpx": {"mlx_fastvlm/image_source.py", f"{SERVER}/remote_images.py"},
    "fastapi": {f"{SERVER}/app.py", f"{SERVER}/run.py", "mlx_fastvlm/cli/serve.py"},
    "starlette": {f"{SERVER}/{name}.py" for name in ("app", "guard", "replies")},
    "uvicorn": {f"{SERVER}/connection.py", f"{SERVER}/run.py", "mlx_fastvlm/cli/serve.py"},
    "pydantic": {f"{SERVER}/{name}.py" for name in ("schema", "messages")},
    "prometheus_client": {f"{SERVER}/metrics.py", "mlx_fastvlm/cli/serve.py"},
    "av": {f"mlx_fastvlm/video/{name}.py" for name in ("reader", "frame")},
    "lmms_eval": {f"mlx_fastvlm/evaluation/{name}.py" for name in ("lmms_adapter", "lmms_plugin")},
    "tqdm": {"mlx_fastvlm/evaluation/lmms_adapter.py"},
    "pillow_heif": {"mlx_fastvlm/image_decoding.py"},
    "pypdfium2": {"mlx_fastvlm/pdf_pages.py"},
    "exiv2": {"mlx_fastvlm/captions/metadata.py"},
    "ray": set(),
    "llguidance": {
        f"mlx_fastvlm/constraint/{path.name}" for path in (ROOT / "mlx_fastvlm" / "constraint").glob("*.py")
    },
}
# file or folder → parts of ours that it may import
MAY_IMPORT = {
    "mlx_fastvlm/errors.py": set(),
    "mlx_fastvlm/quantization.py": {"errors"},
    "mlx_fastvlm/json_file.py": {"errors"},
    "mlx_fastvlm/config.py": {"errors", "json_file", "quantization"},
    "mlx_fastvlm/layers.py": {"kernels", "quantization"},
    "mlx_fastvlm/cache.py": {"errors", "kernels"},
    "mlx_fastvlm/batch_cache.py": {"cache", "kernels"},
    "mlx_fastvlm/captions/read_ahead.py": set(),
    "mlx_fastvlm/blas.py": set(),
    "mlx_fastvlm/cache_folder.py": set(),
    "mlx_fastvlm/replace_file.py": set(),
    "mlx_fastvlm/kernels": {"kernels", "blas", "errors", "json_file", "cache_folder", "replace_file"},
    "mlx_fastvlm/fastvithd.py": {"config", "kernels", "layers"},
    "mlx_fastvlm/qwen2.py": {"config", "cache", "kernels", "layers"},
    "mlx_fastvlm/clip_head.py": {"errors", "safetensors_file"},
    "mlx_fastvlm/model.py": {"config", "cache", "clip_head", "fastvithd", "qwen2", "layers"},
    "mlx_fastvlm/resolution.py": {"errors"},
    "mlx_fastvlm/tiling.py": {"errors", "resolution"},
    "mlx_fastvlm/auto_resolution.py": {"errors", "json_file", "resolution"},
    "mlx_fastvlm/image_source.py": {"errors"},
    "mlx_fastvlm/pdf_pages.py": {"errors", "image_source"},
    "mlx_fastvlm/image_decoding.py": {"errors", "image_source", "pdf_pages"},
    "mlx_fastvlm/image_processing.py": {"auto_resolution", "errors", "image_decoding", "resolution", "tiling"},
    "mlx_fastvlm/prompt.py": {"errors", "config"},
    "mlx_fastvlm/sampling.py": {"errors"},
    "mlx_fastvlm/text_stream.py": set(),
    "mlx_fastvlm/logprobs.py": set(),
    "mlx_fastvlm/options.py": {"auto_resolution", "cache", "errors", "logprobs", "resolution", "sampling"},
    "mlx_fastvlm/constraint": {"constraint", "errors", "json_file", "processor"},
    "mlx_fastvlm/token_draw.py": {"constraint", "logprobs", "options", "processor", "sampling"},
    "mlx_fastvlm/answer.py": {"logprobs", "options", "processor"},
    "mlx_fastvlm/prefix_cache.py": {"cache"},
    "mlx_fastvlm/image_content.py": {"image_decoding", "image_source"},
    "mlx_fastvlm/image_features.py": set(
        "answer image_content image_decoding image_processing model resolution tiling".split()
    ),
    "mlx_fastvlm/feature_cache.py": {
        "answer",
        "errors",
        "image_content",
        "image_features",
        "image_processing",
        "model",
        "processor",
    },
    "mlx_fastvlm/locked_file.py": {"errors"},
    "mlx_fastvlm/video_file.py": set(),
    "mlx_fastvlm/video": set(
        "batch_generate captions errors image_decoding image_processing locked_file model options processor video".split()
    ),
    "mlx_fastvlm/evaluation": set(
        "answer auto_resolution batch_generate benchmarks cache config errors evaluation fidelity generate image_content "
        "image_decoding image_processing json_file loading locked_file model options processor".split()
    ),
    "mlx_fastvlm/server": set(
        "answer auto_resolution batch_generate constraint errors generate image_content image_decoding image_features "
        "image_processing image_source kernels model options prefix_cache processor prompt reuse server token_draw "
        "__version__".split()
    ),
}
# file → parts that it may import beyond its folder's
MAY_IMPORT_TOO = {
    "mlx_fastvlm/kernels/catalog.py": {"config", "quantization"},  # the shapes in which a model calls the kernels
}


def imports(path: Path) -> set[str]:
    """Full names of the modules a file imports anywhere, TYPE_CHECKING included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", RUNTIME + CONVERTER, ids=name_of)
def test_outside_libraries_stay_where_they_belong(path):
    used = {name.partition(".")[0] for name in imports(path)}
    for library, allowed in ONLY_IN.items():
        assert library not in used or name_of(path) in allowed, f"{name_of(path)} imports {library}"
    assert not used & {"tests", "training", "convert", "benchmarks"}


@pytest.mark.parametrize("rule", MAY_IMPORT)
def test_parts_of_ours_import_only_what_is_below_them(rule):
    files = [ROOT / rule] if rule.endswith(".py") else sorted((ROOT / rule).glob("*.py"))
    assert files
    for path in files:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("mlx_fastvlm.")}
        allowed = MAY_IMPORT[rule] | MAY_IMPORT_TOO.get(name_of(path), set())
        assert ours <= allowed, f"{name_of(path)} imports {sorted(ours - allowed)}"


def test_generate_never_prints():
    tree = ast.parse((ROOT / "mlx_fastvlm" / "generate.py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print"]


def test_every_file_says_what_it_is():
    for path in [*RUNTIME, *CONVERTER, *sorted((ROOT / "benchmarks").glob("*.py"))]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{name_of(path)} has no docstring"


def test_the_list_of_packages_is_the_tree():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in RUNTIME}
    outside = {path.parent.relative_to(ROOT).as_posix() for path in CONVERTER} | {"benchmarks"}
    folders |= {f"mlx_fastvlm.{name}".replace("/", ".") for name in outside}
    assert set(settings["packages"]) == folders


def test_the_version_is_stated_once_and_the_same():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == mlx_fastvlm.__version__


def test_answering_loads_nothing_heavy(tmp_path):
    script = (
        "import sys; from mlx_fastvlm import cli; sys.argv = ['mlx-fastvlm', 'describe', sys.argv[1], '--model', 'demo'];\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'transformers', 'mlx_lm', 'numba', 'huggingface_hub', 'httpx', 'mlx_fastvlm.convert'}\n"
        "heavy |= {'rich.progress', 'prompt_toolkit', 'fastapi', 'starlette', 'uvicorn', 'prometheus_client'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    picture = ROOT / "examples" / "shapes-two.png"
    done = subprocess.run([sys.executable, "-c", script, str(picture)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

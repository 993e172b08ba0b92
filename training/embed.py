"""Put a trained export into the package: `python -m training.embed RUN_FOLDER/hub`; needs mlx-fastvlm, not torch.

The export goes through the project's own converter like any checkpoint, stored as float16, and examples/answers.json is
written anew from what the result says of the pictures there.
"""

import argparse
import json
from pathlib import Path

from mlx_fastvlm import generate, load
from mlx_fastvlm.auto_resolution import FILE_NAME
from mlx_fastvlm.convert import convert
from training import prompts

ROOT = Path(__file__).parent.parent
EXAMPLE_PROMPTS = (prompts.DESCRIBE[0], prompts.BRIEF[0], prompts.READ[1], prompts.COUNT[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hub", type=Path, help="export of training.train: a checkpoint in LlavaQwen2 layout")
    hub = parser.parse_args().hub
    (hub / "README.md").write_text(
        "---\nlicense: mit\n---\nThe demo model of mlx-fastvlm; see training/README.md there.\n"
    )
    demo = ROOT / "mlx_fastvlm" / "assets" / "demo"
    demo.parent.mkdir(exist_ok=True)
    (demo / FILE_NAME).unlink(missing_ok=True)  # of the earlier weights; evaluate_resolution finds others
    convert(hub, demo, dtype="float16", force=True, source_name="mlx-fastvlm training/")
    model, processor = load("demo")
    answers = {
        path.name: {prompt: generate(model, processor, prompt, image=path) for prompt in EXAMPLE_PROMPTS}
        for path in sorted((ROOT / "examples").glob("*.png"))
    }
    (ROOT / "examples" / "answers.json").write_text(json.dumps(answers, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(answers, indent=2))


if __name__ == "__main__":
    main()

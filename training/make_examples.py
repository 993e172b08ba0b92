"""Draw the pictures in examples/: `python -m training.make_examples`; prints what the demo model should say of each."""

import argparse
from pathlib import Path

from training import scenes, text_pictures
from training.data import EXAMPLE_SEEDS

SCENE_SEEDS = {"shapes-three.png": (5, 384), "shapes-two.png": (51, 256), "shapes-wide.png": (1, 512)}
TEXT_SEEDS = {"word.png": (8, "STOP", 400), "number.png": (3, "406", 320)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent.parent / "examples")
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    for name, (seed, long_side) in SCENE_SEEDS.items():
        scene = scenes.make_scene(EXAMPLE_SEEDS + seed)
        scenes.render(scene, long_side).save(folder / name, optimize=True)
        print(f"{name}: {scenes.caption(scene)}")
    for name, (seed, text, long_side) in TEXT_SEEDS.items():
        picture = text_pictures.make_text_picture(EXAMPLE_SEEDS + seed, text)
        text_pictures.render(picture, long_side).save(folder / name, optimize=True)
        print(f"{name}: {text_pictures.caption(picture)}")


if __name__ == "__main__":
    main()

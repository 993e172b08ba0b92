"""Caption the pictures in a folder on a Ray cluster, here one of this machine's own, and write a JSON object per picture.

    pip install 'mlx-fastvlm[ray]'
    python examples/caption_with_ray.py examples captions.jsonl --model demo

On a cluster of several machines leave out what `ray.init` is given here, start this with `ray job submit`, and let the
folder be one that all machines see. For pictures in a bucket take `ray.data.read_binary_files("s3://…",
include_paths=True)` in place of `from_items`, and column="bytes".
"""

from __future__ import annotations

import argparse
import json

import ray

from mlx_fastvlm.captions.picture_files import find_pictures
from mlx_fastvlm.ray_data import CaptionBatches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--model", default="apple/FastVLM-0.5B")
    parser.add_argument("--actors", type=int, default=1, help="how many processes have a model each")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures that Ray hands to one of them at a time")
    arguments = parser.parse_args()

    pictures = [{"path": picture.name} for picture in find_pictures([arguments.folder], recursive=True)]
    ray.init(num_cpus=arguments.actors + 1, include_dashboard=False, object_store_memory=100 * 2**20)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    captioned = ray.data.from_items(pictures).map_batches(
        CaptionBatches,
        fn_constructor_kwargs={"model": arguments.model, "column": "path"},
        batch_size=arguments.batch_size,
        compute=ray.data.ActorPoolStrategy(size=arguments.actors),
        num_cpus=1,
    )
    with open(arguments.out, "w", encoding="utf-8") as file:
        for row in captioned.iter_rows():
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    ray.shutdown()


if __name__ == "__main__":
    main()

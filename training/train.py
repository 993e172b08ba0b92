"""Train the demo model: `python -m training.train --work RUN_FOLDER`, then see `training.evaluate`.

Two stages stand in for the pretrained parts that FastVLM starts from, the others are the paper's:

    tower      FastViTHD alone, on dense labels of the pictures
    decoder    Qwen2 alone, answering questions about captions given as text
    projector  the projector alone, tower and decoder frozen
    all        everything on the answers, the dense labels still helping
    language   projector and decoder, many questions on each of a store of pictures that the frozen tower has seen
    again      everything once more, with more of easy-VQA
    sizes      everything, at several resolutions, with and without padding

Each stage has a budget of wall-clock minutes, which also drives its learning rate. A run starts from the checkpoint in
the run folder, if there is one, and overwrites it; an interrupted stage continues where it was. The last export is in
hub/ of the run folder, and log.jsonl has one JSON line per report.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from training import parallel
from training.config import model_config
from training.data import AS_DRAWN, TrainingData, View, collate, to_pixel_values
from training.dense import DenseHeads, dense_accuracy, dense_loss
from training.dialogues import Dialogue, grammar_corpus
from training.export import export
from training.model import FastVLM
from training.packing import Packer
from training.tokenizer import load_tokenizer, train_tokenizer

STAGES = ("tower", "decoder", "projector", "all", "language", "again", "sizes")
MINUTES = {"tower": 18.0, "decoder": 3.0, "projector": 1.5, "all": 26.0, "language": 20.0, "again": 9.0, "sizes": 30.0}
PEAK_LR = {
    "tower": 3e-3,
    "decoder": 2e-3,
    "projector": 2e-3,
    "all": 1.5e-3,
    "language": 2e-3,
    "again": 6e-4,
    "sizes": 5e-4,
}
TOWER_LR_FACTOR = 0.5
# Shares of scenes, text pictures and easy-VQA; reading is the slowest to learn.
MIXTURE = {stage: (0.40, 0.38, 0.22) for stage in ("tower", "decoder", "projector")} | {
    "all": (0.40, 0.46, 0.14),
    "language": (0.45, 0.25, 0.30),
    "again": (0.42, 0.30, 0.28),
    "sizes": (0.46, 0.30, 0.24),
}
# View → share of the steps of `sizes`; the other stages show all pictures as drawn.
VIEWS = {
    AS_DRAWN: 0.30,
    View(192): 0.18,
    View(128): 0.18,
    View(aspect=(1.0, 0.75)): 0.10,
    View(aspect=(0.75, 1.0)): 0.10,
    View(aspect=(1.0, 0.75), padded=False): 0.07,
    View(aspect=(0.75, 1.0), padded=False): 0.07,
}
WARMUP = 0.05
FROZEN_NORM_TAIL = 0.2
WEIGHT_DECAY = 0.05
DENSE_WEIGHT = 0.3
BATCH = {"tower": 20, "decoder": 20, "projector": 20, "all": 10, "language": 24, "again": 10, "sizes": 10}
STORED_PICTURES = 40_000
REPORT_EVERY, SAVE_EVERY = 50, 400
SEED = 20251121


class Run:
    """The networks of a run, their checkpoint and their place in the endless data."""

    def __init__(self, folder: Path, rank: int, world: int):
        torch.manual_seed(SEED)
        self.folder, self.rank, self.world = folder, rank, world
        tokenizer = load_tokenizer(folder / "hub")
        self.vocab_size = tokenizer.get_vocab_size()
        config = model_config(self.vocab_size)
        vision = config["vision_config"]
        side = vision["image_size"] // vision["patch_size"]
        self.model = FastVLM(config)
        self.model.tower.to(memory_format=torch.channels_last)
        self.heads = DenseHeads(vision["embed_dims"][2], config["mm_hidden_size"], side)
        self.packer = Packer(tokenizer, side**2)
        self.data = TrainingData()
        self.samples_seen = 0

    def next_view(self, stage: str) -> View:
        """How the next batch is shown: the same in all processes."""
        if stage != "sizes":
            return AS_DRAWN
        return random.Random(f"view {self.samples_seen}").choices(list(VIEWS), list(VIEWS.values()))[0]

    def next_samples(self, stage: str, view: View = AS_DRAWN) -> list:
        """This process's share of the next batch."""
        first = self.samples_seen + self.rank
        self.samples_seen += BATCH[stage] * self.world
        indices = range(first, self.samples_seen, self.world)
        return [self.data.sample(index, MIXTURE[stage], view) for index in indices]

    def save(self, **state) -> None:
        parallel.average_batch_norms(self.model.tower)
        if self.rank:
            return
        checkpoint = {"model": self.model.state_dict(), "heads": self.heads.state_dict()}
        checkpoint |= {"samples_seen": self.samples_seen, **state}
        temporary = self.folder / "checkpoint.tmp"
        torch.save(checkpoint, temporary)
        temporary.replace(self.folder / "checkpoint.pt")
        export(self.model, self.folder / "hub", self.vocab_size)

    def load(self) -> dict:
        """Restore the last checkpoint, if any; returns it, for the stage's own state."""
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return {}
        checkpoint = torch.load(path, weights_only=True)
        self.model.load_state_dict(checkpoint["model"])
        self.heads.load_state_dict(checkpoint["heads"])
        self.samples_seen = checkpoint["samples_seen"]
        return checkpoint


def learning_rate_factor(progress: float) -> float:
    """Linear warm-up, then cosine to 1% of the peak; progress in [0, 1]."""
    if progress < WARMUP:
        return (progress + 1e-3) / WARMUP
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))


def parameter_groups(run: Run, stage: str) -> list[dict]:
    """What a stage trains; matrices and filters decay, everything one-dimensional does not."""
    model = run.model
    everything = [(model.tower, TOWER_LR_FACTOR), (run.heads, 1.0), (model.mm_projector, 1.0), (model.decoder, 1.0)]
    parts = {
        "tower": [(model.tower, 1.0), (run.heads, 1.0)],
        "decoder": [(model.decoder, 1.0)],
        "projector": [(model.mm_projector, 1.0)],
        "all": everything,
        "language": [(model.mm_projector, 1.0), (model.decoder, 1.0)],
        "again": everything,
        "sizes": everything,
    }[stage]
    groups = []
    for part, factor in parts:
        decayed = [p for p in part.parameters() if p.squeeze().ndim > 1]
        plain = [p for p in part.parameters() if p.squeeze().ndim <= 1]
        groups.append({"params": decayed, "weight_decay": WEIGHT_DECAY, "factor": factor})
        groups.append({"params": plain, "weight_decay": 0.0, "factor": factor})
    return groups


def tower_loss(run: Run, samples: list) -> tuple[torch.Tensor, dict]:
    pixels, labels, _ = collate(samples)
    logits = run.heads(*run.model.tower.forward_maps(to_pixel_values(pixels)))
    loss = dense_loss(logits, labels)
    return loss, {"dense": dense_accuracy(logits, labels)}


def decoder_loss(run: Run, samples: list) -> tuple[torch.Tensor, dict]:
    packed = run.packer.pack([sample.dialogue for sample in samples], [sample.caption for sample in samples])
    return run.model.answer_loss(packed, None), {}


def answer_loss(run: Run, samples: list, train_tower: bool, dense: bool = True) -> tuple[torch.Tensor, dict]:
    """The answers', and the dense labels' if the tower is trained and they are wanted."""
    pixels, labels, conversations = collate(samples)
    with torch.set_grad_enabled(train_tower):
        middle, features = run.model.tower.forward_maps(to_pixel_values(pixels))
    rows = run.model.encode_images(features)
    answers = run.model.answer_loss(run.packer.pack(conversations, num_image_tokens=rows.shape[1]), rows)
    if not (train_tower and dense):
        return answers, {}
    logits = run.heads(middle, features)
    extra = {"answer_loss": answers.item(), "dense": dense_accuracy(logits, labels)}
    return answers + DENSE_WEIGHT * dense_loss(logits, labels), extra


class PictureStore:
    """What the frozen tower makes of a process's share of STORED_PICTURES, and what can be asked about each."""

    def __init__(self, run: Run, stage: str):
        features: list[torch.Tensor] = []
        self.asks: list[Callable[[random.Random], Dialogue]] = []
        self.rng = random.Random(SEED + run.rank)
        run.model.tower.eval()
        while len(self.asks) < STORED_PICTURES // run.world:
            samples = run.next_samples(stage)
            with torch.no_grad():
                features.append(run.model.tower.forward_maps(to_pixel_values(collate(samples)[0]))[1].contiguous())
            self.asks += [sample.ask for sample in samples]
        self.features = torch.cat(features)

    def batch(self, size: int) -> tuple[torch.Tensor, list[Dialogue]]:
        """(size, C, H, W) features of random pictures, and fresh questions about each."""
        chosen = self.rng.sample(range(len(self.asks)), size)
        return self.features[chosen], [self.asks[i](self.rng) for i in chosen]


def language_loss(run: Run, store: PictureStore) -> tuple[torch.Tensor, dict]:
    features, conversations = store.batch(BATCH["language"])
    return run.model.answer_loss(run.packer.pack(conversations), run.model.encode_images(features)), {}


def stage_loss(run: Run, stage: str) -> tuple[torch.Tensor, dict]:
    """On the next batch, with what to report beside it."""
    view = run.next_view(stage)
    samples = run.next_samples(stage, view)
    if stage == "tower":
        return tower_loss(run, samples)
    if stage == "decoder":
        return decoder_loss(run, samples)
    return answer_loss(run, samples, train_tower=stage != "projector", dense=view.has_labels)


def run_stage(run: Run, stage: str, minutes: float, state: dict | None) -> None:
    """Train one stage for its budget, reporting and saving on the way; `state` is its checkpoint if it was cut off."""
    store = PictureStore(run, stage) if stage == "language" else None
    optimizer = torch.optim.AdamW(parameter_groups(run, stage), lr=0.0, betas=(0.9, 0.98))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spent, step = 0.0, 0
    if state:
        optimizer.load_state_dict(state["optimizer"])
        spent, step = state["spent"], state["step"]
    run.model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    run.model.train()
    started = time.perf_counter() - spent
    clock, total_loss, dense = time.perf_counter(), 0.0, {}
    progress = torch.zeros(1)
    while True:
        progress[0] = (time.perf_counter() - started) / (60 * minutes)
        parallel.average_([progress])
        if progress >= 1:
            break
        if stage in ("projector", "language", "sizes") or (
            stage in ("all", "again") and progress > 1 - FROZEN_NORM_TAIL
        ):
            run.model.tower.eval()
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR[stage] * group["factor"] * learning_rate_factor(progress.item())
        loss, extra = language_loss(run, store) if store else stage_loss(run, stage)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        total_loss += loss.item()
        for name, (right, known) in extra.get("dense", {}).items():
            before = dense.get(name, (0, 0))
            dense[name] = (before[0] + right, before[1] + known)
        if step % REPORT_EVERY == 0:
            now = time.perf_counter()
            line = {"stage": stage, "step": step, "seconds": round(now - started, 1), "samples": run.samples_seen}
            line["loss"] = round(total_loss / REPORT_EVERY, 4)
            if "answer_loss" in extra:
                line["answer_loss"] = round(extra["answer_loss"], 4)
            line["images_per_second"] = round(REPORT_EVERY * BATCH[stage] * run.world / (now - clock), 1)
            line["dense_accuracy"] = {name: round(r / max(1, k), 4) for name, (r, k) in dense.items()}
            clock, total_loss, dense = now, 0.0, {}
            if run.rank == 0:
                print(json.dumps(line), flush=True)
                with (run.folder / "log.jsonl").open("a") as log:
                    log.write(json.dumps(line) + "\n")
        if step % SAVE_EVERY == 0:
            spent = time.perf_counter() - started
            run.save(stage=stage, optimizer=optimizer.state_dict(), spent=spent, step=step)
    run.save(stage=f"{stage} done")


def work(rank: int, world: int, folder: Path, stages: list[str], minutes: dict[str, float]) -> None:
    run = Run(folder, rank, world)
    state = run.load()
    for stage in stages:
        run_stage(run, stage, minutes[stage], state if state.get("stage") == stage else None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="run folder: checkpoint.pt, log.jsonl and hub/")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="what to run, in order")
    parser.add_argument("--processes", type=int, default=2, help="data-parallel processes, one thread each")
    for stage in STAGES:
        parser.add_argument(f"--{stage}-minutes", type=float, default=MINUTES[stage], help="default: %(default)s")
    args = parser.parse_args()
    if not (args.work / "hub" / "vocab.json").exists():
        train_tokenizer(grammar_corpus(), args.work / "hub")
    minutes = {stage: getattr(args, f"{stage}_minutes") for stage in STAGES}
    parallel.launch(work, args.processes, args.work, args.stages, minutes)


if __name__ == "__main__":
    main()

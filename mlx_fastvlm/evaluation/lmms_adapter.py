"""Our models in lmms-eval, the harness of EvolvingLMMs-Lab with its hundreds of tasks:

lmms-eval --model mlx_fastvlm --model_args pretrained=./fastvlm-0.5b,resolution=768 --tasks textvqa_val
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.answering import DEFAULT_BATCH_SIZE, Prompt, answer_prompts
from mlx_fastvlm.image_decoding import ImageSource
from mlx_fastvlm.loading import DEFAULT_MODEL, load
from mlx_fastvlm.options import GenerationOptions


class MlxFastVlm(lmms):
    """A model to be asked by lmms-eval's tasks that generate answers about pictures.

    Args:
        pretrained: whatever `load` takes.
        dtype, revision: see `load`.
        resolution, fit, system: see `GenerationOptions`.
        batch_size: answers that begin together; more take more memory.
        max_batch_size, device: given by the harness; MLX itself chooses the device.
    """

    def __init__(
        self,
        pretrained: str = DEFAULT_MODEL,
        dtype: str | None = None,
        revision: str | None = None,
        resolution: int | None = None,
        fit: str | None = None,
        system: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        self._model, self._processor = load(pretrained, dtype, revision)
        self._given = {"resolution": resolution, "fit": fit, "system": system}
        self._batch_size = DEFAULT_BATCH_SIZE if batch_size == "auto" else int(batch_size)

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answer to each request, in order."""
        prompts = (self._prompt(request) for request in requests)
        replies = answer_prompts(self._model, self._processor, prompts, self._batch_size)
        return [
            GenerationResult(reply.text, TokenCounts(output_tokens=reply.tokens))
            for reply in tqdm(replies, total=len(requests), desc="mlx_fastvlm", disable=self.rank != 0)
        ]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not to be had. Raises NotImplementedError."""
        raise NotImplementedError("mlx_fastvlm answers tasks of output_type generate_until only.")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not to be had. Raises NotImplementedError."""
        raise NotImplementedError("mlx_fastvlm answers tasks of output_type generate_until only.")

    def _prompt(self, request: Instance) -> Prompt:
        text, generation, doc_to_visual, doc_id, task, split = request.args
        name = f"{task}, document {doc_id}"
        images = list(_pictures(doc_to_visual(self.task_dict[task][split][doc_id]), name))
        return Prompt(name, text, images, GenerationOptions(**_options(generation), **self._given))


def _pictures(visuals: Sequence[Any] | None, name: str) -> Iterator[ImageSource]:
    """What a task shows. Raises OptionError for what is no PIL image."""
    for visual in visuals or ():
        if not hasattr(visual, "convert"):
            raise OptionError(f"{name} shows {type(visual).__name__}; FastVLM takes pictures only.")
        yield visual


def _options(generation: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation_kwargs as options of `generate`; what they lack has lmms-eval's usual defaults."""
    until = generation.get("until") or ()
    temperature = generation.get("temperature") or 0.0
    return {
        "max_tokens": generation.get("max_new_tokens", 1024),
        "temp": temperature if generation.get("do_sample", temperature > 0) else 0.0,
        "top_p": generation.get("top_p") or 1.0,
        "stop": [until] if isinstance(until, str) else list(until),
    }

"""All tasks by name. A new one is a `Task` in the file of its measure, and a line here."""

from __future__ import annotations

from mlx_fastvlm.errors import OptionError
from mlx_fastvlm.evaluation.anls import DOCVQA, INFOVQA
from mlx_fastvlm.evaluation.chartqa import CHARTQA
from mlx_fastvlm.evaluation.exact_match import EASY_VQA, GQA
from mlx_fastvlm.evaluation.ocrbench import OCRBENCH
from mlx_fastvlm.evaluation.pope import POPE
from mlx_fastvlm.evaluation.scienceqa import SCIENCEQA
from mlx_fastvlm.evaluation.task import Task
from mlx_fastvlm.evaluation.vqa_accuracy import TEXTVQA, VQAV2

TASKS = {
    task.name: task for task in (VQAV2, TEXTVQA, DOCVQA, INFOVQA, CHARTQA, GQA, SCIENCEQA, OCRBENCH, POPE, EASY_VQA)
}


def find_task(name: str) -> Task:
    """Raises OptionError if there is none of that name."""
    if name not in TASKS:
        raise OptionError(f"There is no task {name}; choose of {', '.join(TASKS)}.")
    return TASKS[name]

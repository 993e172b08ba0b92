"""What an answer cost, as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_fastvlm.answer import GenerationResponse


def statistics(last: GenerationResponse) -> str:
    """Times by stage, tokens and rates of an answer, a line each.

    Args:
        last: its last response.
    """
    stages = ", ".join(f"{stage} {seconds * 1e3:.1f}" for stage, seconds in last.timings.items())
    reused = f", {last.cached_tokens} of them known from before" if last.cached_tokens else ""
    return (
        f"Time to first token: {last.ttft * 1e3:.1f} ms ({stages})\n"
        f"Prompt: {last.prompt_tokens} tokens{reused}, {last.prompt_tps:.1f} tok/s\n"
        f"Answer: {last.generation_tokens} tokens, {last.generation_tps:.1f} tok/s ({last.finish_reason or 'stopped'})\n"
        f"Peak memory: {last.peak_memory:.3f} GB"
    )

"""Benchmarks: where the time to the first token goes, against peers in the same run.

Those that users run are commands of `mlx-fastvlm bench`, listed here; each is the module of its name. The others are run
as `python -m mlx_fastvlm.benchmarks.NAME`. Importing this package costs nothing: what computes is in the modules.
"""

COMMANDS = {
    "ttft": "Time to first token by stage, decoding speed, memory.",
    "peers": "Against mlx-vlm and PyTorch, in turns.",
    "headline": "The paper's comparison with LLaVA-OneVision-0.5B.",
    "second-question": "A second question about a picture, beside the first.",
    "captioning": "Pictures per second: batches, a loop, mlx-vlm.",
    "caption-memory": "Memory while thousands of pictures are captioned.",
    "serving": "What a server adds, and what many clients get together.",
    "resolution": "Sizes and shapes of pictures: tokens and time.",
    "video": "Frames described per second, dropped ones, memory.",
    "kernels": "Each fused op against the plain ops.",
    "roofline": "Predicted times on Apple's chips: a model.",
    "cold-start": "From a process's start to its first character.",
}

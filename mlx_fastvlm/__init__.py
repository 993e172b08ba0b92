"""mlx-fastvlm: Apple's FastVLM on MLX.

from mlx_fastvlm import load, generate
model, processor = load("demo")
print(generate(model, processor, "Describe this image.", image="img.png"))
"""

from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.generate import GenerationResponse, generate, generate_step, stream_generate
from mlx_fastvlm.loading import load

__version__ = "0.1.0"

__all__ = ["FastVLMError", "GenerationResponse", "generate", "generate_step", "load", "stream_generate"]

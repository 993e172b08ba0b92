"""mlx-fastvlm: Apple's FastVLM on MLX.

from mlx_fastvlm import load, generate
model, processor = load("demo")
print(generate(model, processor, "Describe this image.", image="img.png"))
"""

from mlx_fastvlm.answer import GenerationResponse
from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.captions.captioning import Caption, caption_images
from mlx_fastvlm.conversation import Conversation
from mlx_fastvlm.embedding import Embedding, embed_images
from mlx_fastvlm.errors import FastVLMError
from mlx_fastvlm.generate import generate, generate_step, stream_generate
from mlx_fastvlm.loading import load
from mlx_fastvlm.options import GenerationOptions
from mlx_fastvlm.reuse import Reuse

__version__ = "0.1.0"

__all__ = [
    "BatchGenerator",
    "Caption",
    "Conversation",
    "Embedding",
    "FastVLMError",
    "GenerationOptions",
    "GenerationResponse",
    "Reuse",
    "caption_images",
    "embed_images",
    "generate",
    "generate_step",
    "load",
    "stream_generate",
]

"""What lmms-eval loads at its start, by the entry point "lmms_eval.models" in pyproject.toml: where our model class is.

Light: it is loaded with every start of lmms-eval, whatever model is asked.
"""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest("mlx_fastvlm", simple_class_path="mlx_fastvlm.evaluation.lmms_adapter.MlxFastVlm")

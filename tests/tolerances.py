"""How far a result may be from its reference: largest difference over the reference's largest value.

float32 is measured (1e-6 on the tiny model, 2e-6 at full depth) with room for another BLAS's order of summation;
float16 and bfloat16 have 11 and 8 bits, and their rounding adds up over 44 blocks.
"""

import numpy as np

FEATURES = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}
KERNELS = {"float32": 3e-6}  # one fused op against plain ops
LOGITS = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}


def relative_error(found, wanted) -> float:
    """max |found − wanted| / max |wanted|; NaN if either has one."""
    found, wanted = np.asarray(found, np.float32), np.asarray(wanted, np.float32)
    assert found.shape == wanted.shape, f"shapes differ: {found.shape} and {wanted.shape}"
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())

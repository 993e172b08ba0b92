"""Every kernel body as CUDA: compiled by NVRTC with the dialect header, in every type. Needs no GPU; nothing is run."""

import mlx.core as mx
import pytest

from mlx_fastvlm.kernels.catalog import FUSED_OPS
from tests.cuda_twin import available, compiled_for_cuda
from tests.kernel_shapes import CASES

pytestmark = pytest.mark.skipif(available() is not None, reason=available() or "")

ON_CUDA = [op for op in FUSED_OPS if op.cuda is not None]
DTYPES = [mx.float32, mx.float16, mx.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("mlx.core."))
@pytest.mark.parametrize("op", ON_CUDA, ids=lambda op: op.name)
def test_a_kernel_compiles_as_cuda(op, dtype):
    kinds = {}  # one case for every set of template arguments that the shapes lead to
    for case in CASES:
        if case.op == op.name and "tiny" not in case.label:
            kinds.setdefault(tuple(sorted(case.options.items())), case)
    with compiled_for_cuda() as session:
        for case in kinds.values():
            case.fused(*case.arrays(dtype), where="cuda")
    assert len(session.launches) >= len(kinds)
    assert all(launch.ptx for launch in session.launches)

"""The CUDA side of the kernels compiles: NVRTC, the project's own dialect header, every dtype. Needs no GPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_fastvlm.kernels.cuda_dialect import CUDA_DIALECT
from tests.cuda_twin import CudaCompileError, available, compiled_for_cuda

pytestmark = pytest.mark.skipif(available() is not None, reason=str(available()))

BODY = """
    threadgroup float partial[32];
    const int D = x_shape[1];
    const int row = threadgroup_position_in_grid.y;
    float sum = 0;
    for (int i = thread_index_in_threadgroup; i < D; i += NT) sum += float(x[row * D + i]) * scale[0];
    sum = simd_sum(sum);
    if (thread_index_in_simdgroup == 0) partial[simdgroup_index_in_threadgroup] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    sum = simd_sum(thread_index_in_simdgroup < NT / 32 ? partial[thread_index_in_simdgroup] : 0.0f);
    if (thread_index_in_threadgroup == 0) out[row] = T(SQUARE ? sum * sum : sum);
"""


def row_sums(body: str = BODY, dtype: mx.Dtype = mx.float16, threads: int = 128):
    kernel = mx.fast.cuda_kernel(
        name="row_sums", input_names=["x", "scale"], output_names=["out"], source=body, header=CUDA_DIALECT
    )
    return kernel(
        inputs=[mx.zeros((4, 300), dtype), mx.array([0.5])],
        template=[("T", dtype), ("NT", threads), ("SQUARE", True)],
        grid=(threads, 4, 1),
        threadgroup=(threads, 1, 1),
        output_shapes=[(4,)],
        output_dtypes=[dtype],
    )


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
def test_a_metal_body_compiles_as_cuda(dtype):
    with compiled_for_cuda() as session:
        (out,) = row_sums(dtype=dtype)
    assert out.shape == (4,)
    assert out.dtype == dtype
    (launch,) = session.launches
    assert launch.ptx.count("bar.sync") == 1
    assert launch.ptx.count("shfl.sync.bfly") == 10, "two simdgroup sums of five steps each"
    assert "bool SQUARE = true" in launch.source
    assert "x_strides" not in launch.source, "only what the body names is passed"


def test_a_mistake_in_the_body_is_reported_with_its_line():
    with compiled_for_cuda(), pytest.raises(CudaCompileError, match=r'row_sums\(11\): error: .*"undeclared"'):
        row_sums(BODY.replace("sum * sum : sum", "undeclared : sum"))


def test_more_than_a_block_may_have_is_rejected():
    with compiled_for_cuda():
        with pytest.raises(CudaCompileError, match="too much shared data"):
            row_sums(BODY.replace("partial[32]", "partial[16384]"))
        with pytest.raises(CudaCompileError, match="CUDA allows 1024"):
            row_sums(threads=2048)


def test_mlx_is_left_as_it_was():
    before = mx.fast.cuda_kernel
    with compiled_for_cuda():
        assert mx.fast.cuda_kernel is not before
    assert mx.fast.cuda_kernel is before

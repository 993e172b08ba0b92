"""The Metal source of every kernel, compiled and executed on the CPU: right, and clean under the emulator's checker.

Nothing here has met an Apple GPU; see tests/metal_emulator for what the emulator finds and what it cannot.
"""

import mlx.core as mx
import pytest

from mlx_fastvlm.kernels.fused_op import ROUNDING, agrees, largest_error
from tests.kernel_shapes import CASES, case_name
from tests.metal_emulator import available, emulated

pytestmark = pytest.mark.skipif(available() is not None, reason=available() or "")

DTYPES = [mx.float32, mx.float16, mx.bfloat16]
# As large as results stay within half precision: SwiGLU multiplies two inputs, attention's scores do.
MAGNITUDES = {"swiglu": 20, "quantized_swiglu": 2, "self_attention": 8}
each_case = pytest.mark.parametrize("case", CASES, ids=case_name)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("mlx.core."))


def run(case, arrays, launch=None, **emulation):
    """The kernel's arrays and its reference's, and what the emulator found."""
    with emulated(**emulation) as session:
        found = case.fused(*arrays, launch=launch)
    return found, case.fused_op.reference(*arrays, **case.options), session


@each_dtype
@each_case
def test_a_kernel_equals_its_reference_and_is_clean_under_the_checker(case, dtype):
    found, wanted, session = run(case, case.arrays(dtype), mode="check")
    session.assert_clean()
    assert agrees(found, wanted)


@each_dtype
@each_case
def test_the_order_in_which_threads_run_changes_nothing(case, dtype):
    arrays = case.arrays(dtype, seed=1)
    forward, wanted, _ = run(case, arrays, mode="run")
    assert agrees(forward, wanted)
    for order in ("reversed", 7):
        other, _, session = run(case, arrays, mode="run", order=order)
        session.assert_clean()
        assert all(mx.array_equal(a, b) for a, b in zip(forward, other, strict=True))


@each_case
def test_every_launch_shape_that_tuning_may_choose_is_right(case):
    """On the arrays of its check before the first use too: what failed there would run on no machine."""
    arrays = case.arrays(mx.float16, seed=2)
    sample = case.fused_op.sample(*arrays, **case.options)
    for launch in case.fused_op.launches(*arrays, **case.options):
        for given in (arrays, sample):
            found, wanted, session = run(case, given, launch, mode="run")
            session.assert_clean()
            assert agrees(found, wanted), launch


@each_dtype
@each_case
def test_large_magnitudes_are_summed_in_float(case, dtype):
    """Against float32 arithmetic on the same numbers: an accumulator in half precision would lose digits or overflow."""
    x, *others = case.arrays(dtype, seed=3)
    arrays = (x * MAGNITUDES.get(case.op, 100), *others)
    found, _, session = run(case, arrays, mode="run")
    session.assert_clean()
    exact = (array.astype(mx.float32) if array.dtype in DTYPES else array for array in arrays)
    wanted = case.fused_op.reference(*exact, **case.options)
    # Attention's scores grow with the square of the magnitude, and exp makes their absolute rounding a relative one.
    limit = 2e-4 if case.op == "self_attention" and dtype == mx.float32 else ROUNDING[dtype]
    assert all(largest_error(a, b) < limit for a, b in zip(found, wanted, strict=True))


@each_dtype
@each_case
def test_address_spaces_and_language_are_metals(case, dtype):
    run(case, case.arrays(dtype), mode="as")[2].assert_clean()

"""How work on a Linux CPU is shared: small products stay on one core, OpenBLAS's threads rest where they would only wait."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mlx_fastvlm import blas
from mlx_fastvlm.batch_generate import BatchGenerator
from mlx_fastvlm.kernels import cpu
from mlx_fastvlm.kernels.linear import linear_rows
from mlx_fastvlm.kernels.swiglu_feed_forward import _swiglu_rows
from mlx_fastvlm.options import GenerationOptions


@pytest.fixture(scope="module")
def openblas():
    if blas.use_openblas() != "openblas":
        pytest.skip("no OpenBLAS here")
    return blas.openblas()


@pytest.fixture
def loops():
    if why := cpu.missing():
        pytest.skip(why)


@pytest.fixture
def two_threads(openblas):
    before = openblas.scipy_openblas_get_num_threads()
    openblas.scipy_openblas_set_num_threads(2)
    yield openblas.scipy_openblas_get_num_threads
    openblas.scipy_openblas_set_num_threads(before)


def test_one_thread_lasts_until_the_last_of_its_users_leaves(two_threads):
    with blas.one_thread():
        with blas.one_thread():
            assert two_threads() == 1
        assert two_threads() == 1
    assert two_threads() == 2


def test_users_in_several_threads_do_not_disturb_each_other(two_threads):
    entered, leave = threading.Barrier(3), [threading.Event(), threading.Event()]

    def use(number):
        with blas.one_thread():
            entered.wait(10)
            leave[number].wait(10)

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(use, number) for number in range(2))
        entered.wait(10)
        leave[0].set()
        first.result()
        assert two_threads() == 1
        leave[1].set()
        second.result()
    assert two_threads() == 2


def test_a_small_model_s_batches_are_decoded_with_one_thread_in_blas(two_threads, tiny, monkeypatch):
    seen = []
    decode = BatchGenerator._decode
    monkeypatch.setattr(BatchGenerator, "_decode", lambda self: seen.append(two_threads()) or decode(self))
    generator = BatchGenerator(*tiny)
    generator.add("Hello", options=GenerationOptions(max_tokens=3))
    while generator.waiting or generator.decoding:
        generator.step()
    assert seen and set(seen) == {1} and two_threads() == 2


def test_without_openblas_nothing_happens(monkeypatch):
    monkeypatch.setattr(blas, "openblas", lambda: None)
    with blas.one_thread():
        pass


@pytest.mark.parametrize("bits", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_few_rows_are_multiplied_as_many_are(rows, bits, loops):
    random = np.random.default_rng(rows)
    wide = random.standard_normal((2500, 130), dtype=np.float32)
    stored, bias = wide, random.standard_normal(2500, dtype=np.float32)
    if bits == "bfloat16":
        stored = (wide.view(np.uint32) >> 16).astype(np.uint16)
        wide = (stored.astype(np.uint32) << 16).view(np.float32)
    x, out = random.standard_normal((rows, 130), dtype=np.float32), np.empty((rows, 2500), np.float32)
    for share in (2**22, 0):  # on this core, and on all
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu, "_UNSHARED_WORK", share)
            out.fill(np.nan)
            linear_rows(x, stored, bias, out)
        np.testing.assert_allclose(out, x @ wide.T + bias, atol=2e-4)


@pytest.mark.parametrize("rows", [1, 2, 16, 17])
def test_the_feed_forward_of_few_rows_is_that_of_many(rows, loops):
    random = np.random.default_rng(rows)
    gate_up, down = (random.standard_normal(shape, dtype=np.float32) * 0.1 for shape in ((600, 130), (130, 300)))
    x, out = random.standard_normal((rows, 130), dtype=np.float32), np.empty((rows, 130), np.float32)
    _swiglu_rows(x, gate_up, down, out)
    gate, up = np.split(x @ gate_up.T, 2, axis=-1)
    np.testing.assert_allclose(out, (gate / (1 + np.exp(-gate)) * up) @ down.T, atol=2e-4)


def test_little_work_stays_where_it_is_and_much_is_shared(monkeypatch):
    monkeypatch.setattr(cpu, "_cores", lambda: 2)
    for work, parts in ((1000, [(0, 64)]), (2**30, [(0, 32), (32, 64)])):
        done = []
        cpu.in_blocks(lambda start, stop, done=done: done.append((start, stop)), 64, 64, work=work)
        assert sorted(done) == parts

"""Arrays that kernels derive from a weight: made once, with a value, and dropped with it."""

import gc
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx

from mlx_fastvlm.kernels.derived import once_per_array


class Doubled:
    """Twice an array, counting how often that was computed."""

    def __init__(self):
        self.made = 0
        self.of = once_per_array(self._double)

    def _double(self, array):
        self.made += 1
        return array * 2


def test_it_is_made_once_for_each_array():
    doubled, a, b = Doubled(), mx.array([1.0]), mx.array([2.0])
    assert [doubled.of(array).item() for array in (a, b, a, b)] == [2, 4, 2, 4]
    assert doubled.made == 2


def test_threads_share_it():
    made = []

    @once_per_array
    def slow(array):
        time.sleep(0.02)
        made.append(array * 2)
        return made[-1]

    weight = mx.array([3.0])
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: slow(weight), range(8)))
    assert len(made) == 1 and all(array is made[0] for array in found)


def test_it_goes_with_its_array():
    doubled = Doubled()
    for value in range(20):  # new arrays take the places, and the ids, of dead ones
        array = mx.array([float(value)])
        assert doubled.of(array).item() == 2 * value
        del array
        gc.collect()
    assert doubled.made == 20


def test_a_compiled_function_finds_its_value_instead_of_computing_it_every_time(tmp_path):
    doubled, weight = Doubled(), mx.array([3.0])
    function = mx.compile(lambda x: x + doubled.of(weight))
    assert function(mx.array([1.0])).item() == 7
    mx.export_to_dot(str(tmp_path / "graph.dot"), doubled.of(weight))
    assert "Multiply" not in (tmp_path / "graph.dot").read_text()
    assert doubled.made == 1


def test_arguments_of_a_compiled_function_have_no_value_to_keep():
    doubled = Doubled()
    function = mx.compile(doubled.of)
    assert [function(mx.array([value])).item() for value in (1.0, 5.0)] == [2, 10]


def test_gradients_pass():
    assert mx.grad(lambda x: Doubled().of(x).sum())(mx.array([1.0])).item() == 2

"""The cheapest cover: impossible ones, ties, and a search that runs out of time. Optima are held in test_shapes.py."""

import random

import numpy as np
import pytest

from converter.cover import cheapest_cover
from pruned_vllm.common.errors import InputError

FITS = np.array([[True, False, False], [True, True, False], [True, True, True]])  # each shape holds the smaller layers
COSTS = [10, 20, 30]


@pytest.mark.parametrize(
    ("limit", "weights", "chosen"),
    [
        (1, [1, 1, 1], [2, 2, 2]),
        (2, [1, 1, 1], [1, 1, 2]),
        (2, [5, 1, 1], [0, 2, 2]),  # the first layer stands for five
        (3, [1, 1, 1], [0, 1, 2]),
        (9, [1, 1, 1], [0, 1, 2]),
    ],
)
def test_small_covers(limit, weights, chosen):
    expected = sum(COSTS[shape] * weight for shape, weight in zip(chosen, weights, strict=True))
    found = cheapest_cover(FITS, COSTS, weights, limit)
    assert sum(COSTS[shape] * weight for shape, weight in zip(found, weights, strict=True)) == expected
    assert all(FITS[shape, layer] for layer, shape in enumerate(found)) and len(set(found)) <= limit


def test_impossible_covers():
    with pytest.raises(ValueError, match="no 1 of the 2 shapes cover all 2 layers"):
        cheapest_cover(np.eye(2, dtype=bool), [1, 1], [1, 1], 1)
    with pytest.raises(ValueError, match="no 2 of the 2 shapes cover all 3 layers"):
        cheapest_cover(FITS[:2], COSTS[:2], [1, 1, 1], 2)


def random_problem(seed: int, shapes: int = 300, layers: int = 40):
    chance = random.Random(seed)
    sizes = [(chance.randint(1, 99), chance.randint(1, 99)) for _ in range(shapes - 1)] + [(99, 99)]
    wanted = [(chance.randint(1, 99), chance.randint(1, 99)) for _ in range(layers)]
    fits = np.array([[height >= h and width >= w for h, w in wanted] for height, width in sizes])
    return fits, [height + width for height, width in sizes], [chance.randint(1, 3) for _ in wanted]


@pytest.mark.parametrize("seed", range(3))
def test_the_result_depends_on_the_arguments_alone(seed):
    fits, costs, weights = random_problem(seed)
    first = cheapest_cover(fits, costs, weights, 5)
    assert all(cheapest_cover(fits, costs, weights, 5) == first for _ in range(2))


def test_a_search_that_runs_out_of_time_says_so(caplog):
    """What was found until then counts, if anything was."""
    fits, costs, weights = random_problem(0, shapes=1500, layers=80)
    try:
        found = cheapest_cover(fits, costs, weights, 8, time_limit=0.5)
    except InputError as error:
        assert "0.5 seconds were not enough to find 8 shapes for 80 different layers" in str(error)
    else:
        assert all(fits[shape, layer] for layer, shape in enumerate(found)) and len(set(found)) <= 8
        assert "after 0.5 seconds the 8 shapes found are not proven to be the cheapest" in caplog.text

"""The cheapest cover of many layers by few shapes, as a mixed-integer program (the p-median problem)."""

import logging
from collections.abc import Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from pruned_vllm.common.errors import InputError

logger = logging.getLogger(__name__)

TIME_LIMIT = 120.0  # seconds; 80 layers of different shapes, the most that models have, take up to 40


def cheapest_cover(
    fits: np.ndarray, costs: Sequence[int], weights: Sequence[int], limit: int, time_limit: float = TIME_LIMIT
) -> list[int]:
    """Chooses a shape for every layer, at most `limit` different ones, with the lowest possible total.

    The result depends on the arguments alone, unless the time runs out: then the best cover found counts, and a warning
    says how much cheaper another could be at most.

    Args:
        fits: bool [shapes, layers]; whether the layer fits into the shape.
        costs: of one layer of each shape.
        weights: how many layers each column of `fits` stands for.
        time_limit: seconds.

    Returns:
        for each column of `fits` the index of its shape.

    Raises:
        ValueError: no `limit` shapes cover all layers.
        InputError: the time ran out before any cover was found.
    """
    # Variables: one for each shape, 1 if it is used; then one for each pair that fits, 1 if the layer gets the shape.
    shape_of, layer_of = np.nonzero(fits)
    shapes, layers, pairs = len(costs), fits.shape[1], len(shape_of)
    pair = np.arange(pairs)
    objective = np.concatenate([np.zeros(shapes), np.asarray(costs, float)[shape_of] * np.asarray(weights)[layer_of]])
    one_shape_each = coo_array((np.ones(pairs), (layer_of, shapes + pair)), (layers, shapes + pairs))
    only_used_shapes = coo_array(
        (np.repeat([1.0, -1.0], pairs), (np.tile(pair, 2), np.concatenate([shapes + pair, shape_of]))),
        (pairs, shapes + pairs),
    )
    few_shapes = np.concatenate([np.ones(shapes), np.zeros(pairs)])
    result = milp(
        objective / objective.max(),
        integrality=few_shapes,  # with whole numbers of shapes, each layer takes its cheapest anyway
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_shape_each.tocsr(), 1, 1),
            LinearConstraint(only_used_shapes.tocsr(), -np.inf, 0),
            LinearConstraint(few_shapes, 0, limit),
        ],
        options={"time_limit": time_limit, "mip_rel_gap": 0},
    )
    if result.status == 2:
        raise ValueError(f"no {limit} of the {shapes} shapes cover all {layers} layers")
    if result.x is None:
        raise InputError(
            f"{time_limit:g} seconds were not enough to find {limit} shapes for {layers} different layers; "
            "choose a larger --align, which leaves fewer, or no --max-distinct-shapes"
        )
    if result.status != 0:
        logger.warning(
            f"--max-distinct-shapes: after {time_limit:g} seconds the {limit} shapes found are not proven to be the "
            f"cheapest; others could save {result.mip_gap:.1%} of the bytes of the layers at most"
        )
    used = np.flatnonzero(result.x[:shapes] > 0.5)
    order = used[np.argsort(np.asarray(costs)[used], kind="stable")]
    return order[fits[order].argmax(axis=0)].tolist()

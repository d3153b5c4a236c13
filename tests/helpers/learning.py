"""Learning runs on tiny models, in this process."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from learner import cli
from learner.data.reading import BlockSampler
from learner.job import Job
from learner.methods.method import Task
from learner.model.budget import UnitBudget, make_budgets
from learner.model.units import Units
from learner.run.journal import Journal
from learner.targets import Target
from pruned_vllm.formats.geometry import ModelGeometry


def geometry_of(model) -> ModelGeometry:
    return ModelGeometry.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})


def unit_budget(units: Units, sparsity: float | Mapping[str, float]) -> UnitBudget:
    shares = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(units.layers, sparsity)
    return UnitBudget(Target("sparsity", max(shares.values())), units, shares)


def task_of(
    model,
    settings: Any = None,
    sparsity: float | Mapping[str, float] | list[float] = 0.5,
    *,
    tied: bool = False,
    seed: int = 0,
    tokens: torch.Tensor | None = None,
    journal: Journal | None = None,
    **targets: Any,
) -> Task:
    """What a method is given for `model`, with blocks of 32 random tokens unless `tokens` [N] say otherwise.

    Args:
        sparsity: a list for a budget each.
        targets: of a Job, in place of `sparsity`.
    """
    units = Units.from_geometry(geometry_of(model), tied)
    if tokens is None:
        tokens = torch.randint(256, (4000,), generator=torch.Generator().manual_seed(5))
    if isinstance(sparsity, list):
        targets["sparsity"] = sparsity
    if targets:
        budgets = make_budgets(Job("", "random", **targets), units, geometry_of(model), element_bytes=4)
    else:
        budgets = (unit_budget(units, sparsity),)
    model.requires_grad_(False)
    blocks = BlockSampler(tokens, 32, seed)
    return Task(model, units, budgets, settings, seed, blocks, journal or Journal(), Accelerator(cpu=True))


def run(*args) -> int:
    """The exit code of learn-masks with these arguments; agreement, which takes time, is measured if they say so."""
    given = [str(arg) for arg in args]
    return cli.main(given if "--agreement-prompts" in given else [*given, "--agreement-prompts", "0"])

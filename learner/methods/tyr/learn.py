"""Tyr-the-Pruner: a search over sparsities of all layers, pruned and solved anew at each, arXiv 2503.09657.

    learn-masks MODEL ckpt/ --method tyr --sparsity 0.5 --data text/*.txt

No gradients. Four iterations go from coarse to fine; each makes candidates of every sublayer from the dense weights
(supernet.py, pruning.py), at up to nine sparsities around those that the iteration before has
found, and searches for the best combination (search.py). Sparsities are 12.5 % of a sublayer's units apart
in the first iteration, and half as far in each that follows, but never less than one unit. Masks are 0 or 1; o_proj
and down_proj have other weights than the dense model.

Notable facts:
- In all genomes the number of units lost is exactly what was asked for, for each kind by itself; or where the budget is
  a cost, what is left costs that, and kinds compete (search.py).
- Memory: the dense model, calibration text and its hidden states lie in CPU memory. The device holds one block, its
  matrices H, and in the search the hidden states of a stage. Candidates take disk: at 50 % about four times the
  o_proj and down_proj of the model. They go when their iteration ends.
- A run that is resumed gives the same masks and weights as one that was never interrupted: candidates that are on disk
  are not made again, and what is drawn by lot depends on seed, iteration and generation alone.
- Several processes share the text when candidates are made, and the genomes when they are compared. Each holds the
  dense model in CPU memory, and all must see the directory of the candidates.
- `--iterations 0` is the paper's baseline: all layers alike, pruned as here.
"""

import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from random import Random
from typing import Any

import torch
from accelerate.utils import gather_object

from learner.methods.method import Learned, Task
from learner.methods.tyr.search import CostSpace, Space, divergences, draw, next_parent
from learner.methods.tyr.sublayers import Sublayer, sublayers_of
from learner.methods.tyr.supernet import Genome, Supernet
from learner.model.blockwise import Blockwise
from learner.model.budget import CostBudget, UnitBudget
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar

FIRST_INTERVAL = 0.125  # of a sublayer's units
FINEST = 3  # iterations after which a step is 1.6 % of a sublayer's units
REACH = 4  # candidates on either side of the centre


def learn(task: Task) -> Learned:
    """Prunes `task.model` in place; see learner/methods/method.py."""
    settings, sublayers = task.settings, sublayers_of(task.units)
    if task.text.sequence_length < 2:
        raise InputError("--sequence-length 1 leaves no token to predict, by which tyr could compare; use 2 or more")
    blockwise = Blockwise(task.model, task.accelerator.device)
    tokens = task.text.calibration(settings.calibration_sequences, task.accelerator.print)
    if len(tokens) < task.accelerator.num_processes:
        raise InputError(
            f"{len(tokens)} sequences are fewer than the {task.accelerator.num_processes} processes; give more text "
            "(--data), or raise --calibration-sequences"
        )
    accumulate, iterations = settings.error_accumulation == "expectation", max(1, settings.iterations)
    state = task.journal.restore() or _start(0, uniform(task, sublayers))
    task.journal.save(state)  # an interrupted run keeps its directory, and so the candidates, only if it has a state
    with ExitStack() as stack:
        directory = task.journal.directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        processes = task.accelerator
        for iteration in range(state["iteration"], iterations):
            candidates = directory / f"candidates-{iteration}"
            processes.wait_for_everyone()
            for other in set(directory.glob("candidates-*")) - {candidates} if processes.is_main_process else ():
                shutil.rmtree(other)
            centre, title = tuple(state["centre"]), f"tyr {iteration + 1}/{iterations}"
            space = _space(task, centre, sublayers, iteration)
            supernet = Supernet(candidates, blockwise, sublayers, space.levels, processes)
            supernet.build(tokens, accumulate, f"{title} candidates")
            if isinstance(task.budget, CostBudget):
                space = cost_space(space, supernet, task.budget)
                fitted = space.fitted(tuple(state["parent"]), Random(f"{task.seed} {iteration} centre"))
                state = {**state, "parent": list(fitted)}
            found = _search(task, tokens, supernet, space, state, title) if settings.iterations else state["parent"]
            if iteration + 1 < iterations:
                state = _start(iteration + 1, found)
                task.journal.save(state)
        return Learned(_install(task, supernet, tuple(found)))


def _start(iteration: int, centre: Genome) -> dict[str, Any]:
    """State at the beginning of an iteration."""
    return {"iteration": iteration, "generation": 0, "centre": list(centre), "parent": list(centre)}


def _space(task: Task, centre: Genome, sublayers: Sequence[Sublayer], iteration: int) -> Space:
    """The genomes of an iteration; without iterations those near enough to the centre to meet a cost, or it alone."""
    if task.settings.iterations:
        return space_around(centre, sublayers, iteration)
    has_cost = isinstance(task.budget, CostBudget)
    return space_around(centre, sublayers, FINEST if has_cost else 0, reach=REACH if has_cost else 0)


def cost_space(space: Space, supernet: Supernet, budget: CostBudget) -> CostSpace:
    """The same genomes with what their candidates cost; which KV heads a candidate keeps is known once it is made."""
    costs = [
        {count: budget.costs.of_row(sublayer.kind, sublayer.row, supernet.kept(index, count)) for count in levels}
        for index, (sublayer, levels) in enumerate(zip(supernet.sublayers, space.levels, strict=True))
    ]
    return CostSpace(space.kinds, space.intervals, space.levels, costs, budget.room)


def uniform(task: Task, sublayers: Sequence[Sublayer]) -> Genome:
    """The same share of every sublayer; where that is no whole number, some lose one unit more."""
    genome = {}
    for kind in task.units.layers:
        members = [index for index, sublayer in enumerate(sublayers) if sublayer.kind == kind]
        removed = round(task.units.count(kind) * (1 - task.budget.keep()))
        if isinstance(budget := task.budget, UnitBudget):
            removed = task.units.count(kind) - task.units.kept(kind, budget.sparsity[kind])
        for place, index in enumerate(members):
            genome[index] = (place + 1) * removed // len(members) - place * removed // len(members)
    return tuple(genome[index] for index in range(len(sublayers)))


def space_around(centre: Genome, sublayers: Sequence[Sublayer], iteration: int, reach: int = REACH) -> Space:
    """The genomes of an iteration, counted from 0, at most `reach` steps away from `centre` in each sublayer."""
    intervals = [max(1, round(sublayer.num_units * FIRST_INTERVAL / 2**iteration)) for sublayer in sublayers]
    steps = range(-reach, reach + 1)
    levels = [
        tuple(count + step * interval for step in steps if 0 <= count + step * interval <= sublayer.num_units)
        for count, interval, sublayer in zip(centre, intervals, sublayers, strict=True)
    ]
    return Space([sublayer.kind for sublayer in sublayers], intervals, levels)


def _search(
    task: Task, tokens: torch.Tensor, supernet: Supernet, space: Space, state: dict[str, Any], title: str
) -> Genome:
    """The best genome of an iteration, from `state` on."""
    settings, parent, before = task.settings, tuple(state["parent"]), state["iteration"] * task.settings.generations
    progress = progress_bar(
        range(state["generation"], settings.generations),
        desc=f"{title} search",
        unit="generation",
        initial=state["generation"],
        total=settings.generations,
        disable=not task.accelerator.is_main_process,
    )
    for generation in progress:
        random = Random(f"{task.seed} {state['iteration']} {generation}")
        offspring = space.offspring(parent, settings.offspring, random)

        def score(genomes: Sequence[Genome], number: int, random: Random = random) -> list[float]:
            share = genomes[task.accelerator.process_index :: task.accelerator.num_processes]
            found = divergences(supernet, share, draw(tokens, number, random)) if share else []
            return in_turn(gather_object([found]))

        parent, divergence = next_parent(parent, offspring, settings.selection_tokens, score)
        progress.set_postfix(divergence=f"{divergence:.4f}")
        figures = {"iteration": state["iteration"] + 1, "divergence": divergence}
        task.journal.log(before + generation + 1, figures)
        task.journal.save(state | {"generation": generation + 1, "parent": list(parent)})
    return parent


def in_turn(scores: Sequence[Sequence[float]]) -> list[float]:
    """Scores of genomes in their order, of what each process has scored: the first has the first, the next the next."""
    rounds = zip_longest(*scores)
    return [score for each_process in rounds for score in each_process if score is not None]


def _install(task: Task, supernet: Supernet, genome: Genome) -> dict[str, torch.Tensor]:
    """Writes the weights of a genome into the model; returns the masks of all units."""
    values = {kind: torch.ones(task.units.shape(kind)) for kind in task.units.layers}
    for index, (sublayer, count) in enumerate(zip(supernet.sublayers, genome, strict=True)):
        units = slice(sublayer.first_unit, sublayer.first_unit + sublayer.num_units)
        values[sublayer.kind][sublayer.row, units] = supernet.kept(index, count).float()
        sublayer.weight(task.model.model.layers[sublayer.layer]).copy_(supernet.weight(index, count))
    return values

"""When a method that learns by gradients approaches its budget, meets it, and lets the masks settle. Pure Python.

A run has a stage for each budget, one after the other, from the one that removes least to the one that removes most. A
stage takes the share of the steps that its budget takes of what is removed in all. In each

    learning  all units learn under the paper's penalty
    fading    masks fall to zero, of more units in every step, those of the smallest, until the budget is met
    settled   the units that stay are fixed; their masks learn on

The paper has learning alone: `settle` 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

RISE = 0.75  # of the steps in which masks fade: then as many do as shall go
FADED = 0.02  # what is left of the last of them in the steps after that


@dataclass(frozen=True)
class Moment:
    """A step of a run.

    Attributes:
        stage: number of the budget.
        step, steps: within the stage, and how many that has.
        progress: from 0 to 1 when units are fixed.
        share: of what the budget removes, how much is on its way out; None before masks fade.
        fading: what this step leaves of these masks; 0 in the last step before units are fixed.
        settling: None until they are; then from 0 to below 1 when the stage ends.
    """

    stage: int
    step: int
    steps: int
    progress: float
    share: float | None
    fading: float
    settling: float | None

    @property
    def is_settled(self) -> bool:
        return self.settling is not None

    @property
    def is_first(self) -> bool:
        return self.step == 0

    @property
    def is_last(self) -> bool:
        return self.step + 1 == self.steps


class Stages:
    """
    Args:
        steps: of the run.
        keeps: share of the units, or of their cost, that each budget leaves; falling.
        settle: the share of a stage in which masks fade, and then settle, half and half.
    """

    def __init__(self, steps: int, keeps: Sequence[float], settle: float) -> None:
        spare = steps - len(keeps)  # beyond one for each stage
        assert spare >= 0, "Job has refused fewer"
        removed = 1 - keeps[-1] or 1.0
        ends = [index + 1 + round(spare * (1 - keep) / removed) for index, keep in enumerate(keeps)]
        ends[-1] = steps  # where nothing is removed, too
        self._starts, self._ends, self._settle = [0, *ends[:-1]], ends, settle

    def at(self, step: int) -> Moment:
        """What a step of the run is."""
        stage = next(index for index, end in enumerate(self._ends) if step < end)
        start, steps = self._starts[stage], self._ends[stage] - self._starts[stage]
        step -= start
        half = round(steps * self._settle / 2)
        fixed = steps - half
        done = step - (fixed - half) + 1  # steps of fading, with this one
        is_fading, rise = 0 < done <= half, max(1, int(RISE * half))
        return Moment(
            stage=stage,
            step=step,
            steps=steps,
            progress=min(1.0, step / fixed),
            share=min(1.0, done / rise) if is_fading else None,
            fading=0.0 if done == half else FADED ** (1 / max(1, half - rise)),
            settling=(step - fixed) / half if step >= fixed else None,
        )


def warmup_cosine(moment: Moment, warmup_steps: int | None) -> float:
    """Factor of a learning rate: a linear warm-up, by default of a tenth of the steps, and a cosine decay to 0; once
    units are fixed the decay begins anew."""
    step, steps = moment.step, moment.steps
    warmup = steps // 10 if warmup_steps is None else warmup_steps
    if moment.settling is not None:
        return 0.5 * (1 + math.cos(math.pi * moment.settling))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

"""The search of Tyr-the-Pruner: which sublayer loses how much. An evolution that never leaves the budget.

A genome says how many units each sublayer has lost. Each generation has one parent. Its offspring differ by a few
shifts: one sublayer gets back as many units as another of the same kind loses, so that the number of units that are
lost is the same in all genomes. They are compared in stages, each with more text and fewer survivors; in the last one
the parent takes part, and the best is the next parent. What counts is the divergence from the dense model's logits
(arXiv 2503.09657, equation 6 with alpha = 0, as the paper's experiments have it).

Where the budget is a cost, which is ours, a shift goes between sublayers of any kind: one gets units back, others lose
some until the cost is met again, and what is then left over is given back (`CostSpace`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import torch

from learner.methods.tyr.supernet import Genome, Supernet

MOST_SHIFTS = 4
STAGES = ((64, 16), (8, 4), (1, 1))  # divisor of the text that is read, and how many genomes survive
TOP_LOGITS = 8192  # largest logits of the dense model that are compared


@dataclass(frozen=True)
class Space:
    """Which genomes there are.

    Attributes:
        kinds: of each sublayer; units are shifted between sublayers of the same kind.
        intervals: units that a shift moves, for each sublayer; the same for all of a kind.
        levels: for each sublayer, the numbers of units that it may have lost.
    """

    kinds: Sequence[str]
    intervals: Sequence[int]
    levels: Sequence[Sequence[int]]

    def mutate(self, genome: Genome, random: Random) -> Genome:
        """`genome` after one to four shifts, fewer rather than more; the same if none is possible."""
        genes = list(genome)
        for _ in range(min(random.randint(1, MOST_SHIFTS), random.randint(1, MOST_SHIFTS))):
            getting = [i for i in range(len(genes)) if genes[i] - self.intervals[i] in self.levels[i]]
            if not getting:
                break
            i = random.choice(getting)
            losing = [
                j
                for j in range(len(genes))
                if self.kinds[j] == self.kinds[i] and j != i and genes[j] + self.intervals[j] in self.levels[j]
            ]
            if losing:
                j = random.choice(losing)
                genes[i] -= self.intervals[i]
                genes[j] += self.intervals[j]
        return tuple(genes)

    def offspring(self, parent: Genome, number: int, random: Random) -> list[Genome]:
        """So many different children, or fewer in a small space."""
        children: dict[Genome, None] = {}
        for _ in range(10 * number):
            child = self.mutate(parent, random)
            if child != parent:
                children[child] = None
            if len(children) == number:
                break
        return list(children)


@dataclass(frozen=True)
class CostSpace(Space):
    """Which genomes there are where they must meet a cost.

    Attributes:
        costs: for each sublayer, by the number of units that it has lost, what the others cost.
        room: what they may cost together.
    """

    costs: Sequence[Mapping[int, float]]
    room: float

    def cost(self, genome: Sequence[int]) -> float:
        """Of all sublayers together."""
        return sum(costs[gene] for costs, gene in zip(self.costs, genome, strict=True))

    def fitted(self, genome: Genome, random: Random, spared: int | None = None) -> Genome:
        """`genome` with steps drawn by lot until its cost is met as nearly as levels allow, from below if possible.

        Args:
            spared: a sublayer that loses nothing.
        """
        genes = list(genome)
        while (excess := self.cost(genes) - self.room) > 0:
            losing = [j for j in range(len(genes)) if j != spared and self._change(genes, j, self.intervals[j])]
            if not losing:
                break
            j = random.choice(losing)
            genes[j] += self.intervals[j]
        while excess <= 0:
            left = self.room - self.cost(genes)
            getting = [i for i in range(len(genes)) if 0 < (self._change(genes, i, -self.intervals[i]) or 0) <= left]
            if not getting:
                break
            i = random.choice(getting)
            genes[i] -= self.intervals[i]
        return tuple(genes)

    def mutate(self, genome: Genome, random: Random) -> Genome:
        """`genome` after one to four shifts, fewer rather than more; the same where they do not meet the cost."""
        shifted = genome
        for _ in range(min(random.randint(1, MOST_SHIFTS), random.randint(1, MOST_SHIFTS))):
            getting = [i for i in range(len(genome)) if self._change(shifted, i, -self.intervals[i])]
            if not getting:
                break
            i = random.choice(getting)
            more = (*shifted[:i], shifted[i] - self.intervals[i], *shifted[i + 1 :])
            shifted = self.fitted(more, random, spared=i)
        return shifted if self.cost(shifted) <= self.room else genome

    def _change(self, genes: Sequence[int], index: int, step: int) -> float | None:
        """What the cost changes by where a sublayer loses `step` units more; None where there is no such candidate."""
        costs = self.costs[index]
        return costs[genes[index] + step] - costs[genes[index]] if genes[index] + step in costs else None


def next_parent(
    parent: Genome,
    offspring: Sequence[Genome],
    selection_tokens: int,
    score: Callable[[Sequence[Genome], int], Sequence[float]],
) -> tuple[Genome, float]:
    """The best of a generation and its score.

    Args:
        selection_tokens: tokens that the last stage reads.
        score: of genomes on about so many tokens; low is good, NaN is worst.
    """
    survivors, scores = list(offspring), []
    for divisor, number in STAGES:
        if divisor == 1:
            survivors.append(parent)
        elif len(survivors) <= number:
            continue
        scores = [math.inf if math.isnan(value) else value for value in score(survivors, selection_tokens // divisor)]
        best = sorted(range(len(survivors)), key=scores.__getitem__)[:number]
        survivors, scores = [survivors[i] for i in best], [scores[i] for i in best]
    return survivors[0], scores[0]


def draw(tokens: torch.Tensor, number: int, random: Random) -> torch.Tensor:
    """About so many of tokens [sequences, length]: whole sequences drawn by lot, or the beginning of one."""
    length = max(2, min(number, tokens.shape[1]))
    drawn = random.sample(range(len(tokens)), min(len(tokens), max(1, number // length)))
    return tokens[sorted(drawn), :length]


@torch.no_grad()
def divergences(supernet: Supernet, genomes: Sequence[Genome], tokens: torch.Tensor) -> list[float]:
    """KL(dense || pruned) of the next token for each genome, mean over `tokens` [sequences, length].

    Over the dense model's largest logits, after a softmax over these alone. All genomes go through a block before any
    goes through the next, so that each block is brought to the device once, and genomes that begin alike are one until
    they part. The dense model is the genome that has lost nothing.
    """
    blockwise = supernet.blockwise
    dense = (0,) * len(supernet.sublayers)
    # Hidden states by beginning of the genome.
    streams: dict[Genome, torch.Tensor] = {(): blockwise.embed(tokens).to(blockwise.device)}
    for layer in range(len(blockwise)):
        block, genes, grown, installed = blockwise.block(layer), supernet.genes(layer), {}, None
        for beginning in sorted({genome[: genes.stop] for genome in (dense, *genomes)}):
            supernet.install(layer, block, beginning[genes], installed)
            installed, hidden_states = beginning[genes], streams[beginning[: genes.start]]
            grown[beginning] = torch.empty_like(hidden_states)
            blockwise.run(layer, block, hidden_states, grown[beginning])
        streams = grown
    totals = [0.0] * len(genomes)
    for part in blockwise.slices(tokens):
        logits = blockwise.logits(streams[dense][part, :-1])
        top = logits.topk(min(TOP_LOGITS, logits.shape[-1]), sorted=False)
        teacher = top.values.float().log_softmax(-1)
        for i, genome in enumerate(genomes):
            student = blockwise.logits(streams[genome][part, :-1]).gather(-1, top.indices).float().log_softmax(-1)
            totals[i] += (teacher.exp() * (teacher - student)).sum().item()
    return [total / tokens[:, 1:].numel() for total in totals]

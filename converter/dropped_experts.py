"""Experts without channels go together with their rows of the router: convert-pruned --drop-empty-experts.

Without that option such an expert stays as one that adds zeros, which is what the masks say. To drop it changes
routing: a token that would be sent to it is sent to the next one that is left, so the result is not the masked model.

What it is held to is the masked model whose router gives the dropped experts minus infinity. So they are never chosen,
and the softmax over the others is that of the rows that are left. A softmax that still counted the dropped rows would
be another choice, but nobody who has the written files could compute it: those rows are gone. REAP does the same
(arXiv 2510.13999, `prune.py`: rows of the router are sliced, and nothing else is corrected).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from converter.source import Source, WeightChanges
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.experts import DenseExperts
from pruned_vllm.formats.masked import kept_layer

NOT_EXACT = "tokens are sent to others in their place, so this is not exactly the masked model"


@dataclass(frozen=True)
class DroppedExperts:
    """What was dropped.

    Attributes:
        source: the model before, with all experts under their numbers there.
        kept: for each layer the numbers of the experts that stay; empty in layers without experts.
    """

    source: Source
    kept: tuple[tuple[int, ...], ...]

    def dropped(self, index: int) -> tuple[int, ...]:
        """The numbers of the experts of a layer that are gone."""
        experts = range(len(self.source.layers[index].expert_intermediate_sizes))
        return tuple(expert for expert in experts if expert not in self.kept[index])

    @property
    def by_layer(self) -> dict[str, list[int]]:
        """`dropped`, for the layers that lost any, as config.json has it."""
        found = {str(index): list(self.dropped(index)) for index in range(len(self.kept))}
        return {index: experts for index, experts in found.items() if experts}

    def renumbered(self, index: int, chosen: torch.Tensor) -> torch.Tensor:
        """Numbers of experts that stay, of any shape, as those that they have afterwards."""
        places = torch.full((max(self.kept[index]) + 1,), -1)
        places[list(self.kept[index])] = torch.arange(len(self.kept[index]))
        return places[chosen]


def without_empty_experts(source: Source) -> tuple[Source, DroppedExperts | None]:
    """`source` without the experts of which masks and tensors leave no channel; None where there are none. Those that
    output a constant stay.

    The others are numbered anew. Routers have their rows still: `DroppedExperts.kept` says which to take.

    Raises:
        InputError: the model has no experts, or a layer would have fewer than its router chooses.
    """
    experts, family = source.dense.experts, source.dense.family
    if experts is None:
        raise InputError(f"--drop-empty-experts is for models with experts, and {family.architecture} has none")
    kept, problems = [], []
    for index, (layer, masks) in enumerate(zip(source.layers, source.masks, strict=True)):
        widths = kept_layer(layer, masks).expert_intermediate_sizes
        kept.append(tuple(e for e, width in enumerate(widths) if width or e in layer.constant_experts))
        if widths and len(kept[index]) < experts.num_experts_per_tok:
            problems.append(
                f"layer {index}: {len(kept[index])} of {len(widths)} experts have channels left, but the router "
                f"chooses {experts.num_experts_per_tok} for each token (num_experts_per_tok)"
            )
        elif problem := _group_problem(experts, len(widths), kept[index]):
            problems.append(f"layer {index}: {problem}")
    if problems:
        raise InputError(
            "--drop-empty-experts would leave layers whose routers cannot choose. Convert without it, so that empty "
            "experts stay and add zeros, or remove others:",
            problems,
        )
    dropped = DroppedExperts(source, tuple(kept))
    if dropped.by_layer:
        return _reduced(dropped), dropped
    note = "No expert lost all its channels: --drop-empty-experts changes nothing."
    return replace(source, notes=(*source.notes, note)), None


def _group_problem(experts: DenseExperts, count: int, kept: Sequence[int]) -> str | None:
    """Why these of `count` experts cannot stay alone, where a token's experts are from the best groups of them."""
    groups = experts.num_expert_group
    if groups == 1 or len(kept) == count:
        return None
    sizes = [sum(expert * groups // count == group for expert in kept) for group in range(groups)]
    if len(set(sizes)) > 1:
        return f"{sizes} experts would be left of its {groups} groups (n_group), which must be equally large"
    return experts.group_problem(len(kept))


def _reduced(dropped: DroppedExperts) -> Source:
    """The source without what is dropped; routers as they were."""
    source, layers, masks = dropped.source, [], []
    gone, names = set[str](), dict[str, str]()
    for index, (layer, of_layer, kept) in enumerate(zip(source.layers, source.masks, dropped.kept, strict=True)):
        widths = layer.expert_intermediate_sizes
        places = {expert: place for place, expert in enumerate(kept)}
        sizes = tuple(widths[expert] for expert in kept)
        constants = tuple(places[expert] for expert in layer.constant_experts)
        layers.append(replace(layer, expert_intermediate_sizes=sizes, constant_experts=constants))
        masks.append(of_layer if of_layer.expert is None else replace(of_layer, expert=of_layer.expert[list(kept)]))
        for expert in range(len(widths)):
            before = _tensors_of(source, index, expert)
            if expert not in places:
                gone.update(before)
            elif places[expert] != expert:
                names |= dict(zip(before, _tensors_of(source, index, places[expert]), strict=True))
    changes = source.changes
    if changes is not None:
        stay = changes.names - gone
        changes = _RenamedChanges(changes, {names.get(name, name): name for name in stay})
    weights = source.weights.without(gone).renamed(names)
    return replace(source, weights=weights, layers=tuple(layers), masks=masks, changes=changes)


def _tensors_of(source: Source, index: int, expert: int) -> list[str]:
    """The names that tensors of an expert have, where there are such."""
    modules = source.dense.family.experts_format.modules_of(expert)
    return [f"model.layers.{index}.{module}.{part}" for module in modules for part in ("weight", "bias")]


@dataclass(frozen=True)
class _RenamedChanges:
    """Changes of weights that have other names now.

    Attributes:
        originals: the names that `changes` knows, by the new ones.
    """

    changes: WeightChanges
    originals: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        return set(self.originals)

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        return self.changes.merge(self.originals[name], weight)

    def describe(self) -> str:
        return self.changes.describe()

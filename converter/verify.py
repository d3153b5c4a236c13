"""Compares what was written with the pruned model that was read: each layer, and log-probabilities on a few prompts.

Both are run in float32 by converter/reference.py, the pruned model with its masks applied while it runs. A layer of
either is read a part of a tensor at a time, so that a model of any size can be compared.

What decides is each step by itself: the embedding, every layer, the head. The step of the converted model gets the
states that the pruned model has there, so that errors of other steps are not in it. Log-probabilities at the end would
tell less: a real model makes a thousandth of the rounding errors of float32, and several units of those of bfloat16.

A step may differ by TOLERANCE, and by ROUNDING times what rounding alone does. That is found by a third run: the pruned
model, with every weight multiplied by a random number, rounded to the dtype of what was written, and divided again.
Where no weight was rounded, because masks are zeros and ones and the dtype stays, that dtype is float32. What a layer
computes is measured by what it adds to the states of a token, and by a hundredth of the states.

Every run sends a token to the experts that the first one chose: a tie that rounding decides otherwise is no error.

Where experts are dropped, the pruned model is the one with all of them whose router gives the dropped ones minus
infinity (converter/dropped_experts.py says why).

Where weights are quantized, they are taken as they were before: converter/quantize/verify.py looks at what was rounded.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from converter.checkpoint import Checkpoint
from converter.folded import FoldedTensors
from converter.hidden import EMBEDDING
from converter.plan import Plan
from converter.quantize.quantization import Quantization
from converter.reference import ReferenceModel
from converter.source import WeightChanges
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.padding import take_or_zero
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.formats.geometry import ModelGeometry

VERIFIED_BYTES = 2_000_000_000  # of the written weights: up to here it takes seconds, and is done unless refused
TOLERANCE = 1e-4
ROUNDING = 4
PROMPT_LENGTHS = (1, 6, 17)
SEED = 0


@dataclass(frozen=True)
class Step:
    """The embedding, a layer or the head.

    Attributes:
        difference: of the converted model's, for the token where it is largest.
        rounding: what rounding does, for the token where that is largest.
    """

    name: str
    difference: float
    rounding: float

    @property
    def allowed(self) -> float:
        return TOLERANCE + ROUNDING * self.rounding

    @property
    def is_wrong(self) -> bool:
        return not self.difference <= self.allowed  # NaN is wrong


def check_conversion(plan: Plan, directory: Path) -> str:
    """Compares the plan's source with what was written to `directory`; returns a sentence about it.

    Raises:
        InputError: they differ by more than rounding can explain; every step that does is named.
    """
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(plan.dense.vocab_size, (sum(PROMPT_LENGTHS),), generator=generator)
    with torch.inference_mode():
        steps, expected, result = _compare(plan, Checkpoint.from_directory(directory), tokens)
    same = int((result.argmax(-1) == expected.argmax(-1)).sum())
    facts = (
        f"log-probabilities differ by at most {float((result - expected).abs().max()):.2g}, and the most likely token "
        f"is the same at {same} of {len(tokens)} positions in {len(PROMPT_LENGTHS)} prompts"
    )
    if wrong := [step for step in steps if step.is_wrong]:
        raise InputError(
            f"What was written does not compute what the pruned model computes: {facts}. This is a fault of "
            "convert-pruned, please report it; --no-verify writes it nevertheless. What differs, from the same input:",
            [f"{step.name}: by {step.difference:.2g}, {step.allowed:.2g} may be rounding" for step in wrong],
        )
    worst = max(steps, key=lambda step: step.difference / step.allowed)
    with_router = "" if plan.dropped is None else ", whose routers choose among the experts that stay alone"
    return (
        f"Verified against the pruned model{with_router}: {facts}. From the same input, {worst.name} differs most, by "
        f"{worst.difference:.2g}, where {worst.allowed:.2g} may be rounding."
    )


def _compare(plan: Plan, written: Checkpoint, tokens: torch.Tensor) -> tuple[list[Step], torch.Tensor, torch.Tensor]:
    """The steps, and log-probabilities [tokens, vocab_size] of the pruned and of the converted model."""
    pruned, rounded, converted = _models(plan, written)
    kept = plan.cuts[EMBEDDING].columns if EMBEDDING in plan.cuts else None

    def at_kept(states: torch.Tensor) -> torch.Tensor:
        """States of the pruned model with the hidden dimensions of the converted one."""
        return states if kept is None else take_or_zero(states, 1, kept)

    def step(name: str, result: torch.Tensor, noisy: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor) -> Step:
        differences = (result - at_kept(expected)).norm(dim=1), (noisy - expected).norm(dim=1)
        difference, rounding = (float((norm / scale.clamp(min=1e-30)).max()) for norm in differences)
        return Step(name, difference, rounding)

    states, free = pruned.embed(tokens), converted.embed(tokens)
    steps = [step("the embedding", free, rounded.embed(tokens), states, states.norm(dim=1))]
    for index in progress_bar(range(len(pruned.geometry.layers)), desc="verifying", unit=" layers"):
        expected, chosen = pruned.layer(index, states, PROMPT_LENGTHS)
        if not expected.isfinite().all():
            raise InputError(
                f"The pruned model itself computes NaN or infinity in layer {index}: weights are damaged, maybe some "
                "that masks multiply by 0. Check them; --no-verify writes it nevertheless"
            )
        noisy, _ = rounded.layer(index, states, PROMPT_LENGTHS, chosen)
        if chosen is not None and plan.dropped is not None:
            chosen = plan.dropped.renumbered(index, chosen)
        twice = None if chosen is None else chosen.repeat(2, 1)
        results, _ = converted.layer(index, torch.cat((free, at_kept(states))), 2 * PROMPT_LENGTHS, twice)
        free, result = results.chunk(2)
        scale = (expected - states).norm(dim=1) + states.norm(dim=1) / 100
        steps.append(step(f"layer {index}", result, noisy, expected, scale))
        states = expected
    logits, noisy = pruned.log_probabilities(states), rounded.log_probabilities(states)
    free, result = converted.log_probabilities(torch.cat((free, at_kept(states)))).chunk(2)
    differences = (float((other - logits).abs().max()) for other in (result, noisy))
    return [*steps, Step("the head", *differences)], logits, free


def _models(plan: Plan, written: Checkpoint) -> tuple[ReferenceModel, ReferenceModel, ReferenceModel]:
    """The pruned model, the same with weights that are rounded by chance, and the converted one."""
    source = plan.source if plan.dropped is None else plan.dropped.source
    pruned = ReferenceModel(
        config=source.weights.config,
        geometry=source.dense.with_layers(source.layers),
        read=_reader(source.weights, source.changes),
        masks=source.masks,
        channel_mask_site=source.channel_mask_site,
    )
    if source.hidden is not None:
        pruned = replace(pruned, hidden=source.hidden)
    if plan.dropped is not None:
        dropped = [plan.dropped.dropped(index) for index in range(len(source.layers))]
        pruned = replace(pruned, dropped_experts=dropped)
    read = _reader(written) if plan.quantization is None else _reader_before_rounding(plan, plan.quantization, written)
    converted = ReferenceModel(written.config, ModelGeometry.from_config(written.config), read)
    return pruned, replace(pruned, rounding=_rounded_to(plan)), converted


def _reader(checkpoint: Checkpoint, changes: WeightChanges | None = None) -> Callable[[str], torch.Tensor | None]:
    changed = set() if changes is None else changes.names

    def read(name: str) -> torch.Tensor | None:
        if name not in checkpoint.tensors:
            return None
        tensor = checkpoint.read(name)
        return changes.merge(name, tensor) if changes is not None and name in changed else tensor

    return read


def _reader_before_rounding(
    plan: Plan, quantization: Quantization, written: Checkpoint
) -> Callable[[str], torch.Tensor | None]:
    folded, read_written = FoldedTensors(plan), _reader(written)
    return lambda name: folded.read(name) if quantization.quantizes(name) else read_written(name)


def _rounded_to(plan: Plan) -> torch.dtype:
    """The narrowest dtype that a weight may have been rounded to."""
    source, names = plan.source, list(plan.pruned.tensor_shapes())
    masks = [mask for layer in source.masks for mask in (layer.head, layer.channel, layer.expert) if mask is not None]
    multiplied = source.changes is not None or source.hidden is not None or not all(map(_is_binary, masks))
    rounded = [
        plan.dtype_of(name) for name in names if multiplied or plan.dtype_of(name) != source.weights.dtype_of(name)
    ]
    return max((*rounded, torch.float32), key=lambda dtype: torch.finfo(dtype).eps)


def _is_binary(mask: torch.Tensor) -> bool:
    return bool(((mask == 0) | (mask == 1)).all())

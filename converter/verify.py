"""Compares what was written with the pruned model that was read: log-probabilities on a few prompts, layer by layer.

Both are run in float32 by converter/reference.py, the pruned model with its masks applied while it runs. A layer of
either is read a part of a tensor at a time, so that a model of any size can be compared.

They may differ by TOLERANCE, and by ROUNDING times what rounding alone does. That is found by a third run: the pruned
model, with every weight multiplied by a random number, rounded to the dtype of what was written, and divided again.
Where no weight was rounded, because masks are zeros and ones and the dtype stays, that dtype is float32.

Every run sends a token to the experts that the first one chose: a tie that rounding decides otherwise is no error.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from converter.checkpoint import Checkpoint
from converter.plan import Plan
from converter.reference import ReferenceModel
from converter.source import WeightChanges
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar
from pruned_vllm.formats.geometry import ModelGeometry

VERIFIED_BYTES = 2_000_000_000  # of the written weights: up to here it takes seconds, and is done unless refused
TOLERANCE = 1e-4
ROUNDING = 4
PROMPT_LENGTHS = (1, 6, 17)
SEED = 0


def check_conversion(plan: Plan, directory: Path) -> str:
    """Compares the plan's source with what was written to `directory`; returns a sentence about it.

    Raises:
        InputError: they differ by more than rounding can explain.
    """
    pruned, rounded, converted = _models(plan, Checkpoint.from_directory(directory))
    lengths, generator = PROMPT_LENGTHS, torch.Generator().manual_seed(SEED)
    tokens = torch.randint(plan.dense.vocab_size, (sum(lengths),), generator=generator)
    with torch.inference_mode():
        found = _log_probabilities([pruned, rounded, converted], tokens, lengths)
    expected, result = found[0], found[2]
    allowed = TOLERANCE + ROUNDING * float((found[1] - expected).abs().max())
    worst = float((result - expected).abs().max())
    same = int((result.argmax(-1) == expected.argmax(-1)).sum())
    facts = (
        f"on {len(tokens)} tokens in {len(lengths)} prompts, log-probabilities of the pruned and the converted model "
        f"differ by at most {worst:.2g}, {allowed:.2g} may be rounding; the most likely token is the same at {same} of "
        f"{len(tokens)} positions"
    )
    if not worst <= allowed:  # NaN is not
        raise InputError(
            f"What was written does not compute what the pruned model computes: {facts}. This is a fault of "
            "convert-pruned, please report it; --no-verify writes it nevertheless"
        )
    return f"Verified: {facts}."


def _models(plan: Plan, written: Checkpoint) -> tuple[ReferenceModel, ReferenceModel, ReferenceModel]:
    """The pruned model, the same with weights that are rounded by chance, and the converted one."""
    source = plan.source
    pruned = ReferenceModel(
        config=source.weights.config,
        geometry=source.dense.with_layers(source.layers),
        read=_reader(source.weights, source.changes),
        masks=source.masks,
        channel_mask_site=source.channel_mask_site,
    )
    if source.hidden is not None:
        pruned = replace(pruned, hidden=source.hidden)
    converted = ReferenceModel(written.config, ModelGeometry.from_config(written.config), _reader(written))
    return pruned, replace(pruned, rounding=_rounded_to(plan)), converted


def _reader(checkpoint: Checkpoint, changes: WeightChanges | None = None) -> Callable[[str], torch.Tensor | None]:
    def read(name: str) -> torch.Tensor | None:
        if name not in checkpoint.tensors:
            return None
        tensor = checkpoint.read(name)
        return changes.merge(name, tensor) if changes is not None and name in changes.names else tensor

    return read


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


def _log_probabilities(
    models: list[ReferenceModel], tokens: torch.Tensor, lengths: tuple[int, ...]
) -> list[torch.Tensor]:
    """Log-probabilities [tokens, vocab_size] of each model."""
    states = [model.embed(tokens) for model in models]
    for index in progress_bar(range(len(models[0].geometry.layers)), desc="verifying", unit=" layers"):
        chosen = None
        for number, model in enumerate(models):
            states[number], chosen = model.layer(index, states[number], lengths, chosen)
    return [model.log_probabilities(state) for model, state in zip(models, states, strict=True)]

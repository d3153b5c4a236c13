"""The tensors of a dense model's files, in the form that those of a converted model have. Pure Python."""

from collections.abc import Mapping
from typing import Any

from pruned_vllm.formats.biases import complete_biases
from pruned_vllm.formats.fused import unfused
from pruned_vllm.formats.headers import StoredTensor, without_draft_layers


def as_converted(
    config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]
) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """config.json and tensors without layers that draft, fused tensors taken apart, with all biases of a projection.

    Raises:
        InputError: sizes are no numbers, or fused tensors do not fit them.
    """
    return complete_biases(config, unfused(config, without_draft_layers(config, tensors)))

"""A pruned model as an importer found it: what every importer yields, and all that the rest of the converter knows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from converter.checkpoint import Checkpoint
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import LayerMasks


class WeightChanges(Protocol):
    """What is added to weights before the masks are folded in: a LoRA adapter in whatever format."""

    @property
    def names(self) -> set[str]:
        """Full names of the weights that change."""

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight in float32 (float64 for float64): the caller casts, once, after the masks are folded."""

    def describe(self) -> str:
        """A sentence about it for the user."""


@dataclass(frozen=True)
class HiddenMask:
    """What a project did to the dimensions of the hidden states; every factor is float32 [hidden_size], None is 1.

    Attributes:
        embedding: multiplied the output of the embedding (not lm_head, also where both are tied).
        outputs: multiplied what attention and MLP add to the hidden states, biases included.
        norms: multiplied the output of every RMSNorm, that of the last one included.
        norm_divisor: what every RMSNorm divided the sum of squares by; None is the number of dimensions that it saw.
        norm_sees_kept: every RMSNorm summed the dimensions alone that `norms` keeps. Without `norm_divisor`, it divided
            by their number rather than by hidden_size (Sheared LLaMA, composer_llama.py, LlamaRMSNorm).
    """

    embedding: torch.Tensor | None = None
    outputs: torch.Tensor | None = None
    norms: torch.Tensor | None = None
    norm_divisor: float | None = None
    norm_sees_kept: bool = False


@dataclass(frozen=True)
class Source:
    """A pruned model.

    Attributes:
        weights: the tensors, and config.json as it was before pruning.
        method: what pruned it, one word; goes into the new config.json.
        dense: the geometry that the top level of `weights.config` describes.
        before: the geometry of the whole model before pruning, where it is known to be another than `dense`: sizes that
            all layers share can be cut too. Only reports need it.
        layers: the sizes that the tensors in `weights` have. Those of `dense` where masks are still to be applied.
        masks: one entry for each layer, for tensors of the sizes in `layers`.
        channel_mask_site: what the channel masks multiplied, "product" or "gate_and_up".
        hidden: the mask of the hidden dimensions, if there is one.
        changes: what is added to the weights before the masks are folded in, if anything.
        hub_id: the model on the hub whose weights these are, if they come from there.
        inputs: directories and files that were read. OUT must not contain them.
        companions: directory of the tokenizer and of what else goes along with the model; None: there is nothing.
        pruning: the key `pruning` of config.json that stays, of a model that was converted before; None: a new one.
        notes: sentences for the user about what was found, and what of it is lost.
        problems: what keeps it from being converted, beside what the tensors' shapes and the keys of config.json tell.
    """

    weights: Checkpoint
    method: str
    dense: ModelGeometry
    layers: tuple[LayerGeometry, ...]
    masks: list[LayerMasks[torch.Tensor]]
    before: ModelGeometry | None = None
    channel_mask_site: str = "product"
    hidden: HiddenMask | None = None
    changes: WeightChanges | None = None
    hub_id: str | None = None
    inputs: tuple[Path, ...] = ()
    companions: Path | None = None
    pruning: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """What the user asked an importer to read.

    Attributes:
        path: the directory or file given as INPUT.
        base_model: directory or hub id of the dense model, if one was given.
        revision: commit, branch or tag of a model of the hub.
        settings: other options of the command that an importer may need, by name (`lora_alpha`); None where not given.
    """

    path: Path
    base_model: str | None = None
    revision: str | None = None
    settings: Mapping[str, float | None] = field(default_factory=dict)

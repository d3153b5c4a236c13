"""Masks (zs.pt or l0_module.pt), LoRA weights and merged models of LoRaPruner, out of which Compresso came. Needs
--base-model for masks; --lora-alpha if alpha was not the rank.

As its models/modeling_llama.py computes (commit e00b23b): hidden_z multiplies what attention and MLP add, but not the
embedding, so no hidden dimension can go; RMSNorm is Llama's. A layer whose gate is 0 is left whole. Its
merge_weights.py merges the LoRA weights alone: what it writes is a dense model.
"""

import torch

from converter.l0_source import Project, read_project, recognise
from converter.source import HiddenMask, Request, Source

NAME = "LoRaPruner"
SETTINGS = ("lora_alpha",)
__all__ = ["NAME", "SETTINGS", "read", "recognise"]


def read(request: Request) -> Source:
    project = Project(NAME, "lorapruner", ("llama",), hidden_mask=_hidden_mask, gated=True, original_llama=True)
    return read_project(request, project)


def _hidden_mask(model_type: str, hidden_z: torch.Tensor | None) -> HiddenMask:
    return HiddenMask(outputs=hidden_z)

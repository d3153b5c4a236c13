"""Masks (zs.pt or l0_module.pt), LoRA weights and merged models of Compresso, in Microsoft's Moonlit. Needs
--base-model for masks; --lora-alpha if alpha was not the rank.

As its models/modeling_llama.py computes (commit 348a402): hidden_z multiplies the output of the embedding and what
attention and MLP add; RMSNorm divides the sum of squares by 4096, whatever the hidden size is. A layer whose gate is 0
is left whole.
"""

import torch

from converter.l0_source import NORM_DIVISOR, Project, read_project, recognise
from converter.source import HiddenMask, Request, Source

NAME = "Compresso"
SETTINGS = ("lora_alpha",)
__all__ = ["NAME", "SETTINGS", "read", "recognise"]


def read(request: Request) -> Source:
    project = Project(NAME, "compresso", ("llama",), hidden_mask=_hidden_mask, gated=True, original_llama=True)
    return read_project(request, project)


def _hidden_mask(model_type: str, hidden_z: torch.Tensor | None) -> HiddenMask:
    return HiddenMask(embedding=hidden_z, outputs=hidden_z, norm_divisor=NORM_DIVISOR)

"""Masks (zs.pt or l0_module.pt), LoRA weights and merged models of NutePrune: Llama, and Mistral with grouped queries.
Needs --base-model for masks; --lora-alpha if alpha was not the rank.

As its models/modeling_llama.py and modelling_mistral.py compute (commit 312b3f9): hidden_z multiplies the output of the
embedding and what attention and MLP add. RMSNorm divides the sum of squares by 4096 in Llama, whatever the hidden size
is, and by the hidden size in Mistral. Layer gates do nothing. Of grouped queries, each query head has its own mask.
"""

import torch

from converter.l0_source import NORM_DIVISOR, Project, read_project, recognise
from converter.source import HiddenMask, Request, Source

NAME = "NutePrune"
SETTINGS = ("lora_alpha",)
__all__ = ["NAME", "SETTINGS", "read", "recognise"]


def read(request: Request) -> Source:
    project = Project(
        NAME,
        "nuteprune",
        ("llama", "mistral"),
        hidden_mask=_hidden_mask,
        gated=False,
        original_llama=False,
    )
    return read_project(request, project)


def _hidden_mask(model_type: str, hidden_z: torch.Tensor | None) -> HiddenMask:
    divisor = NORM_DIVISOR if model_type == "llama" else None
    return HiddenMask(embedding=hidden_z, outputs=hidden_z, norm_divisor=divisor)

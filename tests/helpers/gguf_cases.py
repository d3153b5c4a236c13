"""Masked models for the tests of GGUF files, with the name of llama.cpp's architecture that they are written for."""

from dataclasses import dataclass, field

import torch
from helpers.tiny import llama3_rope, masks_for, soft_mask, tiny_model

from converter import cli

WIDTH = 40


@dataclass(frozen=True)
class Case:
    """What the masks leave: for each layer the query heads that each KV head keeps, and the FFN width."""

    architecture: str  # llama.cpp's
    model_type: str
    groups: tuple[tuple[int, ...], ...]
    widths: tuple[int, ...] = (17, 40, 8)
    group: int = 1
    config: dict = field(default_factory=dict)

    def model_and_masks(self):
        kv_heads = len(self.groups[0])
        model = tiny_model(self.model_type, kv_heads * self.group, kv_heads, WIDTH, **self.config)
        generator, heads = torch.Generator().manual_seed(5), []
        for kept in self.groups:
            heads.append([value for count in kept for value in soft_mask(self.group, count, generator).tolist()])
        return model, masks_for(heads, [soft_mask(WIDTH, width, generator) for width in self.widths])


MHA, NONE = ((1, 1, 0, 0), (0, 0, 0, 1), (1, 1, 1, 1)), (0, 0, 0, 0)
EQUAL = ((1, 1, 0, 0), (0, 1, 0, 1), (0, 0, 1, 1))
UNEVEN = ((3, 1, 0), (1, 0, 2), (3, 3, 2))
BIASES = {"attention_bias": True, "mlp_bias": True}
LINEAR = {"rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0}}
LLAMA3 = {"rope_parameters": llama3_rope(64)}
TIED = {"tie_word_embeddings": True}
CASES = {
    "llama, other sizes in every layer": Case("deci", "llama", MHA),
    "llama, equal layers": Case("llama", "llama", EQUAL, (24,) * 3),
    "llama, tied": Case("deci", "llama", MHA, config=TIED),
    "llama, uneven groups": Case("deci", "llama", UNEVEN, group=4),
    "llama, uneven groups that are padded to equal layers": Case("llama", "llama", ((3, 1),) * 3, (24,) * 3, group=3),
    "llama, nothing in the first layer": Case("deci", "llama", (NONE, *MHA[1:]), (0, 17, 8)),
    "llama, nothing in the last layer": Case("deci", "llama", (*MHA[:2], NONE), (17, 8, 0)),
    "llama, no attention at all": Case("deci", "llama", (NONE,) * 3),
    "llama, no MLP at all": Case("deci", "llama", MHA, (0, 0, 0)),
    "llama, one layer": Case("llama", "llama", (MHA[0],), (17,), config={"num_hidden_layers": 1}),
    "llama, biases": Case("deci", "llama", UNEVEN, group=4, config=BIASES),
    "llama, biases that survive": Case("deci", "llama", (NONE, *MHA[1:]), (0, 17, 0), config=BIASES),
    "llama, equal layers with biases": Case("llama", "llama", EQUAL, (24,) * 3, config=BIASES),
    "llama, linear rope": Case("deci", "llama", MHA, config=LINEAR),
    "llama, rope of Llama 3": Case("deci", "llama", MHA, config=LLAMA3),
    "llama, equal layers with the rope of Llama 3": Case("llama", "llama", EQUAL, (24,) * 3, config=LLAMA3),
    "mistral": Case("deci", "mistral", UNEVEN, group=4, config={"sliding_window": None}),
    "mistral, equal layers": Case("llama", "mistral", EQUAL, (24,) * 3, config={"sliding_window": 100}),
    "qwen2": Case("deci", "qwen2", UNEVEN, group=4),
    "qwen2, skips": Case("deci", "qwen2", (MHA[0], NONE, MHA[2]), (17, 8, 0)),
    "qwen2, equal layers": Case("deci", "qwen2", EQUAL, (24,) * 3),
    "qwen2, equal layers whose heads fill the hidden size": Case(
        "qwen2", "qwen2", EQUAL, (24,) * 3, config={"hidden_size": 64}
    ),
    "qwen3, tied": Case("openelm", "qwen3", UNEVEN, group=4, config=TIED),
    "qwen3, tied, skips": Case("openelm", "qwen3", (NONE, *MHA[1:]), (0, 17, 8), config=TIED),
    "qwen3": Case("qwen3", "qwen3", UNEVEN, group=4),
    "qwen3, skips": Case("qwen3", "qwen3", (*MHA[:2], NONE), (17, 0, 8)),
    "qwen3, equal layers": Case("qwen3", "qwen3", EQUAL, (24,) * 3, config=TIED | LINEAR),
}


def export(*args) -> int:
    return cli.main(["export", *map(str, args)])

"""What Compresso, LoRaPruner and NutePrune write, written here: zs.pt, l0_module.pt, lora_weights.pt."""

from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.hidden import hidden_z
from helpers.llama import Rules
from helpers.masked import convert_pruned
from helpers.tiny import tiny_model
from torch import nn

from pruned_vllm.hf import load_pruned

TOKENS = [5, 9, 17, 33, 3, 8, 200, 1, 1, 90]


@dataclass(frozen=True)
class Shape:
    """A dense model, and what its masks keep: heads and channels of each layer, hidden dimensions.

    hidden_size is heads * head_dim, as the projects have it.
    """

    heads: tuple[int, ...]
    channels: tuple[int, ...]
    hidden: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    width: int = 37
    head_dim: int = 8

    @property
    def num_layers(self) -> int:
        return len(self.heads)

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    def model(self, model_type: str = "llama", **config):
        """With small norms: where they divide by 4096, a hundred times the sizes here, they return large numbers, and
        the softmax of large numbers magnifies the rounding of float32.
        """
        model = tiny_model(
            model_type,
            self.num_heads,
            self.num_kv_heads or self.num_heads,
            self.width,
            hidden_size=self.hidden_size,
            head_dim=self.head_dim,
            num_hidden_layers=self.num_layers,
            rms_norm_eps=1e-4,
            **config,
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("norm.weight"):
                    parameter.mul_(0.2)
        return model

    def zs(self) -> dict[str, torch.Tensor]:
        """The masks in the shapes of zs.pt; as there, they come out of a computation with gradients."""
        heads = [hidden_z(self.num_heads, kept, seed) for seed, kept in enumerate(self.heads)]
        channels = [hidden_z(self.width, kept, seed) for seed, kept in enumerate(self.channels)]
        one = torch.ones((), requires_grad=True)
        return {
            "head_z": torch.stack(heads).reshape(-1, 1, self.num_heads, 1, 1) * one,
            "intermediate_z": torch.stack(channels).reshape(-1, 1, 1, self.width) * one,
            "hidden_z": hidden_z(self.hidden_size, self.hidden) * one,
        }


SHAPES = {
    "ragged": Shape((2, 1, 4), (11, 37, 1), 20),
    "sublayers without units": Shape((0, 3, 0), (5, 0, 0), 17),
    "one layer, one head": Shape((1,), (3,), 5, num_heads=1),
    "one head of each layer, odd sizes": Shape((1, 1), (7, 5), 23, num_heads=3, width=9),
}


class L0Module(nn.Module):
    """As models/l0_module.py of the projects: log alpha of each mask, and attributes of all kinds."""

    def __init__(self, log_alphas: dict[str, torch.Tensor], start: int | None = None, end: int | None = None):
        super().__init__()
        names = {"head": "head_loga", "intermediate": "int_loga", "hidden": "hidden_loga", "layer": "layer_loga"}
        self.temperature, self.magical_number = 2.0 / 3.0, 0.8
        self.block_layer_start, self.block_layer_end = start, end
        self.z_logas = {}
        for kind, log_alpha in log_alphas.items():
            self.z_logas[kind] = nn.Parameter(log_alpha)
            setattr(self, names[kind], self.z_logas[kind])
        self.lambda_1 = nn.Parameter(torch.tensor(0.0))
        self.sizes = {kind: log_alpha.shape[-1] if log_alpha.dim() > 1 else 1 for kind, log_alpha in log_alphas.items()}


def lora_weights(tensors: dict[str, torch.Tensor], rank: int, *projections: str) -> dict[str, torch.Tensor]:
    """LoRA of every layer in loralib's names, B not zero."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, tensor in tensors.items():
        if name.endswith(tuple(f"{projection}.weight" for projection in projections)):
            module = name.removesuffix(".weight")
            found[f"{module}.lora_A"] = torch.randn(rank, tensor.shape[1], generator=generator) * 0.1
            found[f"{module}.lora_B"] = torch.randn(tensor.shape[0], rank, generator=generator) * 0.1
    return found


def merged(tensors: dict[str, torch.Tensor], lora: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """The tensors with scale * B @ A added."""
    result = {name: tensor.double() for name, tensor in tensors.items()}
    for name in {key.rpartition(".")[0] for key in lora}:
        product = lora[f"{name}.lora_B"].double() @ lora[f"{name}.lora_A"].double()
        result[f"{name}.weight"] = result[f"{name}.weight"] + scale * product
    return result


def assert_converts_to(expected: torch.Tensor, source: Path, out: Path, *args, **options) -> None:
    """The command turns `source` into a model whose log-probabilities for TOKENS are those of these logits."""
    assert convert_pruned(source, out, *args) == 0
    with torch.no_grad():
        found = load_pruned(out, dtype=torch.float32, **options)(torch.tensor([TOKENS])).logits[0]
    torch.testing.assert_close(found.double().log_softmax(-1), expected.log_softmax(-1), rtol=0, atol=1e-4)


def rules_of(project: str, zs: dict[str, torch.Tensor], first: int = 0) -> Rules:
    """What the modeling files of the three projects do with these masks, from layer `first` on.

    Each has a rule of its own for hidden_z and the norm: Compresso and NutePrune's Llama divide by 4096.
    """
    zs = {key: mask.detach() for key, mask in zs.items()}
    hidden = zs.get("hidden_z")
    rules = Rules(outputs=hidden)
    if project != "lorapruner":
        rules.embedding = hidden
    if project in ("compresso", "nuteprune"):
        rules.divisor = 4096
    for kind, key, gate in (("heads", "head_z", "head_layer_z"), ("channels", "intermediate_z", "mlp_z")):
        for row, mask in enumerate(zs.get(key, ())):
            gates = zs.get(gate, zs.get("layer_z"))
            if gates is None or project.startswith("nuteprune") or gates[row] >= 0.5:
                getattr(rules, kind)[first + row] = mask.flatten()
    return rules


def write(tmp_path: Path, model, zs, lora=None, module: L0Module | None = None) -> tuple[Path, Path]:
    """Saves the dense model and the project's files; returns their directories."""
    base, masks = tmp_path / "base", tmp_path / "epoch3"
    model.save_pretrained(base)
    masks.mkdir()
    torch.save(zs, masks / "zs.pt")
    if lora is not None:
        torch.save(lora, masks / "lora_weights.pt")
    if module is not None:
        torch.save(module, masks / "l0_module.pt")
    return base, masks

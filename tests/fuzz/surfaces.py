"""What is fuzzed: for each surface, valid inputs, the file in them that is changed, and the command that reads it.

Adding a surface is one entry of SURFACES.
"""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from helpers.composer import with_masks
from helpers.dropped import write_mone
from helpers.l0 import L0Module
from helpers.masked import edit_json
from helpers.tiny import expert_masks, masks_for, tiny_model, write_masked
from safetensors.torch import save_file

from converter import cli
from converter.quantize import command as quantize_command
from converter.torch_files import read_torch_file
from pruned_vllm.common.command import run_command

Run = Callable[[Path, Path], int]  # the input, OUT; returns an exit code


@dataclass(frozen=True)
class Seed:
    """A valid input.

    Attributes:
        make: writes it into a directory that does not exist, and returns what is given to the command.
        file: what is changed, relative to that directory.
        mutator: in `mutations.MUTATORS`.
        run: what reads it.
    """

    make: Callable[[Path], Path]
    file: str
    mutator: str
    run: Run


def convert(path: Path, out: Path) -> int:
    return cli.main([str(path), str(out), "--align", "1", "--no-verify"])


def convert_verified(path: Path, out: Path) -> int:
    return cli.main([str(path), str(out), "--align", "1", "--verify"])


def with_base(importer: str) -> Run:
    """Converts what needs the dense model, which lies beside it."""

    def run(path: Path, out: Path) -> int:
        return cli.main(
            [
                *map(str, (path, out)),
                "--align=1",
                "--no-verify",
                "--from",
                importer,
                "--base-model",
                str(path.parent / "base"),
            ]
        )

    return run


def quantize(path: Path, out: Path) -> int:
    return quantize_command.main([str(path), str(out), "--scheme", "w8a8-int8", "--no-verify"])


def inspect(path: Path, out: Path) -> int:
    return cli.main(["inspect", str(path)])


def read_torch(path: Path, out: Path) -> int:
    """All tensors are touched, since they are mapped into memory."""

    def body() -> None:
        pending, seen = [read_torch_file(path)], set()
        while pending:
            value = pending.pop()
            if isinstance(value, torch.Tensor):
                value.float().sum()
            elif id(value) not in seen:
                seen.add(id(value))
                if isinstance(value, dict | list | tuple):
                    pending += value.values() if isinstance(value, dict) else value
                else:
                    pending += [getattr(value, name) for name in ("state", "args", "items") if hasattr(value, name)]

    return run_command("read", body)


def _small(model_type: str, **config):
    sizes = {"hidden_size": 16, "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 24} | config
    return tiny_model(model_type, 2, 2, 8, **sizes)


HEADS, CHANNELS = [[1, 0], [0.5, 2]], [torch.arange(8) % 3, torch.ones(8)]


def _masked(directory: Path, **config) -> Path:
    return write_masked(directory, _small("llama", **config), masks_for(HEADS, CHANNELS))


def _experts(directory: Path) -> Path:
    model = _small("qwen2_moe", moe_intermediate_size=4, shared_expert_intermediate_size=4, mlp_only_layers=[0])
    return write_masked(directory, model, expert_masks(model, [[1, 0, 4, 2]], [3]))


def _fewer_experts(directory: Path) -> Path:
    """A converted model with another number of experts in one layer."""
    ckpt = _experts(directory.with_name("ckpt"))
    assert cli.main([str(ckpt), str(directory), "--align=1", "--no-verify", "--drop-empty-experts"]) == 0
    shutil.rmtree(ckpt)
    return directory


def _constants(directory: Path) -> Path:
    """Constants in place of experts, as MoNE has them."""
    model = _small("qwen2_moe", moe_intermediate_size=4, shared_expert_intermediate_size=4)
    write_mone(directory, model, {1: [2]}, declared=True)
    return directory


def _sharded(directory: Path) -> Path:
    _masked(directory)
    (directory / "model.safetensors").unlink()
    _small("llama").save_pretrained(directory, max_shard_size="4KB")
    return directory


def _converted(directory: Path) -> Path:
    ckpt = _masked(directory.with_name("ckpt"))
    assert convert(ckpt, directory) == 0
    shutil.rmtree(ckpt)
    return directory


def _quantized(directory: Path) -> Path:
    converted = _converted(directory.with_name("converted"))
    assert quantize(converted, directory) == 0
    shutil.rmtree(converted)
    return directory


def _cut(directory: Path) -> Path:
    """Tensors that were cut, under the config.json of before."""
    _converted(directory)
    _small("llama").config.save_pretrained(directory)
    return directory


def _zeros(directory: Path) -> Path:
    model = _small("llama")
    model.model.layers[0].mlp.up_proj.weight[::2] = 0
    model.save_pretrained(directory)
    return directory


def _adapter(directory: Path) -> Path:
    """A checkpoint with an adapter of rank 2 for two modules."""
    write_masked(directory, _small("llama"), masks_for(HEADS, CHANNELS), lora_adapter="adapter")
    adapter = directory / "adapter"
    adapter.mkdir()
    tensors = {}
    for module, rows in (("self_attn.q_proj", 16), ("mlp.up_proj", 8)):
        name = f"base_model.model.model.layers.0.{module}"
        tensors |= {f"{name}.lora_A.weight": torch.ones(2, 16), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "bias": "none", "use_rslora": False, "lora_dropout": 0.1}
    config |= {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"layers.1.q_proj": 4}, "alpha_pattern": {}}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _torch_file(content: Callable[[], object], zipped: bool, name: str = "file.pt") -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        directory.mkdir()
        path, written = directory / name, io.BytesIO()
        torch.save(content(), written, _use_new_zipfile_serialization=zipped)
        path.write_bytes(written.getvalue())
        return path

    return make


def _masks_of_a_project() -> object:
    return {
        "head_z": torch.rand(2, 1, 4, 1, 1),
        "mlp_z": torch.ones(2, dtype=torch.int64),
        "arrays": torch.ones(3).numpy(),
    }


def _module() -> object:
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).half()
    return {"model": module, "tokenizer": [module[0].weight.T, {"a": (module[0].bias, 1)}]}


def _whole_model() -> object:
    return {"model": _small("llama"), "tokenizer": None}


def _zs() -> object:
    return {"head_z": torch.rand(2, 1, 2, 1, 1), "intermediate_z": torch.rand(2, 1, 1, 8), "hidden_z": torch.ones(16)}


def _sheared() -> object:
    masks = {"head": torch.tensor([[2.0, -2], [3, 1]]), "intermediate": torch.rand(2, 8), "hidden": torch.rand(16)}
    return {"state": {"model": with_masks(_small("llama"), masks)}}


def _l0_module() -> object:
    return L0Module({"head": torch.rand(2, 2), "intermediate": torch.rand(2, 8), "hidden": torch.rand(16)}, 0, 2)


def _lora(directory: Path) -> Path:
    """Masks, and LoRA of one module beside them."""
    path = _beside_base(_zs, "zs.pt")(directory)
    name = "model.layers.0.self_attn.q_proj.lora_"
    torch.save({f"{name}A": torch.rand(2, 16), f"{name}B": torch.rand(16, 2)}, directory / "lora_weights.pt")
    return path


def _state_dict(directory: Path) -> Path:
    """A model whose weights are pickled; of the MLPs channels were cut."""
    model = _small("llama")
    model.config.save_pretrained(directory)
    cut = {name: tensor[:5] for name, tensor in model.state_dict().items() if "gate_proj" in name or "up_proj" in name}
    cut |= {name: tensor[:, :5] for name, tensor in model.state_dict().items() if "down_proj" in name}
    torch.save({**model.state_dict(), **cut}, directory / "pytorch_model.bin")
    return directory


def _blocks(directory: Path) -> Path:
    """Sizes of each layer in config.json, as Puzzletron has them."""
    _small("llama").save_pretrained(directory)
    block = {"attention": {"num_key_value_heads": 2}, "ffn": {"intermediate_size": 8, "no_op": False}}
    edit_json(directory / "config.json", block_configs=[block, block])
    return directory


def _ddp() -> object:
    masks = {"head": torch.tensor(HEADS), "intermediate": torch.rand(2, 8)}
    return {f"l0_module.masks.{kind}.z_loga": mask for kind, mask in masks.items()}


def _beside_base(content: Callable[[], object], name: str) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        path = _torch_file(content, True, name)(directory)
        _small("llama").save_pretrained(directory / "base")
        return path

    return make


SURFACES: dict[str, dict[str, Seed]] = {
    "config": {
        "llama": Seed(_masked, "config.json", "json", convert),
        "biases": Seed(lambda path: _masked(path, attention_bias=True, mlp_bias=True), "config.json", "json", convert),
        "experts": Seed(_experts, "config.json", "json", convert),
        "verified": Seed(_masked, "config.json", "json", convert_verified),
        "experts_verified": Seed(_experts, "config.json", "json", convert_verified),
        "fewer_experts": Seed(_fewer_experts, "config.json", "json", inspect),
        "constants": Seed(_constants, "config.json", "json", convert),
        "blocks": Seed(_blocks, "config.json", "json", convert),
        "converted": Seed(_converted, "config.json", "json", inspect),
        "to quantize": Seed(_converted, "config.json", "json", quantize),
        "quantized": Seed(_quantized, "config.json", "json", inspect),
        "cut": Seed(_cut, "config.json", "json", convert),
        "zeros": Seed(_zeros, "config.json", "json", convert),
    },
    "index": {
        "sharded": Seed(_sharded, "model.safetensors.index.json", "json", convert),
        "inspected": Seed(_sharded, "model.safetensors.index.json", "json", inspect),
    },
    "safetensors": {
        "llama": Seed(_masked, "model.safetensors", "safetensors", convert),
        "experts": Seed(_experts, "model.safetensors", "safetensors", convert),
        "converted": Seed(_converted, "model.safetensors", "safetensors", inspect),
        "to quantize": Seed(_converted, "model.safetensors", "safetensors", quantize),
        "quantized": Seed(_quantized, "model.safetensors", "safetensors", inspect),
        "cut": Seed(_cut, "model.safetensors", "safetensors", convert),
        "zeros": Seed(_zeros, "model.safetensors", "safetensors", convert),
    },
    "masks": {
        "llama": Seed(_masked, "pruning_masks.safetensors", "safetensors", convert),
        "experts": Seed(_experts, "pruning_masks.safetensors", "safetensors", convert),
        "pruning": Seed(_adapter, "pruning.json", "json", convert),
    },
    "pickle": {
        "zip": Seed(_torch_file(_masks_of_a_project, True), "file.pt", "torch archive", read_torch),
        "legacy": Seed(_torch_file(_masks_of_a_project, False), "file.pt", "pickle", read_torch),
        "module": Seed(_torch_file(_module, True), "file.pt", "torch archive", read_torch),
        "legacy_module": Seed(_torch_file(_module, False), "file.pt", "pickle", read_torch),
        "model": Seed(_torch_file(_whole_model, True), "file.pt", "torch archive", convert),
        "legacy_model": Seed(_torch_file(_whole_model, False), "file.pt", "pickle", convert),
        "state_dict": Seed(_state_dict, "pytorch_model.bin", "torch archive", convert),
        "sheared": Seed(
            _beside_base(_sheared, "latest-rank0.pt"), "latest-rank0.pt", "torch archive", with_base("sheared")
        ),
        "l0_module": Seed(
            _beside_base(_l0_module, "l0_module.pt"), "l0_module.pt", "torch archive", with_base("compresso")
        ),
        "lora": Seed(_lora, "lora_weights.pt", "torch archive", with_base("nuteprune")),
        "nuteprune": Seed(_beside_base(_zs, "zs.pt"), "zs.pt", "torch archive", with_base("nuteprune")),
        "ddp": Seed(
            _beside_base(_ddp, "trainable_params.pt"), "trainable_params.pt", "torch archive", with_base("ddp")
        ),
    },
    "adapter": {
        "config": Seed(_adapter, "adapter/adapter_config.json", "json", convert),
        "weights": Seed(_adapter, "adapter/adapter_model.safetensors", "safetensors", convert),
    },
}

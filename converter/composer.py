"""Composer checkpoints of LLM-Shearing, which trains Sheared LLaMA: names of tensors, masks, and the target shape.

latest-rank0.pt, saved by torch.save, has the state_dict under "state", "model": the tensors of a Llama under names of
its own, and log alpha of the masks under `l0_module`. pruned-latest-rank0.pt, which the project makes of it
(utils/post_pruning_processing.py), is a state_dict of what is left, without masks. config.pt beside them is the
configuration of the run, an OmegaConf object.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from converter.l0_masks import L0Masks, mask_of_units
from converter.pickles import attributes
from converter.torch_files import read_torch_file
from pruned_vllm.common.errors import InputError

CONFIG_FILE = "config.pt"

_WHOLE = {"wte": "model.embed_tokens", "ln_f": "model.norm", "output": "lm_head"}
_IN_BLOCK = {
    **{"ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"},
    **{"attn.wq": "self_attn.q_proj", "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj"},
    **{"attn.out_proj": "self_attn.o_proj"},
    **{name: name for name in ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")},
}
_TENSOR = re.compile(r"(.+\.)?transformer\.(blocks\.(?P<layer>\d{1,6})\.)?(?P<module>.+)\.weight")
_MASK = re.compile(r"(.+\.)?l0_module\.masks\.(?P<kind>\w+)\.z_loga")
_IGNORED = re.compile(r"(.+\.)?(attn\.rotary_emb|l0_module\.lambdas)\..+|(train|eval|val)_metrics\..+")

# The sizes in config.pt that say how many units of each mask are kept, and the masks' keys in zs_s*.pt.
_TARGETS = {
    **{"hidden": "d_model", "head": "n_heads", "intermediate": "intermediate_size"},
    **dict.fromkeys(("head_layer", "mlp", "layer"), "n_layers"),
}


@dataclass(frozen=True)
class ComposerModel:
    """A checkpoint.

    Attributes:
        tensors: by their names in Hugging Face's Llama.
        log_alphas: of the masks, by kind: "head" [layers, heads], "intermediate" [layers, channels], "hidden"
            [dimensions], "layer" or "head_layer" and "mlp" [layers]; empty where there are no masks.
    """

    file: Path
    tensors: dict[str, torch.Tensor]
    log_alphas: dict[str, torch.Tensor] = field(default_factory=dict)

    def size(self, module: str, axis: int) -> int:
        """The largest size that the weight of a module has in any layer; 0 where no layer has it."""
        shapes = [tensor.shape for name, tensor in self.tensors.items() if name.endswith(f"{module}.weight")]
        return max((shape[axis] for shape in shapes if len(shape) > axis), default=0)

    @property
    def num_layers(self) -> int:
        indices = [int(name.split(".")[2]) for name in self.tensors if name.startswith("model.layers.")]
        return max(indices, default=-1) + 1


def is_composer(content: Any) -> bool:
    """Whether the content of a torch file is a checkpoint of Composer."""
    matches = (_TENSOR.fullmatch(str(name)) for name in _state_dict(content))
    return any(match is not None and match["module"] in ("attn.wq", "mlp.gate_proj") for match in matches)


def read_composer(file: Path, content: Any) -> ComposerModel:
    """The tensors in the content of a file. Raises InputError with every name that is none of the model's."""
    model, problems = ComposerModel(file, {}), []
    for key, tensor in _state_dict(content).items():
        name = str(key)
        mask, match = _MASK.fullmatch(name), _TENSOR.fullmatch(name)
        if _IGNORED.fullmatch(name) or not (mask or match or isinstance(tensor, torch.Tensor)):
            continue
        module = (_WHOLE if match["layer"] is None else _IN_BLOCK).get(match["module"]) if match else None
        if not isinstance(tensor, torch.Tensor):
            problems.append(f"{name:.200}: no tensor, or one of a kind that is not read")
        elif mask is not None:
            model.log_alphas[mask["kind"]] = tensor
        elif match is None or module is None:
            problems.append(f"{name:.200}: not a tensor of LLM-Shearing's Llama")
        else:
            prefix = "" if match["layer"] is None else f"model.layers.{int(match['layer'])}."
            full = f"{prefix}{module}.weight"
            if full in model.tensors:
                problems.append(f"{name:.200}: there twice, under different prefixes; keep the one of the pruned model")
            model.tensors[full] = tensor
    missing = [name for name in ("wte", "ln_f", "output") if f"{_WHOLE[name]}.weight" not in model.tensors]
    problems += [f"transformer.{name}.weight: missing" for name in missing]
    if problems:
        raise InputError(f"{file} is no checkpoint of LLM-Shearing:", problems)
    return model


def live_masks(model: ComposerModel) -> tuple[L0Masks, list[str]]:
    """The masks that the model computes with when it is evaluated, and notes for the user.

    With a target shape, exactly so many units are kept in every row; without one, as many as the distribution expects
    (models/l0_module.py, Mask._deterministic_z). Raises InputError.
    """
    file, targets = model.file.parent / CONFIG_FILE, {}
    if file.is_file():
        targets = _read_targets(file)
    values, problems = {}, []
    for kind, log_alpha in model.log_alphas.items():
        if kind not in _TARGETS:
            problems.append(f"{kind}: masks inside of heads cannot be cut: vLLM serves heads of one size")
            continue
        axes = 2 if kind in ("head", "intermediate") else 1
        if log_alpha.dim() != axes or not log_alpha.numel():
            problems.append(f"{kind}: log alpha has shape {list(log_alpha.shape)}; it needs {axes} axes, none empty")
            continue
        clamped = log_alpha.float().clamp(math.log(1e-2), math.log(1e2))
        units, target = clamped.shape[-1], targets.get(kind)
        if target is not None and not 0 <= target <= units:
            problems.append(f"{kind}: the mask has {units} units, {CONFIG_FILE} says that {target} of them are kept")
            continue
        zeros = None if target is None else units - target
        rows = [mask_of_units(row, zeros=zeros) for row in clamped.reshape(-1, units)]
        values[f"{kind}_z"] = torch.stack(rows).reshape(clamped.shape)
    if problems:
        raise InputError(f"The masks in {model.file} cannot be read:", problems)
    if (layer := values.pop("layer_z", None)) is not None:
        values |= {"head_layer_z": layer, "mlp_z": layer}
    note = (
        f"{CONFIG_FILE} is not beside {model.file.name}, or names no target shape, so every mask keeps as many units "
        "as its distribution expects."
    )
    return L0Masks(model.file, values, first_layer=0), [] if targets else [note]


def _state_dict(content: Any) -> dict:
    """The tensors by name in the content of a file; empty where it is something else."""
    for key in ("state", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return content if isinstance(content, dict) else {}


def _read_targets(file: Path) -> dict[str, int]:
    """How many units of each mask are kept by the target shape in config.pt; empty where it names none."""
    module = ("model", "l0_module")
    config = read_torch_file(file)
    if _setting(config, *module, "eval_target_model") is False:
        return {}
    sizes = {kind: _setting(config, *module, "target_model", key) for kind, key in _TARGETS.items()}
    return {kind: size for kind, size in sizes.items() if type(size) is int}


def _setting(config: Any, *path: str) -> Any:
    """A value of a pickled OmegaConf object; None where it has none."""
    for key in path:
        content = attributes(config).get("_content")
        config = content.get(key) if isinstance(content, dict) else None
    return attributes(config).get("_val")

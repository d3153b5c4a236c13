"""The classes of loaded models: PrunedLlamaForCausalLM and the like, made from the stock classes when asked for.

`pruned_vllm.hf.classes.PrunedLlamaForCausalLM` can be imported, so that `torch.save`, `copy.deepcopy` and processes
that are spawned find the class by its name.
"""

from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.family import PRUNED_PREFIX, Family
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.weights import replacing_weights
from pruned_vllm.hf.layers import build_layer


@cache
def pruned_class(family: Family) -> type[PreTrainedModel]:
    """PrunedLlamaForCausalLM ...: `save_pretrained` writes the name of the class into `architectures`.

    Raises:
        InputError: Transformers lacks the architecture.
    """
    stock_class = getattr(transformers, family.architecture, None)
    if stock_class is None:
        raise InputError(f"Transformers has no {family.architecture}, so its pruned models can only be served by vLLM")
    if family.experts is not None:
        # Transformers fuses the experts of its own model classes into one tensor while it loads them, which needs
        # experts of one width. Our classes are under another name, for which only this renaming is registered.
        renamings = []
        if family.experts.module != "mlp":
            renamings.append(WeightRenaming(f".{family.experts.module}.", ".mlp."))
        register_checkpoint_conversion_mapping(family.pruned_architecture, renamings, overwrite=True)
    return type(family.pruned_architecture, (PrunedForCausalLM, stock_class), {"__module__": __name__})


@cache
def _inner_class(stock_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """PrunedMixtralModel ...: the stock class under a name that Transformers has no rule for."""
    return type(PRUNED_PREFIX + stock_class.__name__, (stock_class,), {"__module__": __name__})


def __getattr__(name: str) -> type[PreTrainedModel]:
    """Finds a class by its name, as pickle does; AttributeError for names of no class."""
    for family in FAMILIES.values():
        stock_class = getattr(transformers, family.architecture, None)
        if stock_class is None:
            continue
        if name == family.pruned_architecture:
            return pruned_class(family)
        for inner_name in (family.architecture.replace("ForCausalLM", suffix) for suffix in ("Model", "TextModel")):
            if name == PRUNED_PREFIX + inner_name and hasattr(transformers, inner_name):
                return _inner_class(getattr(transformers, inner_name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_StockClass: Any = object  # in the classes that `pruned_class` makes, a stock class comes behind the mixin


class PrunedForCausalLM(_StockClass):
    """Mixin before a stock `...ForCausalLM` class. `config` stays the converted config, so that it is saved whole."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)  # dense, but `from_pretrained` builds on the meta device: no memory is spent
        geometry = ModelGeometry.from_config(config.to_dict())
        if geometry.experts is not None:  # see pruned_class
            self.model.__class__ = _inner_class(self.model.__class__)
        layers = self.model.layers
        for index in range(len(layers)):
            layers[index] = build_layer(type(layers[index]), config, geometry, index)
        self.post_init()

    def save_pretrained(self, save_directory: str | Path, *args, **kwargs) -> None:
        """As in Transformers, but of an earlier save into the same directory no weights are left."""
        with replacing_weights(Path(save_directory)):
            super().save_pretrained(save_directory, *args, **kwargs)

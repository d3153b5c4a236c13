"""What vLLM reads of the config.json of a pruned model with latent attention (MLA), before it has built anything.

vLLM converts a config.json with `per_layer_config` layer by layer, and refuses that where attention is latent. Pruned
layers have all heads or no attention there (`formats/latent.py`), so the sizes of the whole model hold for each.
"""

from typing import Any

from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from pruned_vllm.formats.families import FAMILIES

Convertor = type[ModelArchConfigConvertorBase]


class EqualLayers(ModelArchConfigConvertorBase):
    """Converts a pruned model as one whose layers are equal, and any other as ever."""

    def get_per_layer_hf_configs(self) -> list[tuple[Any, Any]] | None:
        return None if getattr(self.hf_config, "pruning", None) else super().get_per_layer_hf_configs()


def latent_convertors(convertors: dict[str, Convertor]) -> dict[str, Convertor]:
    """Convertors of all families with latent attention, by `model_type`.

    Args:
        convertors: those that vLLM has already.
    """
    stock = {
        name: convertors.get(name, ModelArchConfigConvertorBase)
        for name, family in FAMILIES.items()
        if family.latent_attention
    }
    return {
        name: convertor if issubclass(convertor, EqualLayers) else type("EqualLayers", (EqualLayers, convertor), {})
        for name, convertor in stock.items()
    }

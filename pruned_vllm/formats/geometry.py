"""The shape of a model, layer by layer: the one place that reads and writes sizes in config.json. Pure Python.

A converted model keeps its dense sizes at the top level of config.json and says what each layer really has in
`per_layer_config`, the heterogeneity schema of Hugging Face (transformers PR 45333, read by vLLM since 0.32):

    "per_layer_config": {"0": {"num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 333},
                         "3": {"skip": ["attention"], "intermediate_size": 512}}

A layer that is not listed, and a key that a layer does not list, has the dense value. Two keys are ours, for what
Hugging Face has no word for: `query_heads_per_kv_head` (a list, written when the groups differ) and
`expert_intermediate_sizes` (the width of each expert, written when they differ or are all 0).

    geometry = ModelGeometry.from_config(json.load(open("config.json")))
    geometry.layers[3].num_key_value_heads, geometry.num_parameters, geometry.kv_cache_bytes_per_token(2)
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config_values import flag, positive
from pruned_vllm.formats.experts import DenseExperts
from pruned_vllm.formats.families import FAMILIES, Family, find_family
from pruned_vllm.formats.layer import ATTENTION_KEYS, LayerGeometry
from pruned_vllm.formats.sizes import ModelSizes
from pruned_vllm.formats.tensors import Shapes, layer_tensor_shapes

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types")  # of the keys that Transformers and vLLM read for every model


@dataclass(frozen=True)
class ModelGeometry(ModelSizes):
    """All sizes of a model.

    Attributes:
        dense_layers: the layers before pruning, which the top level of config.json describes.
        layers: the layers as they are.
    """

    dense_layers: tuple[LayerGeometry, ...]
    layers: tuple[LayerGeometry, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "ModelGeometry":
        """Reads a config.json, stock or converted.

        Raises:
            InputError: the architecture is not supported, or sizes are missing or contradict each other; every
                problem is listed.
        """
        family = find_family(config)
        if family is None:
            raise InputError(
                f"architectures {config.get('architectures')} with model_type {config.get('model_type')!r} is not "
                f"supported; supported: {', '.join(f.architecture for f in FAMILIES.values())}"
            )
        problems = _Problems()
        sizes = family.with_defaults(config)
        sizes.pop("skip", None)
        hidden_size, vocab_size, num_layers, heads = (
            problems.checked("top level", positive, sizes, key)
            for key in ("hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
        )
        if sizes.get("head_dim") is None:
            sizes["head_dim"] = family.default_head_dim
        if sizes["head_dim"] is None and heads and hidden_size:
            sizes["head_dim"] = hidden_size // heads
        head_dim = None  # without it something it derives from is missing, which is reported already
        if sizes["head_dim"] is not None:
            head_dim = problems.checked("top level", positive, sizes, "head_dim")
        experts = family.experts and problems.checked("top level", DenseExperts.from_config, family.experts, sizes)
        dense_layers, layers = _read_layers(family, experts, sizes, num_layers or 0, problems)
        tied = problems.checked("top level", flag, "tie_word_embeddings", config)
        names = ("qkv_bias", "o_bias", "mlp_bias")
        biases = {name: problems.checked("top level", flag, getattr(family, name), sizes) for name in names}
        problems += _per_layer_list_problems(config, num_layers)
        if problems:
            raise InputError("config.json describes no valid model:", problems)
        return cls(
            family=family,
            hidden_size=hidden_size,
            head_dim=head_dim,
            vocab_size=vocab_size,
            tie_word_embeddings=tied,
            **biases,
            experts=experts,
            dense_layers=tuple(dense_layers),
            layers=tuple(layers),
        )

    def with_layers(self, layers: tuple[LayerGeometry, ...]) -> "ModelGeometry":
        """The same model with other layers, e.g. the pruned ones; `dense_layers` stay."""
        return replace(self, layers=tuple(layers))

    def layer_tensor_shapes(self, index: int) -> Shapes:
        """Shapes of one layer's tensors by full name; see `pruned_vllm.formats.tensors`."""
        return layer_tensor_shapes(self, self.layers[index], index)

    def tensor_shapes(self) -> Shapes:
        """Shapes of all tensors of the checkpoint, by name, in the order of the forward pass."""
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for index in range(len(self.layers)):
            shapes |= self.layer_tensor_shapes(index)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def layer_parameters(self, index: int) -> int:
        """Number of parameters of one layer."""
        return sum(map(math.prod, self.layer_tensor_shapes(index).values()))

    @property
    def is_dense(self) -> bool:
        """Whether every layer is what the top level says, its query groups even."""
        return self.layers == self.dense_layers and all(layer.has_even_groups for layer in self.layers)

    @property
    def num_layer_parameters(self) -> int:
        """Number of parameters of all layers, without embeddings, final norm and lm_head."""
        return sum(map(self.layer_parameters, range(len(self.layers))))

    @property
    def num_parameters(self) -> int:
        """Number of parameters on disk; tied embeddings count once."""
        return sum(map(math.prod, self.tensor_shapes().values()))

    @property
    def num_key_value_heads(self) -> int:
        """KV heads of all layers together."""
        return sum(layer.num_key_value_heads for layer in self.layers)

    def kv_cache_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of keys and values that one token keeps in the cache; `element_bytes` is 2 for bfloat16."""
        return 2 * self.num_key_value_heads * self.head_dim * element_bytes


class _Problems(list[str]):
    """What is wrong with a config.json."""

    def checked(self, where: str, read: Callable, *args) -> Any:
        """What `read` returns; None if it raises, and then the problem is added."""
        try:
            return read(*args)
        except (ValueError, TypeError) as error:
            problem = f"{where}: {error}"
            if problem not in self:  # one key may be wrong for every layer
                self.append(problem)
            return None


def _per_layer_list_problems(config: Mapping[str, Any], num_layers: int | None) -> list[str]:
    """Lists with an entry for each layer that have more or fewer, as when layers were cut out of a model elsewhere."""
    return [
        f"{key} has {len(config[key])} entries, but num_hidden_layers is {num_layers}; they must be equal"
        for key in PER_LAYER_LISTS
        if isinstance(config.get(key), list) and num_layers is not None and len(config[key]) != num_layers
    ]


def _read_layers(
    family: Family, experts: DenseExperts | None, sizes: Mapping[str, Any], num_layers: int, problems: _Problems
) -> tuple[list[LayerGeometry | None], list[LayerGeometry | None]]:
    """The layers that the top level `sizes` describe, and those that `per_layer_config` makes of them."""

    def read_layer(where: str, index: int, overrides: Mapping[str, Any]) -> LayerGeometry | None:
        keys, arguments = {*ATTENTION_KEYS, "intermediate_size"}, ()
        if family.experts is not None and problems.checked("top level", family.experts.are_in_layer, index, sizes):
            if experts is None:  # reported already
                return None
            keys = {*ATTENTION_KEYS, family.experts.width_key, "expert_intermediate_sizes"}
            arguments = (experts.num_experts, family.experts.width_key)
        if unknown := set(overrides) - keys:
            problems.append(f"{where}: unknown keys {sorted(unknown)}; known: {sorted(keys)}")
            return None
        return problems.checked(where, LayerGeometry.from_sizes, {**sizes, **overrides}, *arguments)

    dense_layers = [read_layer("top level", index, {}) for index in range(num_layers)]
    layers = list(dense_layers)
    per_layer = sizes.get("per_layer_config") or {}
    if not isinstance(per_layer, Mapping):
        problems.append(f"per_layer_config is a {type(per_layer).__name__}; it maps layer indices to sizes")
        per_layer = {}
    for index, overrides in per_layer.items():
        where = f"per_layer_config[{index!r}]"
        if not isinstance(overrides, Mapping):
            problems.append(f"{where}: {overrides!r} is no mapping of sizes")
        elif not str(index).isdecimal() or int(index) >= num_layers:
            problems.append(f"{where}: not a layer index; the model has layers 0 to {num_layers - 1}")
        else:
            layers[int(index)] = read_layer(where, int(index), overrides)
    return dense_layers, layers

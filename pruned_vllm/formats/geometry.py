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
from pruned_vllm.formats.config_values import flag, naturals, positive
from pruned_vllm.formats.experts import DenseExperts
from pruned_vllm.formats.families import FAMILIES, Family, find_family
from pruned_vllm.formats.stock import stock_config
from pruned_vllm.formats.tensors import layer_tensor_shapes, tensor_shapes

PAD = -1  # in an index of heads or channels: a unit that does not exist, made of zeros

ATTENTION_KEYS = ("num_attention_heads", "num_key_value_heads", "query_heads_per_kv_head", "skip")


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer.

    Attributes:
        query_heads_per_kv_head: for each KV head, how many query heads read it; () when attention is skipped.
        intermediate_size: FFN channels; 0 when the MLP is skipped or the layer has experts.
        expert_intermediate_sizes: FFN channels of each routed expert; () for a layer with a dense MLP or none. 0 is an
            expert that outputs zeros; the router still sees it. A layer whose experts are all 0 skips nothing.
    """

    query_heads_per_kv_head: tuple[int, ...]
    intermediate_size: int
    expert_intermediate_sizes: tuple[int, ...] = ()

    @property
    def num_attention_heads(self) -> int:
        return sum(self.query_heads_per_kv_head)

    @property
    def num_key_value_heads(self) -> int:
        return len(self.query_heads_per_kv_head)

    @property
    def widest_group(self) -> int:
        """Query heads of the KV head that has most; 0 when attention is skipped."""
        return max(self.query_heads_per_kv_head, default=0)

    @property
    def has_even_groups(self) -> bool:
        return len(set(self.query_heads_per_kv_head)) <= 1

    @property
    def expert_width(self) -> int:
        """The width that all experts have in common; 0 where they differ, have no channels or do not exist."""
        widths = set(self.expert_intermediate_sizes)
        return widths.pop() if len(widths) == 1 else 0

    @property
    def skip(self) -> list[str]:
        """The sublayers that are gone, in the words of `per_layer_config`."""
        has_mlp = self.intermediate_size or self.expert_intermediate_sizes
        return ["attention"] * (not self.query_heads_per_kv_head) + ["mlp"] * (not has_mlp)

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, Any], num_experts: int = 0, width_key: str = "") -> "LayerGeometry":
        """Reads the flat keys of a layer (or of the top level). Raises ValueError with the numbers.

        Args:
            num_experts: 0 for a layer with a dense MLP.
            width_key: the family's key for the width of all experts.
        """
        skip = sizes.get("skip", [])
        known = ("attention",) if num_experts else ("attention", "mlp")
        if not set(skip) <= set(known):
            kind = "a layer with experts" if num_experts else "it"
            raise ValueError(f"skip is {skip}; {kind} may name {' and '.join(map(repr, known))}")
        heads, kv_heads = (positive(sizes, key) for key in ("num_attention_heads", "num_key_value_heads"))
        groups = sizes.get("query_heads_per_kv_head")
        if "attention" in skip:
            groups = ()
        elif groups is None:
            if heads % kv_heads:
                raise ValueError(
                    f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}; "
                    "uneven groups need query_heads_per_kv_head"
                )
            groups = (heads // kv_heads,) * kv_heads
        elif (
            not all(type(group) is int and group > 0 for group in groups)
            or len(groups) != kv_heads
            or sum(groups) != heads
        ):
            raise ValueError(
                f"query_heads_per_kv_head {list(groups)} must be {kv_heads} positive numbers "
                f"(num_key_value_heads) that add up to {heads} (num_attention_heads)"
            )
        if num_experts:
            widths = naturals(sizes, "expert_intermediate_sizes") or (positive(sizes, width_key),) * num_experts
            if len(widths) != num_experts:
                raise ValueError(f"expert_intermediate_sizes has {len(widths)} numbers for {num_experts} experts")
            return cls(tuple(groups), 0, widths)
        width = positive(sizes, "intermediate_size")
        return cls(tuple(groups), 0 if "mlp" in skip else width)

    def to_overrides(self, dense: "LayerGeometry", width_key: str = "") -> dict[str, Any]:
        """The flat keys in which this layer differs from the dense one; empty when it does not."""
        overrides: dict[str, Any] = {}
        if self.skip:
            overrides["skip"] = self.skip
        if self.query_heads_per_kv_head:
            for key in ("num_attention_heads", "num_key_value_heads"):
                if getattr(self, key) != getattr(dense, key):
                    overrides[key] = getattr(self, key)
            if not self.has_even_groups:
                overrides["query_heads_per_kv_head"] = list(self.query_heads_per_kv_head)
        if self.intermediate_size not in (0, dense.intermediate_size):
            overrides["intermediate_size"] = self.intermediate_size
        if self.expert_intermediate_sizes != dense.expert_intermediate_sizes:
            if self.expert_width:
                overrides[width_key] = self.expert_width
            else:
                overrides["expert_intermediate_sizes"] = list(self.expert_intermediate_sizes)
        return overrides


@dataclass(frozen=True)
class ModelGeometry:
    """All sizes of a model.

    Attributes:
        experts: what the layers with experts have in common before pruning; None in a model without such layers.
        dense_layers: the layers before pruning, which the top level of config.json describes.
        layers: the layers as they are.
    """

    family: Family
    hidden_size: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    experts: DenseExperts | None
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

    def to_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` (this family's dense config.json) with this geometry written into it.

        Under the stock architecture where every layer is equal and the stock code can say it, so that no plugin is
        needed; else under the `Pruned` architecture with `per_layer_config`.
        """
        stock = stock_config(self, config)
        if stock is not None:
            return stock
        width_key = self.family.experts.width_key if self.family.experts else ""
        overrides = {
            str(index): layer.to_overrides(dense, width_key)
            for index, (layer, dense) in enumerate(zip(self.layers, self.dense_layers, strict=True))
        }
        # Hugging Face wants every per-layer key at the top level too.
        ours = [
            key
            for key in ("query_heads_per_kv_head", "expert_intermediate_sizes")
            if any(key in keys for keys in overrides.values())
        ]
        return {
            **config,
            **dict.fromkeys(ours),
            "architectures": [self.family.pruned_architecture],
            "head_dim": self.head_dim,
            "num_key_value_heads": self.dense_layers[0].num_key_value_heads,
            # Without it LlamaConfig raises AmbiguousGlobalPerLayerAttributeError while it validates itself.
            "allow_global_per_layer_attribute_access": True,
            "per_layer_config": {index: keys for index, keys in overrides.items() if keys},
        }

    def layer_tensor_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors by full name; see `pruned_vllm.formats.tensors`."""
        return layer_tensor_shapes(self, index)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the checkpoint, by name, in the order of the forward pass."""
        return tensor_shapes(self)

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

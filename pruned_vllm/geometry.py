"""The shape of a model, layer by layer: the one place that reads and writes sizes in config.json. Pure Python.

A converted model keeps its dense sizes at the top level of config.json and says what each layer really has in
`per_layer_config`, the heterogeneity schema of Hugging Face (transformers PR 45333, read by vLLM since 0.32):

    "per_layer_config": {"0": {"num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 333},
                         "3": {"skip": ["attention"], "intermediate_size": 512}}

A layer that is not listed, and a key that a layer does not list, has the dense value. One key is ours, for what
Hugging Face has no word for: `query_heads_per_kv_head` (a list, written when the groups differ).

    geometry = ModelGeometry.from_config(json.load(open("config.json")))
    geometry.layers[3].num_key_value_heads, geometry.num_parameters, geometry.kv_cache_bytes_per_token(2)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pruned_vllm.errors import InputError
from pruned_vllm.families import FAMILIES, Family, find_family
from pruned_vllm.stock import stock_config

PAD = -1  # in an index of heads or channels: a unit that does not exist, made of zeros

PER_LAYER_KEYS = {
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "query_heads_per_kv_head",
    "skip",
}


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer.

    Attributes:
        query_heads_per_kv_head: for each KV head, how many query heads read it; () when attention is skipped.
        intermediate_size: FFN channels; 0 when the MLP is skipped.
    """

    query_heads_per_kv_head: tuple[int, ...]
    intermediate_size: int

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
    def skip(self) -> list[str]:
        """The sublayers that are gone, in the words of `per_layer_config`."""
        return ["attention"] * (not self.query_heads_per_kv_head) + ["mlp"] * (not self.intermediate_size)

    @classmethod
    def from_sizes(cls, sizes: Mapping[str, Any]) -> "LayerGeometry":
        """Reads the flat keys of a layer (or of the top level). Raises ValueError with the numbers."""
        skip = sizes.get("skip", [])
        if not set(skip) <= {"attention", "mlp"}:
            raise ValueError(f'skip is {skip}; it may name "attention" and "mlp"')
        heads, kv_heads, width = (
            _positive(sizes, key) for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")
        )
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
        return cls(tuple(groups), 0 if "mlp" in skip else width)

    def to_overrides(self, dense: "LayerGeometry") -> dict[str, Any]:
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
        return overrides


@dataclass(frozen=True)
class ModelGeometry:
    """All sizes of a model. `dense` is the layer that the top level of config.json describes."""

    family: Family
    hidden_size: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    dense: LayerGeometry
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
        problems: list[str] = []

        def checked(where: str, read, *args):
            try:
                return read(*args)
            except (ValueError, TypeError) as error:
                problems.append(f"{where}: {error}")

        sizes = dict(config)
        if sizes.get("num_key_value_heads") is None and family.model_type == "llama":
            sizes["num_key_value_heads"] = sizes.get("num_attention_heads")  # LlamaConfig's default
        sizes.pop("skip", None)
        dense = checked("top level", LayerGeometry.from_sizes, sizes)
        hidden_size = checked("top level", _positive, sizes, "hidden_size")
        vocab_size = checked("top level", _positive, sizes, "vocab_size")
        num_layers = checked("top level", _positive, sizes, "num_hidden_layers")
        if sizes.get("head_dim") is None:
            sizes["head_dim"] = family.default_head_dim
        if sizes["head_dim"] is None and dense and hidden_size:
            sizes["head_dim"] = hidden_size // dense.num_attention_heads
        # Without it something it derives from is missing, which is reported already.
        head_dim = (
            sizes["head_dim"] if sizes["head_dim"] is None else checked("top level", _positive, sizes, "head_dim")
        )
        layers = [dense] * (num_layers or 0)
        per_layer = config.get("per_layer_config") or {}
        if not isinstance(per_layer, Mapping):
            problems.append(f"per_layer_config is a {type(per_layer).__name__}; it maps layer indices to sizes")
            per_layer = {}
        for index, overrides in per_layer.items():
            where = f"per_layer_config[{index!r}]"
            if not isinstance(overrides, Mapping):
                problems.append(f"{where}: {overrides!r} is no mapping of sizes")
            elif not str(index).isdecimal() or int(index) >= len(layers):
                problems.append(f"{where}: not a layer index; the model has layers 0 to {len(layers) - 1}")
            elif unknown := set(overrides) - PER_LAYER_KEYS:
                problems.append(f"{where}: unknown keys {sorted(unknown)}; known: {sorted(PER_LAYER_KEYS)}")
            else:
                layers[int(index)] = checked(where, LayerGeometry.from_sizes, sizes | dict(overrides))
        tied = checked("top level", _flag, "tie_word_embeddings", config)
        names = ("qkv_bias", "o_bias", "mlp_bias")
        biases = {name: checked("top level", _flag, getattr(family, name), config) for name in names}
        if problems:
            raise InputError("config.json describes no valid model:", problems)
        return cls(
            family=family,
            hidden_size=hidden_size,
            head_dim=head_dim,
            vocab_size=vocab_size,
            tie_word_embeddings=tied,
            **biases,
            dense=dense,
            layers=tuple(layers),
        )

    def with_layers(self, layers: tuple[LayerGeometry, ...]) -> "ModelGeometry":
        """The same model with other layers, e.g. the pruned ones; `dense` stays."""
        return replace(self, layers=tuple(layers))

    def to_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` (this family's dense config.json) with this geometry written into it.

        Under the stock architecture where every layer is equal and the stock code can say it, so that no plugin is
        needed; else under the `Pruned` architecture with `per_layer_config`.
        """
        stock = stock_config(self, config)
        if stock is not None:
            return stock
        overrides = {str(index): layer.to_overrides(self.dense) for index, layer in enumerate(self.layers)}
        # Hugging Face wants every per-layer key at the top level too.
        uneven = any("query_heads_per_kv_head" in keys for keys in overrides.values())
        return {
            **config,
            **({"query_heads_per_kv_head": None} if uneven else {}),
            "architectures": [self.family.pruned_architecture],
            "head_dim": self.head_dim,
            "num_key_value_heads": self.dense.num_key_value_heads,
            # Without it LlamaConfig raises AmbiguousGlobalPerLayerAttributeError while it validates itself.
            "allow_global_per_layer_attribute_access": True,
            "per_layer_config": {index: keys for index, keys in overrides.items() if keys},
        }

    def layer_tensor_shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """Shapes of one layer's tensors by full name.

        A skipped sublayer has no norm and no weights. Where it ends in a bias (`o_proj`, `down_proj`), that stays:
        it was added to the hidden states whatever the masks removed.
        """
        layer = self.layers[index]
        q = layer.num_attention_heads * self.head_dim
        kv = layer.num_key_value_heads * self.head_dim
        hidden, width = self.hidden_size, layer.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {}

        def linear(name: str, rows: int, columns: int, bias: bool) -> None:
            shapes[f"{name}.weight"] = (rows, columns)
            if bias:
                shapes[f"{name}.bias"] = (rows,)

        if layer.query_heads_per_kv_head:
            shapes["input_layernorm.weight"] = (hidden,)
            linear("self_attn.q_proj", q, hidden, self.qkv_bias)
            linear("self_attn.k_proj", kv, hidden, self.qkv_bias)
            linear("self_attn.v_proj", kv, hidden, self.qkv_bias)
            linear("self_attn.o_proj", hidden, q, self.o_bias)
            if self.family.qk_norm:
                shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (self.head_dim,)
        elif self.o_bias:
            shapes["self_attn.o_proj.bias"] = (hidden,)
        if width:
            shapes["post_attention_layernorm.weight"] = (hidden,)
            linear("mlp.gate_proj", width, hidden, self.mlp_bias)
            linear("mlp.up_proj", width, hidden, self.mlp_bias)
            linear("mlp.down_proj", hidden, width, self.mlp_bias)
        elif self.mlp_bias:
            shapes["mlp.down_proj.bias"] = (hidden,)
        return {f"model.layers.{index}.{name}": shape for name, shape in shapes.items()}

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors of the checkpoint, by name, in the order of the forward pass."""
        shapes = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
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
        return self.dense.has_even_groups and set(self.layers) == {self.dense}

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


def _positive(sizes: Mapping[str, Any], key: str) -> int:
    value = sizes.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {value!r}; it must be a whole number of at least 1")
    return value


def _flag(flag: bool | str, config: Mapping[str, Any]) -> bool:
    value = flag if isinstance(flag, bool) else config.get(flag)
    if not isinstance(value, bool | None):
        raise ValueError(f"{flag} is {value!r}; it must be true or false")
    return bool(value)

"""The shape of a model, layer by layer: the one place that reads and writes sizes in config.json. Pure Python.

A converted model keeps its dense sizes at the top level of config.json and says what each layer really has in
`per_layer_config`, the heterogeneity schema of Hugging Face (transformers PR 45333, read by vLLM since 0.32):

    "per_layer_config": {"0": {"num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 333},
                         "3": {"skip": ["attention"], "intermediate_size": 512}}

A layer that is not listed, and a key that a layer does not list, has the dense value. Three keys are ours, for what
Hugging Face has no word for: `query_heads_per_kv_head` (a list, written when the groups differ),
`expert_intermediate_sizes` (the width of each expert, written when they differ or are all 0) and `constant_experts`
(those of width 0 that output a constant). `num_experts` says how
many experts a layer has, and rows its router, where some are gone altogether, and `shared_expert_intermediate_size` the
width of the MLP beside the experts that every token passes; the same keys in every family.

    geometry = ModelGeometry.from_config(json.load(open("config.json")))
    geometry.layers[3].num_key_value_heads, geometry.num_parameters, geometry.kv_cache_bytes_per_token(2)
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config_values import LARGEST_COUNT, flag, positive, shown, without_nulls
from pruned_vllm.formats.experts import CONSTANT_EXPERTS, NUM_EXPERTS, SHARED_WIDTH, DenseExperts
from pruned_vllm.formats.families import find_family
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.latent import WHY_WHOLE, LatentAttention
from pruned_vllm.formats.layer import ATTENTION_KEYS, LayerGeometry
from pruned_vllm.formats.linear_attention import LinearAttention, linear_layers
from pruned_vllm.formats.sizes import ModelSizes
from pruned_vllm.formats.tensors import Shapes, layer_tensor_shapes

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types")  # of the keys that Transformers and vLLM read for every model
LARGEST_UNITS = 1_000_000  # heads and experts of all layers together


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
        family, problems = find_family(config), _Problems()
        sizes = family.with_defaults(without_nulls(config))
        sizes.pop("skip", None)
        hidden_size, vocab_size = (
            problems.checked("top level", positive, sizes, key) for key in ("hidden_size", "vocab_size")
        )
        num_layers, heads = (
            problems.checked("top level", positive, sizes, key, None, LARGEST_COUNT)
            for key in ("num_hidden_layers", "num_attention_heads")
        )
        if sizes.get("head_dim") is None:
            sizes["head_dim"] = family.default_head_dim
        if sizes["head_dim"] is None and heads and hidden_size:
            sizes["head_dim"] = hidden_size // heads
        latent = None
        if family.latent_attention:
            latent = problems.checked("top level", LatentAttention.from_config, config, sizes)
            sizes["head_dim"] = None if latent is None else latent.qk_rope_head_dim  # as for Hugging Face
        head_dim: Any = None  # without it something it derives from is missing, which is reported already
        if sizes["head_dim"] is not None:
            head_dim = problems.checked("top level", positive, sizes, "head_dim")
        experts = None
        if family.experts is not None:
            experts = problems.checked("top level", DenseExperts.from_config, family.experts, sizes)
        linear = None
        if (stored := family.linear_attention) is not None:
            linear = problems.checked("top level", LinearAttention.from_config, stored, sizes)
        dense_layers, layers = _Layers(family, experts, sizes, num_layers or 0, problems).read()
        tied = problems.checked("top level", flag, "tie_word_embeddings", sizes)
        norms = family.qk_norm
        if family.qk_norm_key is not None and not problems.checked("top level", flag, family.qk_norm_key, sizes):
            norms = None
        names = ("qkv_bias", "o_bias", "mlp_bias")
        biases = {name: problems.checked("top level", flag, getattr(family, name), sizes) for name in names}
        _check_per_layer_lists(config, num_layers, problems)
        for problem in skip_problems(family, layers, bool(biases["o_bias"]), bool(biases["mlp_bias"])):
            problems.add(problem)
        if latent is not None:
            whole = {(), *(layer.query_heads_per_kv_head for layer in dense_layers)}
            for index, layer in enumerate(layers):
                if layer.query_heads_per_kv_head not in whole:
                    problems.add(
                        f"layer {index} has {layer.num_attention_heads} heads, but {family.architecture} {WHY_WHOLE}; "
                        "give it all heads or no attention"
                    )
        if problems:
            raise InputError("config.json describes no valid model:", list(problems))
        return cls(
            family=family,
            hidden_size=hidden_size,
            head_dim=head_dim,
            vocab_size=vocab_size,
            tie_word_embeddings=tied,
            **biases,
            linear_attention=linear,
            experts=experts,
            qk_norm=norms,
            latent=latent,
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
        if self.latent is not None:
            with_attention = sum("attention" not in layer.skip for layer in self.layers)
            return with_attention * self.latent.cache_width * element_bytes
        return 2 * self.num_key_value_heads * self.head_dim * element_bytes

    def state_bytes_per_sequence(self, element_bytes: int) -> int:
        """Bytes that layers with linear attention keep of a sequence, however long it is."""
        layers = sum(layer.linear_attention for layer in self.layers)
        return layers * self.gated_delta_net.state_bytes(element_bytes) if layers else 0


def skip_problems(family: Family, layers: Sequence[LayerGeometry], o_bias: bool, mlp_bias: bool) -> list[str]:
    """Layers whose skipped sublayer leaves a bias that a later norm would make another constant of."""
    if family.can_skip_biased_sublayers:
        return []
    return [
        f"layer {index}: {sublayer} is gone, but its last bias is not zeros once it is normalised, as "
        f"{family.architecture} does; keep at least one unit of it"
        for index, layer in enumerate(layers)
        for sublayer, has_bias in (("attention", o_bias), ("mlp", mlp_bias))
        if has_bias and sublayer in layer.skip
    ]


class _Problems(dict[str, None]):
    """What is wrong with a config.json, in the order in which it was found. One key may be wrong for every layer."""

    def add(self, problem: str) -> None:
        self[problem] = None

    def checked(self, where: str, read: Callable, *args) -> Any:
        """What `read` returns; None if it raises, and then the problem is added."""
        try:
            return read(*args)
        except (ValueError, TypeError) as error:
            self.add(f"{where}: {error}")
            return None


def _check_per_layer_lists(config: Mapping[str, Any], num_layers: int | None, problems: _Problems) -> None:
    """Lists with an entry for each layer may have too many, as when layers were cut out of a model elsewhere."""
    for key in PER_LAYER_LISTS:
        if isinstance(config.get(key), list) and num_layers is not None and len(config[key]) != num_layers:
            problems.add(
                f"{key} has {len(config[key])} entries, but num_hidden_layers is {num_layers}; make them equal"
            )


class _Layers:
    """Reads the layers of a config.json whose top level is `sizes`; what is wrong goes to `problems`."""

    def __init__(
        self,
        family: Family,
        experts: DenseExperts | None,
        sizes: Mapping[str, Any],
        num_layers: int,
        problems: _Problems,
    ) -> None:
        self._sizes, self._num_layers, self._problems = sizes, num_layers, problems
        self._width_key, self._experts = "", experts
        self._with_experts, self._linear = set[int](), set[int]()
        if family.linear_attention is not None:
            self._linear = problems.checked("top level", linear_layers, sizes, num_layers) or set()
        if family.experts is not None:
            self._width_key = family.experts.width_key
            found = problems.checked("top level", family.experts.layers_with_experts, sizes, num_layers)
            self._with_experts = found or set()
        self._units = 0  # heads and experts of the layers that were read

    def read(self) -> tuple[list[LayerGeometry], list[LayerGeometry]]:
        """The layers that the top level describes, and those that `per_layer_config` makes of them.

        Those that cannot be read are left out, and are among the problems.
        """
        dense_layers = [self._layer("top level", index, {}) for index in range(self._num_layers)]
        layers = list(dense_layers)
        for index, overrides in self._overrides().items():
            layers[index] = self._layer(f"per_layer_config['{index}']", index, overrides)
        return _without_none(dense_layers), _without_none(layers)

    def _overrides(self) -> dict[int, dict[str, Any]]:
        """The sizes in `per_layer_config`, by layer."""
        per_layer, overrides = self._sizes.get("per_layer_config") or {}, {}
        if not isinstance(per_layer, Mapping):
            self._problems.add(f"per_layer_config is a {type(per_layer).__name__}; it maps layer indices to sizes")
            return {}
        if len(per_layer) > self._num_layers:
            self._problems.add(f"per_layer_config has {len(per_layer):,} layers, the model {self._num_layers:,}")
            return {}
        # Transformers pads the indices with zeros to the length of the largest when it writes a config.
        lengths = range(1, len(str(self._num_layers - 1)) + 1)
        known = {str(index).zfill(length): index for index in range(self._num_layers) for length in lengths}
        for key, sizes in per_layer.items():
            where = f"per_layer_config[{shown(key)}]"
            if str(key) not in known:
                self._problems.add(f"{where}: not a layer index; the model has layers 0 to {self._num_layers - 1}")
            elif known[str(key)] in overrides:
                self._problems.add(f"{where}: layer {known[str(key)]} is there twice")
            elif not isinstance(sizes, Mapping | None):
                self._problems.add(f"{where}: {shown(sizes)} is no mapping of sizes")
            else:
                overrides[known[str(key)]] = without_nulls(sizes or {})
        return overrides

    def _layer(self, where: str, index: int, overrides: Mapping[str, Any]) -> LayerGeometry | None:
        attention_keys = ("skip",) if index in self._linear else ATTENTION_KEYS
        keys = {*attention_keys, "intermediate_size"}
        num_experts = shared_width = 0
        if index in self._with_experts:
            if self._experts is None:  # reported already
                return None
            keys = {*attention_keys, self._width_key, NUM_EXPERTS, "expert_intermediate_sizes", CONSTANT_EXPERTS}
            keys.add(SHARED_WIDTH)
            num_experts = self._problems.checked(where, self._experts.num_experts_of, overrides)
            shared_width = self._problems.checked(where, self._experts.shared_width_of, overrides)
            if num_experts is None or shared_width is None:
                return None
        if unknown := set(overrides) - keys:
            self._problems.add(f"{where}: unknown keys {sorted(unknown)}; known: {sorted(keys)}")
            return None
        if self._units > LARGEST_UNITS:
            self._problems.add(f"top level: the layers have more than {LARGEST_UNITS:,} heads and experts together")
            return None
        arguments = ({**self._sizes, **overrides}, num_experts, shared_width, self._width_key, index in self._linear)
        layer = self._problems.checked(where, LayerGeometry.from_sizes, *arguments)
        if layer is not None:
            self._units += layer.num_key_value_heads + len(layer.expert_intermediate_sizes)
        return layer


def _without_none(layers: Iterable[LayerGeometry | None]) -> list[LayerGeometry]:
    return [layer for layer in layers if layer is not None]

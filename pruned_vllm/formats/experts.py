"""Mixture-of-experts layers: how a family stores and configures them, and their sizes before pruning. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pruned_vllm.formats.config_values import LARGEST_COUNT, flag, natural, naturals, positive

# Keys of `per_layer_config`. The first one is the same whatever the family calls it at the top level.
NUM_EXPERTS, CONSTANT_EXPERTS = "num_experts", "constant_experts"


@dataclass(frozen=True)
class ExpertsFormat:
    """How a family of models names its experts on disk and in config.json.

    Attributes:
        count_keys: config keys for the number of routed experts; the first one that is there counts, since
            Transformers renamed some.
        width_key: config key of a routed expert's FFN channels.
        module: module of the experts and of their router (`gate`) in a decoder layer.
        projections: an expert's projections: gate, up, down.
        layers: which layers have experts: "all"; "sparse_step": `decoder_sparse_step` and `mlp_only_layers` say so;
            "first_dense": `first_k_dense_replace` and `moe_layer_freq` do.
        shared_module: module of the MLP that every token passes besides the routed experts; None if there is none.
        shared_width_key: config key of that MLP's channels.
        shared_count_key: config key of what multiplies `width_key` to get them, in place of `shared_width_key`.
        shared_gate: module of the linear layer that weighs that MLP's output, if there is one.
        norm_topk_prob: whether the router divides the weights of the experts that it chooses by their sum; a string is
            the config key that says so (absent means False).
        bias: whether the projections of routed experts have biases. That of the down projection stays where an
            expert has lost all of its channels.
        activation: what a channel makes of its gate and up, by vLLM's names; kernels/ragged_moe_arguments.py has the
            formulas.
        router_name: the router's module in `module`.
        router_bias: whether the router has a bias, which is part of its logits.
        fused: how the files of a dense model hold all experts of a layer; a converted model has tensors for each.
            None: as a converted model. "interleaved": see pruned_vllm/formats/fused_experts.py.
    """

    count_keys: tuple[str, ...]
    width_key: str = "moe_intermediate_size"
    module: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    layers: Literal["all", "sparse_step", "first_dense"] = "all"
    shared_module: str | None = None
    shared_width_key: str | None = None
    shared_count_key: str | None = None
    shared_gate: str | None = None
    norm_topk_prob: bool | str = "norm_topk_prob"
    bias: bool = False
    activation: Literal["silu", "gelu", "gelu_tanh", "swigluoai"] = "silu"
    router_name: str = "gate"
    router_bias: bool = False
    fused: Literal["interleaved"] | None = None

    @property
    def router(self) -> str:
        """The router's module in a decoder layer; its weight is [experts, hidden_size]."""
        return f"{self.module}.{self.router_name}"

    @property
    def router_tensors(self) -> tuple[str, ...]:
        """The tensors in a decoder layer that have a row for each expert."""
        return (f"{self.router}.weight", *[f"{self.router}.bias"] * self.router_bias)

    @property
    def is_linear_in_up(self) -> bool:
        """Whether a factor of up is a factor of what the activation makes of gate and up: not if up is clamped."""
        return self.activation != "swigluoai"

    def with_count(self, config: Mapping[str, Any], count: int) -> dict[str, int]:
        """The keys of a config.json that say the number of experts, with another one; it may have several of them."""
        keys = (*self.count_keys, NUM_EXPERTS)
        return {key: count for key in keys if config.get(key) is not None}

    def modules_of(self, expert: int) -> tuple[str, str, str]:
        """The gate, up and down projection of a routed expert, as modules in a decoder layer."""
        gate, up, down = (f"{self.module}.experts.{expert}.{projection}" for projection in self.projections)
        return gate, up, down

    def layers_with_experts(self, config: Mapping[str, Any], num_layers: int) -> set[int]:
        """The layers that have experts in place of one dense MLP. Raises ValueError."""
        if self.layers == "sparse_step":
            step = positive(config, "decoder_sparse_step", default=1)
            return set(range(step - 1, num_layers, step)) - set(naturals(config, "mlp_only_layers"))
        if self.layers == "first_dense":
            step, first = positive(config, "moe_layer_freq", default=1), natural(config, "first_k_dense_replace", 0)
            return {index for index in range(0, num_layers, step) if index >= first}
        return set(range(num_layers))


@dataclass(frozen=True)
class DenseExperts:
    """The experts of a model before pruning, the same in every layer that has any.

    Attributes:
        num_experts: routed experts.
        num_experts_per_tok: experts that the router chooses for each token.
        intermediate_size: FFN channels of a routed expert.
        shared_intermediate_size: FFN channels of the MLP that every token passes besides; 0 if there is none. It is
            never pruned.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int
    norm_topk_prob: bool

    @classmethod
    def from_config(cls, experts: ExpertsFormat, config: Mapping[str, Any]) -> "DenseExperts":
        """Reads the top level of config.json. Raises ValueError with the first key that is wrong."""
        present = [key for key in experts.count_keys if config.get(key) is not None]
        count = positive(config, (present or experts.count_keys)[0], most=LARGEST_COUNT)
        chosen = positive(config, "num_experts_per_tok")
        if chosen > count:
            raise ValueError(f"num_experts_per_tok is {chosen}, but there are {count} experts")
        width, shared = positive(config, experts.width_key), 0
        if experts.shared_width_key is not None:
            shared = natural(config, experts.shared_width_key, 0)
        elif experts.shared_count_key is not None and config.get(experts.shared_count_key) is not None:
            shared = width * natural(config, experts.shared_count_key, 0)
        return cls(count, chosen, width, shared, flag(experts.norm_topk_prob, config))

    def num_experts_of(self, overrides: Mapping[str, Any]) -> int:
        """The experts of a layer, of which `per_layer_config` says `overrides`. Raises ValueError with the numbers."""
        count = positive(overrides, NUM_EXPERTS, default=self.num_experts, most=LARGEST_COUNT)
        if count > self.num_experts:
            raise ValueError(f"{NUM_EXPERTS} is {count}, but a layer had {self.num_experts} before pruning")
        if count < self.num_experts_per_tok:
            raise ValueError(self.too_few(count))
        return count

    def too_few(self, count: int) -> str:
        """Why a layer cannot have `count` experts, which are fewer than a token is sent to."""
        return f"{NUM_EXPERTS} is {count}, but the router chooses {self.num_experts_per_tok} (num_experts_per_tok)"

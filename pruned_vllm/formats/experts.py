"""Mixture-of-experts layers: how a family stores and configures them, and their sizes before pruning. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pruned_vllm.formats.config_values import LARGEST_COUNT, flag, natural, naturals, number, positive, shown

# Keys of `per_layer_config`. The first one is the same whatever the family calls it at the top level.
SHARED_WIDTH = "shared_expert_intermediate_size"  # of a layer in per_layer_config, whatever the family
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
            "first_dense": `first_k_dense_replace` and `moe_layer_freq` do; "mlp_types": `mlp_layer_types` does, and all
            but the first have some where it is absent.
        shared_module: module of the MLP that every token passes besides the routed experts; None if there is none.
        shared_width_key: config key of that MLP's channels.
        shared_count_key: config key of what multiplies `width_key` to get them, in place of `shared_width_key`.
        shared_gate: module of the linear layer that weighs that MLP's output, if there is one.
        norm_topk_prob: whether the router divides the weights of the experts that it chooses by their sum; a string is
            the config key that says so (absent means False).
        scoring: what makes a score of a router's logit; the weights of experts are scores.
        correction_bias: tensor of the router that is added to scores where experts are chosen, and not to weights; it
            is float32. None if there is none.
        grouped: whether `n_group` and `topk_group` of config.json may say that a token's experts are from the best
            groups alone. `topk_method` "greedy" says that they are not.
        scaling_key: config key of what the weights are multiplied by at last; absent means 1.
        float32_router: whether logits are computed in float32, whatever the dtype of the model is.
        bias: whether the projections of routed experts have biases. That of the down projection stays where an
            expert has lost all of its channels.
        may_be_fused: whether files of a dense model may hold all experts of a layer in two tensors,
            `experts.gate_up_proj` [experts, 2 * channels, hidden_size], gate before up, and `experts.down_proj`
            [experts, hidden_size, channels].
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
    layers: Literal["all", "sparse_step", "first_dense", "mlp_types"] = "all"
    shared_module: str | None = None
    shared_width_key: str | None = None
    shared_count_key: str | None = None
    shared_gate: str | None = None
    norm_topk_prob: bool | str = "norm_topk_prob"
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: str | None = None
    grouped: bool = False
    scaling_key: str | None = None
    float32_router: bool = False
    bias: bool = False
    may_be_fused: bool = False
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
        parts = ("weight", *["bias"] * self.router_bias, *[self.correction_bias] * bool(self.correction_bias))
        return tuple(f"{self.router}.{part}" for part in parts)

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
        if self.layers == "mlp_types":
            types = config.get("mlp_layer_types")
            if types is None:
                return set(range(1, num_layers))
            if not isinstance(types, list | tuple) or not {*map(str, types)} <= {"dense", "sparse"}:
                raise ValueError(f"mlp_layer_types is {shown(types)}; it must be a list of 'dense' and 'sparse'")
            return {index for index, kind in enumerate(types[:num_layers]) if kind == "sparse"}
        return set(range(num_layers))


@dataclass(frozen=True)
class DenseExperts:
    """The experts of a model before pruning, the same in every layer that has any.

    Attributes:
        num_experts: routed experts.
        num_experts_per_tok: experts that the router chooses for each token.
        intermediate_size: FFN channels of a routed expert.
        shared_intermediate_size: FFN channels of the MLP that every token passes besides; 0 if there is none.
        norm_topk_prob: whether the weights of a token's experts are divided by their sum.
        num_expert_group, topk_group: groups of equally many consecutive experts, and how many of them a token's experts
            are chosen from; 1 and 1 where all experts are alike.
        routed_scaling_factor: what the weights are multiplied by at last.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int
    norm_topk_prob: bool
    num_expert_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0

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
        groups = (1, 1)
        if experts.grouped and config.get("topk_method") != "greedy":
            groups = positive(config, "n_group", 1), positive(config, "topk_group", 1)
        factor = 1.0 if experts.scaling_key is None else number(config, experts.scaling_key, 1.0)
        result = cls(count, chosen, width, shared, flag(experts.norm_topk_prob, config), *groups, factor)
        if problem := result.group_problem(count):
            raise ValueError(problem)
        return result

    def num_experts_of(self, overrides: Mapping[str, Any]) -> int:
        """The experts of a layer, of which `per_layer_config` says `overrides`. Raises ValueError with the numbers."""
        count = positive(overrides, NUM_EXPERTS, default=self.num_experts, most=LARGEST_COUNT)
        if count > self.num_experts:
            raise ValueError(f"{NUM_EXPERTS} is {count}, but a layer had {self.num_experts} before pruning")
        if count < self.num_experts_per_tok:
            raise ValueError(self.too_few(count))
        if problem := self.group_problem(count):
            raise ValueError(problem)
        return count

    def shared_width_of(self, overrides: Mapping[str, Any]) -> int:
        """Channels of the MLP of a layer that every token passes. Raises ValueError where there is none to have any."""
        width = natural(overrides, SHARED_WIDTH, self.shared_intermediate_size)
        if width and not self.shared_intermediate_size:
            raise ValueError(f"{SHARED_WIDTH} is {width}, but the model has no such MLP")
        return width

    def group_problem(self, count: int) -> str | None:
        """Why the router cannot choose among `count` experts by groups; None where it can, or there is one group."""
        groups, chosen = self.num_expert_group, self.topk_group
        if groups == 1 and chosen == 1:
            return None
        size, rest = divmod(count, groups)
        if rest or size < 2:  # groups are compared by their two best experts
            return f"{count} experts are not {groups} groups (n_group) of equally many, at least 2"
        if chosen > groups or chosen * size < self.num_experts_per_tok:
            return (
                f"topk_group is {chosen}: so many of {groups} groups of {size} experts have not the "
                f"{self.num_experts_per_tok} that a token goes to (num_experts_per_tok)"
            )
        return None

    def too_few(self, count: int) -> str:
        """Why a layer cannot have `count` experts, which are fewer than a token is sent to."""
        return f"{NUM_EXPERTS} is {count}, but the router chooses {self.num_experts_per_tok} (num_experts_per_tok)"

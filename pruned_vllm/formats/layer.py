"""The sizes of one decoder layer, and the keys of `per_layer_config` that say them. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruned_vllm.formats.config_values import LARGEST_COUNT, naturals, positive, shown
from pruned_vllm.formats.experts import CONSTANT_EXPERTS, NUM_EXPERTS, SHARED_WIDTH

ATTENTION_KEYS = ("num_attention_heads", "num_key_value_heads", "query_heads_per_kv_head", "skip")


@dataclass(frozen=True)
class LayerGeometry:
    """One decoder layer.

    Attributes:
        query_heads_per_kv_head: for each KV head, how many query heads read it; () where attention is gone or linear.
        intermediate_size: FFN channels of the MLP that every token passes: in a layer with experts that of the shared
            ones. 0 where there is none.
        expert_intermediate_sizes: FFN channels of each routed expert that the layer has; () for a layer with a dense
            MLP or none. 0 is an expert that outputs zeros; the router still sees it. A layer whose experts are all 0
            skips nothing.
        constant_experts: those among the experts without channels that output a constant, the bias of their down
            projection, in ascending order (MoNE, arXiv 2507.00390).
        linear_attention: whether it has a gated delta net in place of attention, which pruning leaves as it is.
    """

    query_heads_per_kv_head: tuple[int, ...]
    intermediate_size: int
    expert_intermediate_sizes: tuple[int, ...] = ()
    constant_experts: tuple[int, ...] = ()
    linear_attention: bool = False

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

    def shares_heads_evenly(self, ranks: int) -> bool:
        """Whether so many tensor-parallel ranks share the heads as stock classes do, without padding."""
        kv_heads = self.num_key_value_heads
        return (
            ranks == 1
            or not kv_heads
            or (
                self.has_even_groups
                and self.num_attention_heads % ranks == 0
                and (kv_heads % ranks == 0 or ranks % kv_heads == 0)
            )
        )

    @property
    def expert_width(self) -> int:
        """The width that all experts have in common; 0 where they differ, have no channels or do not exist."""
        widths = set(self.expert_intermediate_sizes)
        return widths.pop() if len(widths) == 1 else 0

    @property
    def skip(self) -> list[str]:
        """The sublayers that are gone, in the words of `per_layer_config`."""
        has_mlp = self.intermediate_size or self.expert_intermediate_sizes
        has_attention = self.query_heads_per_kv_head or self.linear_attention
        return ["attention"] * (not has_attention) + ["mlp"] * (not has_mlp)

    @classmethod
    def from_sizes(
        cls,
        sizes: Mapping[str, Any],
        num_experts: int = 0,
        shared_width: int = 0,
        width_key: str = "",
        linear_attention: bool = False,
    ) -> "LayerGeometry":
        """Reads the flat keys of a layer (or of the top level). Raises ValueError with the numbers.

        Args:
            num_experts: that the layer has; 0 for a layer with a dense MLP.
            shared_width: channels of the MLP that every token passes, in a layer with experts.
            width_key: the family's key for the width of all experts.
            linear_attention: whether it has such in place of attention.
        """
        skip = sizes.get("skip") or []
        known = ["attention"] * (not linear_attention) + ["mlp"] * (not num_experts)
        if not set(skip) <= set(known):
            kinds = ["linear attention"] * linear_attention + ["experts"] * (num_experts > 0)
            kind = f"a layer with {' and '.join(kinds)}" if kinds else "it"
            raise ValueError(f"skip is {skip}; {kind} may name {' and '.join(map(repr, known)) or 'nothing'}")
        counts = ("num_attention_heads", "num_key_value_heads")
        heads, kv_heads = (positive(sizes, key, most=LARGEST_COUNT) for key in counts)
        groups = sizes.get("query_heads_per_kv_head")
        if "attention" in skip or linear_attention:
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
            constants = naturals(sizes, CONSTANT_EXPERTS)
            empty = [expert for expert, width in enumerate(widths) if not width]
            if list(constants) != sorted({*constants} & {*empty}):
                raise ValueError(
                    f"{CONSTANT_EXPERTS} is {shown(list(constants))}; it must name experts without channels, in "
                    f"ascending order, and those are {shown(empty)}"
                )
            return cls(tuple(groups), shared_width, widths, constants, linear_attention)
        width = positive(sizes, "intermediate_size")
        return cls(tuple(groups), 0 if "mlp" in skip else width, linear_attention=linear_attention)

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
        if self.expert_intermediate_sizes:
            if self.intermediate_size != dense.intermediate_size:
                overrides[SHARED_WIDTH] = self.intermediate_size
        elif self.intermediate_size not in (0, dense.intermediate_size):
            overrides["intermediate_size"] = self.intermediate_size
        if len(self.expert_intermediate_sizes) != len(dense.expert_intermediate_sizes):
            overrides[NUM_EXPERTS] = len(self.expert_intermediate_sizes)
        if not self.expert_width and self.expert_intermediate_sizes:
            overrides["expert_intermediate_sizes"] = list(self.expert_intermediate_sizes)
        elif self.expert_width != dense.expert_width:
            overrides[width_key] = self.expert_width
        if self.constant_experts:
            overrides[CONSTANT_EXPERTS] = list(self.constant_experts)
        return overrides

"""What distinguishes an architecture for pruning: the type of the rows in families.py. Pure Python."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pruned_vllm.formats.experts import ExpertsFormat
from pruned_vllm.formats.latent import WHY_WHOLE
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.linear_attention import Projections

PRUNED_PREFIX = "Pruned"  # PrunedLlamaForCausalLM: an architecture that a vLLM without the plugin refuses to load


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_type: `model_type` of config.json.
        architecture: the stock name in `architectures`.
        qkv_bias, o_bias, mlp_bias: whether these projections have a bias; a string is the config key that says so
            (absent means False).
        qk_norm: q and k are RMS-normalised, each head by itself ("head": weights `q_norm`, `k_norm` of size [head_dim])
            or all heads of a token together ("all_heads": a weight for each row of the projection).
        output_gate: whether q_proj has, head by head, as many rows again for a gate: its sigmoid multiplies the output
            of that head before o_proj.
        linear_attention: how layers with a gated delta net store it, in a family where only some layers have attention;
            pruned_vllm/formats/linear_attention.py says which.
        qk_norm_key: config key that says whether they are (absent means no); None where they always are.
        latent_attention: whether attention is that of pruned_vllm/formats/latent.py.
        attention_norms, mlp_norms: the norms of a sublayer, modules of the decoder layer. The first is before the
            sublayer, later ones normalise its output before that is added to the hidden states. A sublayer that is
            skipped has none of them.
        norms_add_one: whether norms multiply by 1 + weight in place of the weight.
        activation: of the gated MLP; ACTIVATIONS has the names that config.json gives it.
        activation_key: config key of the activation.
        query_scale_key: config key of the number whose root divides the products of q and k; None means head_dim.
        scales_embedding: whether the output of the embedding is multiplied by the root of hidden_size.
        multipliers: config keys of numbers that embeddings, what a sublayer adds, and products of q and k are
            multiplied by, and that logits are divided by; absent means 1. () in most families.
        sinks: whether each query head has a number, `sinks` of attention [query heads], that its softmax counts as the
            logit of one token more, whose value is zeros.
        fused: projections that the files of a dense model hold as one tensor, and the parts of its rows, as modules of
            a decoder layer. Transformers has such a module, too. A converted model has the parts.
        experts: where the experts are, in a family that has any.
        defaults: config keys that old config.json files leave out, with the values that the stock code takes then. A
            value that is a str is the key whose value it is.
        default_head_dim: head_dim where config.json has none; None means hidden_size // num_attention_heads.
        stock_heads: numbers of attention heads that the stock code accepts when every layer has the same:
            "any"; "divides_hidden" (LlamaConfig refuses others even with an explicit head_dim);
            "fills_hidden" (vLLM's Qwen2 takes hidden_size // num_attention_heads for head_dim).
    """

    model_type: str
    architecture: str
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: Literal["head", "all_heads"] | None = None
    output_gate: bool = False
    linear_attention: Projections | None = None
    qk_norm_key: str | None = None
    latent_attention: bool = False
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)
    norms_add_one: bool = False
    activation: Literal["silu", "gelu_tanh"] = "silu"
    activation_key: str = "hidden_act"
    query_scale_key: str | None = None
    scales_embedding: bool = False
    multipliers: tuple[str, ...] = ()
    sinks: bool = False
    fused: tuple[tuple[str, tuple[str, ...]], ...] = ()
    experts: ExpertsFormat | None = None
    defaults: tuple[tuple[str, Any], ...] = ()
    default_head_dim: int | None = None
    stock_heads: Literal["any", "divides_hidden", "fills_hidden"] = "any"

    @property
    def pruned_architecture(self) -> str:
        """Name in `architectures` of a converted model; served by the plugin's class of the same name."""
        return PRUNED_PREFIX + self.architecture

    @property
    def experts_format(self) -> ExpertsFormat:
        """`experts`, for code about layers that have some. Raises ValueError in a family without experts."""
        if self.experts is None:
            raise ValueError(f"{self.architecture} has no experts")
        return self.experts

    @property
    def stores_fused(self) -> bool:
        """Whether the files of a dense model, and so the stock code, have tensors that a converted model has not."""
        return bool(self.fused) or (self.experts is not None and self.experts.fused is not None)

    def norms_of(self, sublayer: str) -> tuple[str, ...]:
        """All norms that go with a sublayer ("attention" or "mlp"), also those inside of it."""
        inside = ("self_attn.q_norm", "self_attn.k_norm") if self.qk_norm is not None else ()
        if self.latent_attention:
            inside = ("self_attn.q_a_layernorm", "self_attn.kv_a_layernorm")
        return (*self.attention_norms, *inside) if sublayer == "attention" else self.mlp_norms

    def mlp_of(self, layer: LayerGeometry) -> str:
        """The MLP of a decoder layer that every token passes, as a module of it: "mlp" but in a layer with experts."""
        if layer.expert_intermediate_sizes:
            return self.experts_format.shared_module or ""
        return "mlp"

    def query_rows(self, head_dim: int) -> int:
        """Rows of q_proj for each query head."""
        return head_dim * (1 + self.output_gate)

    @property
    def can_lose_heads(self) -> bool:
        """Whether some heads of a layer may go while others stay."""
        return self.why_heads_stay is None

    @property
    def why_heads_stay(self) -> str | None:
        """What the architecture does that keeps some heads from going without the others; None where they can."""
        if self.qk_norm == "all_heads":
            return "normalises q and k over all heads together, so the others would change without some of them"
        return WHY_WHOLE if self.latent_attention else None

    @property
    def can_skip_biased_sublayers(self) -> bool:
        """Whether a sublayer that loses all its heads or channels may end in a bias.

        A later norm does not make zeros of a bias alone, so it would have to stay and be computed for every token.
        """
        return len(self.attention_norms) == len(self.mlp_norms) == 1

    def with_defaults(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """`config` with the keys that it leaves out."""
        absent = {key: value for key, value in self.defaults if config.get(key) is None}
        values = {key: config.get(value) if isinstance(value, str) else value for key, value in absent.items()}
        return {**config, **values}

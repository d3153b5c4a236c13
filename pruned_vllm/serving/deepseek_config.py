"""The config class of DeepSeekMoE-16B, which Transformers does not have and the model ships as code.

Registering it lets vLLM and Transformers read such a config.json without running code from a checkpoint.
"""

from transformers import AutoConfig, PreTrainedConfig


class DeepseekConfig(PreTrainedConfig):
    """`model_type` deepseek.

    The sizes are those of deepseek-ai/deepseek-moe-16b-base. Which layers have experts, and shared ones, is what the
    published class takes for a config.json that does not say so: all layers, and none.
    """

    model_type = "deepseek"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "n_routed_experts"}

    vocab_size: int = 102400
    hidden_size: int = 2048
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 28
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 16
    n_shared_experts: int | None = None
    n_routed_experts: int | None = 64
    num_experts_per_tok: int | None = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


def register() -> None:
    """Tells AutoConfig about it. May be called again."""
    AutoConfig.register(DeepseekConfig.model_type, DeepseekConfig, exist_ok=True)

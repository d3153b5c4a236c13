"""The config class that a checkpoint of DeepSeekMoE-16B brings, written as for Transformers 4: `rope_theta` and
`rope_scaling` are attributes of their own."""

from transformers import PretrainedConfig


class DeepseekConfig(PretrainedConfig):
    model_type = "deepseek"

    def __init__(
        self,
        num_experts_per_tok=None,
        norm_topk_prob=False,
        aux_loss_alpha=0.001,
        use_cache=True,
        rope_theta=10000.0,
        rope_scaling=None,
        **kwargs,
    ):
        self.num_experts_per_tok = num_experts_per_tok
        self.norm_topk_prob = norm_topk_prob
        self.aux_loss_alpha = aux_loss_alpha
        self.use_cache = use_cache
        self.rope_theta = rope_theta
        self.rope_scaling = rope_scaling
        super().__init__(**kwargs)

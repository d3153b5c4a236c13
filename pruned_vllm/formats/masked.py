"""Names in the masked checkpoint, the format between learn-masks and convert-pruned (README, Formats). Pure Python."""

MASKS_FILE = "pruning_masks.safetensors"
HEAD_MASK = "model.layers.{}.self_attn.head_mask"  # [num_attention_heads]
CHANNEL_MASK = "model.layers.{}.mlp.channel_mask"  # [intermediate_size]; only layers with a dense MLP
EXPERT_MASK = "model.layers.{}.mlp.experts.channel_mask"  # [num_experts, moe_intermediate_size], whatever the family

PRUNING_FILE = "pruning.json"
PRUNING_KEYS = (
    "format_version",
    "method",
    "channel_mask_site",
    "base_model",
    "lora_adapter",
    "base_revision",  # optional: commit of a base_model of the hub
    "base_fingerprint",  # optional: of the weights that the masks belong to, see fingerprint.py
)
FORMAT_VERSION = 1
CHANNEL_MASK_SITES = ("product", "gate_and_up")  # the mask multiplied act(gate) * up, or both projections before act

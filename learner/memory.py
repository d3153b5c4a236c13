"""How much memory learning takes, computed from config.json alone. Pure Python.

What a step holds on a device, in bytes:

- weights: where they are says how many; where they are sharded, the layers that are being gathered besides.
- activations: what the student's forward pass keeps for the backward pass. As the weights are frozen, no input of a
  projection is kept; what is kept are the inputs of norms (in float32), of attention, of SiLU and of each product with
  a mask. With gradient checkpointing it is the input of every layer, and all of one layer.
- teacher: the teacher is the same model without masks, so it has no weights of its own; its hidden states stay until
  the loss is computed.
- loss: logits of as many tokens as learner/model/loss.py takes at once, several times.
- masks and optimizer: four float32 for each mask, and for each weight of LoRA.

tests/learner/test_plan.py holds the activations against what PyTorch really keeps.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from learner.job import METHODS, Job
from learner.settings import CalibrationSettings, MaskPruneSettings, TrainingSettings
from pruned_vllm.formats.geometry import ModelGeometry

LOGITS_AT_ONCE = 1 << 26  # of a loss, tokens times vocabulary: 256 MiB in float32
LOGITS_COPIES = 6  # of them in float32, in a loss of student and teacher
# Where weights are sharded: the layer that is computed, the next, and the buffer that it comes through.
LAYERS_GATHERED = 3
OPTIMIZER_BYTES = 16  # a parameter, its gradient, and two moments of Adam
CUDA_BYTES = 1.5e9  # context and libraries
CPU_BYTES = 0.6e9  # Python and PyTorch
FRAGMENTED = 0.05  # share of the rest that the allocator cannot use


@dataclass(frozen=True)
class Needs:
    """Bytes that one process takes.

    Attributes:
        device: by purpose, on its device.
        host: by purpose, of CPU memory, beside those where the device is the CPU.
    """

    device: Mapping[str, float]
    host: Mapping[str, float]

    @property
    def total(self) -> float:
        """On the device."""
        return sum(self.device.values())


def needs(geometry: ModelGeometry, job: Job, element_bytes: int, tokens: int, devices: int, on_gpu: bool) -> Needs:
    """What a process takes.

    Args:
        job: with settings and weights, one of PLACES.
        element_bytes: of a weight.
        tokens: in one forward pass.
        devices: processes, or with weights that are spread, devices of one process.
        on_gpu: whether the devices are not the CPU.
    """
    weights = geometry.num_parameters * element_bytes
    layer = max(map(geometry.layer_parameters, range(len(geometry.layers)))) * element_bytes
    head = geometry.vocab_size * geometry.hidden_size * element_bytes
    hidden = tokens * geometry.hidden_size
    device: dict[str, float] = {}
    host: dict[str, float] = {}
    if job.method == "tyr":
        return _tyr(geometry, job, element_bytes, devices, on_gpu)
    if job.weights == "sharded":
        device["weights"] = weights / devices
        device["weights, gathered"] = min(weights, LAYERS_GATHERED * layer + head)
    elif job.weights == "spread":
        device["weights"] = min(weights, weights / devices + layer)
    elif job.weights == "offloaded":
        device["weights"] = max(2 * layer, head)
        host["weights"] = weights
    else:
        device["weights"] = weights
        host["weights, until they are on the device"] = weights if on_gpu else 0
    share = devices if job.weights == "spread" else 1  # of the layers on one device
    if isinstance(job.settings, TrainingSettings):
        device["activations"] = _kept(geometry, job, element_bytes, tokens) / share
        device["gradients of activations"] = 2 * hidden * element_bytes + 2 * max(_widths(geometry)) * tokens * 4
        device["teacher"] = _teacher(geometry, job, element_bytes, hidden) / share
        device["loss"] = _loss(geometry, tokens)
        device["masks and optimizer"] = OPTIMIZER_BYTES * (_units(geometry) + _lora(geometry, job))
    elif job.method == "taylor":  # weights are trained, so the inputs of their projections are kept too
        inputs = 2 * geometry.hidden_size * element_bytes
        gradients = element_bytes * sum(map(geometry.layer_parameters, range(len(geometry.layers))))
        device["gradients"] = gradients / share
        device["activations"] = tokens * sum(size + inputs for size in _layer_bytes(geometry, element_bytes)) / share
        device["loss"] = _loss(geometry, tokens)
    elif isinstance(job.settings, CalibrationSettings):
        device["activations"] = max(_layer_bytes(geometry, element_bytes)) * tokens
    device["CUDA" if on_gpu else "Python and PyTorch"] = CUDA_BYTES if on_gpu else CPU_BYTES
    device["fragments"] = FRAGMENTED * sum(device.values()) if on_gpu else 0
    return Needs(
        {name: size for name, size in device.items() if size}, {name: size for name, size in host.items() if size}
    )


def _kept(geometry: ModelGeometry, job: Job, element_bytes: int, tokens: int) -> float:
    """For the backward pass."""
    layers = _layer_bytes(geometry, element_bytes)
    if isinstance(job.settings, MaskPruneSettings) and job.settings.lora_rank:  # inputs of the adapters, in float32
        size = 4 * (3 * geometry.hidden_size + max(_widths(geometry)))
        layers = [layer + size for layer in layers]
    if not job.settings.gradient_checkpointing:
        return tokens * sum(layers)
    return tokens * (len(layers) * geometry.hidden_size * element_bytes + max(layers))


def _layer_bytes(geometry: ModelGeometry, element_bytes: int) -> list[float]:
    """By layer, what is kept of one token."""
    sizes: list[float] = []
    for layer in geometry.layers:
        heads, head_dim = layer.num_attention_heads, geometry.head_dim
        norms = 2 * geometry.hidden_size
        if layer.linear_attention:  # about: queries, keys, values, gates, and states in float32
            attention = 12 * geometry.hidden_size
        elif geometry.latent is not None:
            latent = geometry.latent
            query = latent.qk_nope_head_dim + latent.qk_rope_head_dim
            attention = heads * (2 * query + 3 * latent.v_head_dim) + latent.kv_lora_rank + (latent.q_lora_rank or 0)
        else:  # q, k, v, and what comes out
            attention = 2 * (heads + layer.num_key_value_heads) * head_dim
            norms += (heads + layer.num_key_value_heads) * head_dim if geometry.qk_norm else 0
        mlp = 4 * layer.intermediate_size  # gate, SiLU(gate), up, and their product for the mask
        if geometry.experts and layer.expert_intermediate_sizes:
            experts = geometry.experts
            # Its two halves of gate_up, SiLU(gate), product and mask; and the output for the router's weight.
            mlp = experts.num_experts_per_tok * (5 * experts.intermediate_size + geometry.hidden_size)
            mlp += 3 * experts.shared_intermediate_size
        sizes.append(4 * norms + element_bytes * (attention + mlp))
    return sizes


def _widths(geometry: ModelGeometry) -> list[int]:
    """Of the widest activation of each layer."""
    experts = geometry.experts
    routed = (
        experts.num_experts_per_tok * experts.intermediate_size + experts.shared_intermediate_size if experts else 0
    )
    return [routed if layer.expert_intermediate_sizes else layer.intermediate_size for layer in geometry.layers]


def _teacher(geometry: ModelGeometry, job: Job, element_bytes: int, hidden: int) -> float:
    if isinstance(job.settings, MaskPruneSettings):  # hidden states of all layers, of both models, and in float32
        return (2 * element_bytes + (8 if element_bytes < 4 else 0)) * hidden * (len(geometry.layers) + 1)
    return hidden * element_bytes if job.settings.kd_weight else 0


def _loss(geometry: ModelGeometry, tokens: int) -> float:
    return LOGITS_COPIES * 4 * min(tokens * geometry.vocab_size, max(LOGITS_AT_ONCE, geometry.vocab_size))


def _units(geometry: ModelGeometry) -> int:
    return sum(
        layer.num_attention_heads + layer.intermediate_size + sum(layer.expert_intermediate_sizes)
        for layer in geometry.layers
    )


def _lora(geometry: ModelGeometry, job: Job) -> int:
    if not isinstance(job.settings, MaskPruneSettings):
        return 0
    per_rank = 0
    for layer in geometry.layers:
        q, kv = layer.num_attention_heads * geometry.head_dim, layer.num_key_value_heads * geometry.head_dim
        per_rank += 4 * geometry.hidden_size + 2 * q + 2 * kv
        per_rank += 3 * (geometry.hidden_size + layer.intermediate_size) if layer.intermediate_size else 0
    return job.settings.lora_rank * per_rank


def _tyr(geometry: ModelGeometry, job: Job, element_bytes: int, devices: int, on_gpu: bool) -> Needs:
    """A block, H of its sublayers, and a few matrices of that size while one is pruned; hidden states of a stage."""
    widest = max(
        max(layer.intermediate_size, layer.num_attention_heads * geometry.head_dim) for layer in geometry.layers
    )
    experts = geometry.experts
    matrices = 4 * widest**2 * 5
    if experts:
        matrices += 4 * experts.num_experts * experts.intermediate_size**2
    block = max(map(geometry.layer_parameters, range(len(geometry.layers)))) * element_bytes
    hidden = geometry.hidden_size * element_bytes
    head = geometry.vocab_size * geometry.hidden_size * element_bytes
    stage = (job.settings.offspring / devices + 1) * job.settings.selection_tokens / 64 * hidden * 2
    last = 6 * job.settings.selection_tokens * hidden
    device = {"a block": block, "H and its inverses": matrices, "lm_head": head, "hidden states": max(stage, last)}
    device["CUDA" if on_gpu else "Python and PyTorch"] = CUDA_BYTES if on_gpu else CPU_BYTES
    text = job.settings.calibration_sequences * (job.settings.sequence_length or 0) * hidden / devices
    host = {"weights": geometry.num_parameters * element_bytes, "hidden states of the text": text}
    return Needs(device, host)


def places(job: Job, devices: int) -> list[str]:
    """Of PLACES, those that the method has and that make a difference with so many devices."""
    useless = {"sharded", "spread"} if devices == 1 else set()
    return [place for place in METHODS[job.method].places if place not in useless]

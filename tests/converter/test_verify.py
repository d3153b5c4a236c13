"""The comparison of what was written with what was read: what it is held to itself, and which faults it finds."""

from dataclasses import replace

import pytest
import torch
from helpers.lora import MODULES, write_adapter
from helpers.masked import RAGGED, convert_pruned
from helpers.tiny import HF_MOE, MOE_CONFIGS, expert_masks, llama3_rope, masks_for, tiny_model, write_masked
from torch import nn

from converter import plan as plan_module
from converter.convert import convert
from converter.fold import cut_layer
from converter.plan import Plan, make_plan
from converter.reference import ReferenceModel
from converter.source import HiddenMask
from converter.verify import check_conversion
from learner.model.masking import apply_masks
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.masked import CHANNEL_MASK_SITES, layer_masks

LENGTHS = (1, 5, 17)
TOKENS = torch.randint(256, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))
SOFT_HEADS = [[1, -2, 0.5, 3, 0.1, 1]] * 3  # none is removed, as OLMoE wants it


def log_probabilities(model: ReferenceModel) -> torch.Tensor:
    states = model.embed(TOKENS)
    for index in range(len(model.geometry.layers)):
        states, _ = model.layer(index, states, LENGTHS)
    return model.log_probabilities(states)


def expected(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits = [model(input_ids=prompt[None]).logits[0] for prompt in TOKENS.split(list(LENGTHS))]
    return torch.cat(logits).log_softmax(-1)


def reference(plan: Plan, masks: dict[str, torch.Tensor] | None = None, **changes) -> ReferenceModel:
    """The dense model of a plan whose masks change nothing, with others."""
    weights = plan.checkpoint
    if masks is not None:
        changes["masks"] = layer_masks(masks, len(plan.dense.layers))
    return ReferenceModel(
        weights.config, plan.dense, lambda name: weights.read(name) if name in weights.tensors else None, **changes
    )


SOME_WINDOWS = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "use_sliding_window": True,
}
LONGROPE = {  # the longest prompt takes long_factor, the others short_factor
    "hidden_size": 192,
    "original_max_position_embeddings": 8,
    "rope_parameters": {
        **{"rope_type": "longrope", "rope_theta": 1e4},
        **{"short_factor": [1.0 + i / 4 for i in range(16)], "long_factor": [2.0 + i for i in range(16)]},
    },
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"mscale": 0.7, "mscale_all_dim": 0.5, "beta_fast": 32, "beta_slow": 1}
GROUPS = {"n_group": 2, "topk_group": 1}
NO_SUCH_MASKS = ("gpt_oss", "gate_and_up")
CONFIGS = {
    **{name: (name, {}) for name in FAMILIES},
    "llama with biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3 angles": ("llama", {"rope_parameters": llama3_rope(16)}),
    "linear angles": ("qwen3", {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}}),
    "some layers dense": ("qwen3_moe", {"decoder_sparse_step": 2}),
    "window in all layers": ("mistral", {"sliding_window": 8}),
    "windows in some layers": ("qwen3", SOME_WINDOWS),
    "gemma3 with biases, not tied": ("gemma3_text", {"attention_bias": True, "tie_word_embeddings": False}),
    "half of a head rotated": ("phi3", {"partial_rotary_factor": 0.5, "sliding_window": 8}),
    "longrope": ("phi3", LONGROPE),
    "a dense layer, biases, no norms of heads": ("glm4_moe", {"first_k_dense_replace": 1, "use_qk_norm": False}),
    "a latent vector and yarn": ("deepseek_v3", {"rope_parameters": YARN}),
    "groups of experts": ("deepseek_v3", GROUPS),
    "groups by their best expert": (
        "deepseek_v2",
        GROUPS | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0, "q_lora_rank": 20},
    ),
    "dense layers between": ("glm4_moe_lite", {"mlp_layer_types": ["sparse", "dense", "sparse"], "q_lora_rank": None}),
}


@pytest.mark.parametrize(
    ("name", "site"), [(name, site) for name in CONFIGS for site in CHANNEL_MASK_SITES if (name, site) != NO_SUCH_MASKS]
)
def test_the_reference_is_the_stock_model_with_hooks(tmp_path, name, site):
    model_type, config = CONFIGS[name]
    model = tiny_model(model_type, 6, 3, 40, **config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith(".bias"):
            parameter.normal_()
    if model_type in MOE_CONFIGS:
        masks = expert_masks(model, [[17, 0, 24, 5]] * 3, [21] * 3)
    else:
        masks = masks_for([], [torch.linspace(-1, 3, 40), torch.arange(40) % 3, torch.zeros(40)])
    masks |= masks_for(SOFT_HEADS, [], model)
    plan = make_plan(write_masked(tmp_path / "ckpt", model, {}))
    found = log_probabilities(reference(plan, masks, channel_mask_site=site))
    with apply_masks(model, masks, site):
        wanted = expected(model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (wanted - expected(model)).abs().max() > 0.1, "the masks change nothing"


class Norm(nn.Module):
    """RMSNorm of some dimensions, with a divisor of its own and a mask on what comes out."""

    def __init__(self, norm, divisor: float, mask: torch.Tensor | None) -> None:
        super().__init__()
        self.weight, self.eps, self.divisor, self.mask = norm.weight, norm.variance_epsilon, divisor, mask

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = x / (x.square().sum(-1, keepdim=True) / self.divisor + self.eps).sqrt() * self.weight
        return result if self.mask is None else result * self.mask


KEPT = (torch.arange(96) % 3 > 0).float()
SOFT = KEPT * torch.linspace(0.4, 2, 96)
HIDDEN = {  # the mask, and the divisor of every norm
    "divided by all": (HiddenMask(KEPT, KEPT), 96),
    "divided by what is kept": (HiddenMask(KEPT, SOFT, KEPT, norm_sees_kept=True), 64),
    "another divisor": (HiddenMask(SOFT, KEPT, SOFT, norm_divisor=70.0), 70),
    "outputs alone": (HiddenMask(outputs=SOFT), 96),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_the_reference_masks_hidden_dimensions(tmp_path, name):
    mask, divisor = HIDDEN[name]
    model = tiny_model("llama", 6, 3, 40, attention_bias=True)
    plan = make_plan(write_masked(tmp_path / "ckpt", model, {}))
    found = log_probabilities(reference(plan, hidden=mask))

    def multiply(factors):
        return lambda module, args, output: output if factors is None else output * factors

    model.model.embed_tokens.register_forward_hook(multiply(mask.embedding))
    model.model.norm = Norm(model.model.norm, divisor, mask.norms)
    for layer in model.model.layers:
        for module in (layer.self_attn.o_proj, layer.mlp.down_proj):
            module.register_forward_hook(multiply(mask.outputs))
        layer.input_layernorm = Norm(layer.input_layernorm, divisor, mask.norms)
        layer.post_attention_layernorm = Norm(layer.post_attention_layernorm, divisor, mask.norms)
    torch.testing.assert_close(found, expected(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("site", ["product", "gate_and_up"])
def test_a_right_conversion_passes(tmp_path, capsys, site, dtype):
    model = tiny_model("llama", 6, 6, 40)
    write_masked(tmp_path / "ckpt", model, RAGGED, site, lora_adapter="adapter")
    write_adapter(tmp_path / "ckpt", model, MODULES)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out", "--dtype", dtype) == 0
    assert "Verified against the pruned model: log-probabilities differ" in capsys.readouterr().out


@pytest.mark.parametrize("model_type", [*HF_MOE, "deepseek"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_pass(tmp_path, capsys, model_type, dtype):
    model = tiny_model(model_type, 6, 3, 24).to(dtype)
    masks = expert_masks(model, [[17, 0, 24, 5], [0, 0, 0, 0], [1, 2, 3, 4]], [11])
    write_masked(tmp_path / "ckpt", model, masks)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out", "--align", 16) == 0
    assert "Verified against the pruned model: " in capsys.readouterr().out


def rolled(plan: Plan, name: str, field: str) -> Plan:
    cut = plan.cuts[name]
    return replace(plan, cuts=plan.cuts | {name: replace(cut, **{field: getattr(cut, field).roll(1)})})


def scaled(plan: Plan, name: str, factor: float) -> Plan:
    cut = plan.cuts[name]
    factors = torch.ones(len(cut.rows)) if cut.row_factors is None else cut.row_factors
    return replace(plan, cuts=plan.cuts | {name: replace(cut, row_factors=factors * factor)})


def without_factors(plan: Plan, name: str) -> Plan:
    return replace(plan, cuts=plan.cuts | {name: replace(plan.cuts[name], row_factors=None, column_factors=None)})


V_PROJ, UP_PROJ = "model.layers.0.self_attn.v_proj.weight", "model.layers.2.mlp.up_proj.weight"
Q_PROJ, DOWN_PROJ = "model.layers.2.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"
FAULTS = {
    "factors are off by a tenth": lambda plan: scaled(plan, UP_PROJ, 1.1),
    "factors of a head are lost": lambda plan: without_factors(plan, V_PROJ),
    "factors of other heads": lambda plan: rolled(plan, V_PROJ, "row_factors"),
    "other channels": lambda plan: rolled(plan, UP_PROJ, "rows"),
    "other columns": lambda plan: rolled(plan, DOWN_PROJ, "columns"),
    "other rows of a head": lambda plan: rolled(plan, Q_PROJ, "rows"),
    "epsilon": lambda plan: replace(plan, rms_norm_eps=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(tmp_path, name, dtype):
    write_masked(tmp_path / "ckpt", tiny_model("llama", 6, 6, 40).to(dtype), RAGGED)
    plan = make_plan(tmp_path / "ckpt")
    convert(plan, tmp_path / "right", verify=True)
    with pytest.raises(InputError, match="does not compute what the pruned model computes"):
        convert(FAULTS[name](plan), tmp_path / "out", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "right"]


def test_an_expert_that_few_tokens_reach_is_compared(tmp_path):
    model = tiny_model("qwen3_moe", 6, 3, 24, num_experts=32)
    plan = make_plan(write_masked(tmp_path / "ckpt", model, expert_masks(model, [[12] * 32] * 3)))
    convert(rolled(plan, "model.layers.2.mlp.experts.7.up_proj.weight", "rows"), tmp_path / "out")
    with pytest.raises(InputError, match="does not compute"):
        check_conversion(plan, tmp_path / "out")


def test_a_fault_leaves_nothing_unless_the_user_insists(ckpt, tmp_path, capsys, monkeypatch):
    def wrong(model, layer, masks, site, target):
        return cut_layer(model, layer, masks, "gate_and_up", target)

    monkeypatch.setattr(plan_module, "cut_layer", wrong)
    masks = {"model.layers.0.mlp.channel_mask": torch.linspace(0.5, 3, 40)}
    write_masked(ckpt, tiny_model("llama", 6, 6, 40), masks)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    captured = capsys.readouterr()
    assert "does not compute what the pruned model computes" in captured.err and "--no-verify" in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
    assert convert_pruned(ckpt, tmp_path / "out", "--no-verify") == 0
    assert "Not verified: --verify compares" in capsys.readouterr().out


def test_a_model_that_computes_no_numbers_is_no_fault_of_the_conversion(ckpt, tmp_path, capsys):
    """The rows that go are not written, but 0 times infinity is none of the numbers that the masked model has."""
    model = tiny_model("llama", 6, 6, 40)
    model.model.layers[1].mlp.up_proj.weight[0] = torch.inf
    write_masked(ckpt, model, {"model.layers.1.mlp.channel_mask": torch.ones(40).index_fill(0, torch.tensor([0]), 0)})
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "The pruned model itself computes NaN or infinity in layer 1" in capsys.readouterr().err
    assert convert_pruned(ckpt, tmp_path / "out", "--no-verify") == 0

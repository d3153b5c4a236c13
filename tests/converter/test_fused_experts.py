"""convert-pruned on files that hold all experts of a layer in one tensor: what is read, or a message what is wrong."""

from pathlib import Path

import pytest
import torch
from helpers.masked import convert_pruned, edit_json, edit_weights
from helpers.tiny import byte_tokenizer, expert_masks, prompts, tiny_model, write_masked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Mxfp4Config, PreTrainedModel
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from converter.checkpoint import Checkpoint
from learner.job import Job
from learner.model.dense import load_dense
from learner.model.masking import apply_masks
from learner.model.saving import save_model
from learner.settings import MaskPruneSettings
from pruned_vllm.common.errors import InputError
from pruned_vllm.hf import load_pruned

WIDTH, HIDDEN, EXPERTS = 24, 96, 4
PREFIX = "model.layers.1.mlp.experts."
GATE_UP, GATE_UP_BIAS = f"{PREFIX}gate_up_proj", f"{PREFIX}gate_up_proj_bias"


@pytest.fixture
def ckpt(tmp_path) -> Path:
    model = tiny_model("gpt_oss", 6, 3, WIDTH)
    return write_masked(tmp_path / "ckpt", model, expert_masks(model, [[17, 0, 24, 5]] * 3))


def test_parts_are_those_of_the_fused_tensors(ckpt):
    stored, weights = load_file(ckpt / "model.safetensors"), Checkpoint.from_directory(ckpt)
    assert not [name for name in weights.tensors if "gate_up" in name]
    for expert in range(EXPERTS):
        gate_up, bias = stored[GATE_UP][expert], stored[GATE_UP_BIAS][expert]
        expected = {
            "gate_proj.weight": gate_up[:, 0::2].T,
            "gate_proj.bias": bias[0::2],
            "up_proj.weight": gate_up[:, 1::2].T,
            "up_proj.bias": bias[1::2],
            "down_proj.weight": stored[f"{PREFIX}down_proj"][expert].T,
            "down_proj.bias": stored[f"{PREFIX}down_proj_bias"][expert],
        }
        for name, tensor in expected.items():
            own_name = f"{PREFIX}{expert}.{name}"
            assert torch.equal(weights.read(own_name), tensor), name
            assert weights.tensors[own_name].num_bytes == tensor.nbytes


def test_masks_of_the_product_go_into_down_proj_alone(ckpt, tmp_path):
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    written, stored = load_file(tmp_path / "out" / "model.safetensors"), load_file(ckpt / "model.safetensors")
    mask = load_file(ckpt / "pruning_masks.safetensors")["model.layers.1.mlp.experts.channel_mask"]
    for expert, width in enumerate([17, 0, 24, 5]):
        kept = mask[expert].nonzero().view(-1)
        assert torch.equal(written[f"{PREFIX}{expert}.down_proj.bias"], stored[f"{PREFIX}down_proj_bias"][expert])
        assert (f"{PREFIX}{expert}.up_proj.weight" in written) == bool(width)
        if width:
            gate_up = stored[GATE_UP][expert].T
            assert torch.equal(written[f"{PREFIX}{expert}.gate_proj.weight"], gate_up[0::2][kept])
            assert torch.equal(written[f"{PREFIX}{expert}.up_proj.weight"], gate_up[1::2][kept])
            assert torch.equal(written[f"{PREFIX}{expert}.up_proj.bias"], stored[GATE_UP_BIAS][expert, 1::2][kept])
            down = stored[f"{PREFIX}down_proj"][expert].T[:, kept] * mask[expert, kept]
            assert torch.equal(written[f"{PREFIX}{expert}.down_proj.weight"], down)


def test_zeros_of_up_alone_remove_nothing(ckpt, tmp_path):
    """Its product is one of up + 1. A gate of zeros, with its bias, removes a channel."""
    stored = load_file(ckpt / "model.safetensors")
    stored[GATE_UP][2, :, 7], stored[GATE_UP_BIAS][2, 7] = 0, 0
    stored[GATE_UP][2, :, 10], stored[GATE_UP_BIAS][2, 10] = 0, 0
    edit_weights(ckpt, stored)
    for name in ("pruning.json", "pruning_masks.safetensors"):
        (ckpt / name).unlink()
    assert convert_pruned(ckpt, tmp_path / "out", "--from", "zeros") == 0
    weights = Checkpoint.from_directory(tmp_path / "out")
    gate = weights.read(f"{PREFIX}2.gate_proj.weight")
    kept = [channel for channel in range(WIDTH) if channel != 5]
    assert torch.equal(gate, stored[GATE_UP][2].T[0::2][kept])


def pack(ckpt: Path) -> dict[str, torch.Tensor]:
    """Random numbers in MXFP4 in place of the experts' weights, as openai/gpt-oss-20b is stored."""
    packed, generator, fused = {}, torch.Generator().manual_seed(0), []
    for name, tensor in load_file(ckpt / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")) and tensor.dim() == 3:
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            packed[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.randint(121, 125, shape, generator=generator, dtype=torch.uint8)
            fused.append(name)
    edit_weights(ckpt, packed, tuple(fused))
    edit_json(ckpt / "config.json", quantization_config={"quant_method": "mxfp4"})
    return packed


def packed_checkpoint(directory: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The checkpoint, its masks, and what is in place of its experts' weights."""
    model = tiny_model("gpt_oss", 6, 3, 32).bfloat16()
    masks = expert_masks(model, [[17, 0, 32, 5]] * 3)
    ckpt = write_masked(directory, model, masks)
    byte_tokenizer().save_pretrained(ckpt)
    return ckpt, masks, pack(ckpt)


def widened(ckpt: Path) -> PreTrainedModel:
    options = {"dtype": torch.bfloat16, "quantization_config": Mxfp4Config(dequantize=True)}
    return AutoModelForCausalLM.from_pretrained(ckpt, **options).float()


def test_weights_of_4_bits_are_widened(tmp_path, capsys):
    ckpt, masks, packed = packed_checkpoint(tmp_path / "ckpt")
    weights, found = Checkpoint.from_directory(ckpt), {}
    for kind in ("gate_up_proj", "down_proj"):
        blocks, scales = (packed[f"{PREFIX}{kind}_{part}"] for part in ("blocks", "scales"))
        found[kind] = convert_moe_packed_tensors(blocks, scales)
    for expert in range(EXPERTS):
        gate_up, down = found["gate_up_proj"][expert].T, found["down_proj"][expert].T
        for name, tensor in {"gate": gate_up[0::2], "up": gate_up[1::2], "down": down}.items():
            assert torch.equal(weights.read(f"{PREFIX}{expert}.{name}_proj.weight"), tensor), name

    assert convert_pruned(ckpt, tmp_path / "out", "--dtype", "float32") == 0
    assert "Verified against the pruned model" in capsys.readouterr().out
    pruned, model, tokens = load_pruned(tmp_path / "out"), widened(ckpt), torch.tensor(prompts()[-1:])
    assert "quantization_config" not in pruned.config.to_dict()
    with torch.no_grad(), apply_masks(model, masks):
        torch.testing.assert_close(pruned(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4)


def test_masks_are_learned_on_weights_of_4_bits(tmp_path):
    ckpt, _, _ = packed_checkpoint(tmp_path / "dense")
    for name in ("pruning.json", "pruning_masks.safetensors"):
        (ckpt / name).unlink()
    dense = load_dense(Job(model=str(ckpt), method="magnitude"), "cpu")
    expected = widened(ckpt)
    for name, parameter in dense.model.named_parameters():
        assert torch.equal(parameter.float(), expected.get_parameter(name)), name
    save_model(dense.model, ckpt, tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


def test_learning_masks_of_both_projections_is_refused(ckpt):
    """They are clamped, so what multiplies both is no factor of any weight."""
    settings = MaskPruneSettings(channel_mask_site="gate_and_up")
    with pytest.raises(InputError, match="GptOssForCausalLM clamps both projections"):
        load_dense(Job(model=str(ckpt), method="maskprune", settings=settings, data=["text"]), "cpu")


BLOCKS, SCALES = f"{GATE_UP}_blocks", f"{GATE_UP}_scales"
PACKED_DAMAGES = {
    "a block too many": (
        lambda ckpt: edit_weights(ckpt, {BLOCKS: torch.zeros(EXPERTS, 64, 4, 16, dtype=torch.uint8)}),
        f"{BLOCKS}: the file has [4, 64, 4, 16] in U8, config.json says [4, 64, 3, 16] in U8",
    ),
    "other numbers": (
        lambda ckpt: edit_weights(ckpt, {BLOCKS: torch.zeros(EXPERTS, 64, 3, 16, dtype=torch.int8)}),
        f"{BLOCKS}: the file has [4, 64, 3, 16] in I8",
    ),
    "other weights beside them": (
        lambda ckpt: edit_weights(ckpt, {GATE_UP: torch.ones(EXPERTS, HIDDEN, 64)}),
        f"{PREFIX}3.up_proj.weight: there as part of {GATE_UP}, and by itself; keep one",
    ),
    "scales that are no numbers": (
        lambda ckpt: edit_weights(ckpt, {SCALES: torch.full((EXPERTS, 64, 3), 255, dtype=torch.uint8)}),
        "values are NaN or infinite in BF16 after the masks were folded in; check the weights",
    ),
    "no scales": (lambda ckpt: edit_weights(ckpt, {}, remove=(SCALES,)), f"{SCALES} [4, 64, 3]: missing"),
    "scales of fewer rows": (
        lambda ckpt: edit_weights(ckpt, {SCALES: torch.zeros(EXPERTS, 32, 3, dtype=torch.uint8)}),
        f"{SCALES}: the file has [4, 32, 3] in U8",
    ),
    "rows that are no blocks": (
        lambda ckpt: edit_json(ckpt / "config.json", hidden_size=80),
        f"{BLOCKS}: config.json says rows of 80 numbers, which are no blocks of 32",
    ),
    "another method": (
        lambda ckpt: edit_json(ckpt / "config.json", quantization_config={"quant_method": "awq"}),
        "is quantized; masks fold into float weights only",
    ),
}


@pytest.mark.parametrize("name", PACKED_DAMAGES)
def test_weights_of_4_bits_that_do_not_fit_are_refused(tmp_path, capsys, name):
    ckpt, _, _ = packed_checkpoint(tmp_path / "ckpt")
    damage, sentence = PACKED_DAMAGES[name]
    damage(ckpt)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()


DAMAGES = {
    "a channel too many": (
        lambda ckpt: edit_weights(ckpt, {GATE_UP: torch.ones(EXPERTS, HIDDEN, 2 * WIDTH + 2)}),
        f"{GATE_UP}: the file has [4, 96, 50], config.json says [4, 96, 48]",
    ),
    "not transposed": (
        lambda ckpt: edit_weights(ckpt, {GATE_UP: torch.ones(EXPERTS, 2 * WIDTH, HIDDEN)}),
        f"{GATE_UP}: the file has [4, 48, 96], config.json says [4, 96, 48]",
    ),
    "an expert too few": (
        lambda ckpt: edit_weights(ckpt, {GATE_UP_BIAS: torch.ones(EXPERTS - 1, 2 * WIDTH)}),
        f"{GATE_UP_BIAS}: the file has [3, 48], config.json says [4, 48]",
    ),
    "nothing in it": (
        lambda ckpt: edit_weights(ckpt, {GATE_UP: torch.ones(0, HIDDEN, 2 * WIDTH)}),
        f"{GATE_UP}: the file has [0, 96, 48], config.json says",
    ),
    "config.json says other widths": (
        lambda ckpt: edit_json(ckpt / "config.json", intermediate_size=25),
        "config.json says [4, 96, 50]",
    ),
    "an expert beside it": (
        lambda ckpt: edit_weights(ckpt, {f"{PREFIX}3.up_proj.weight": torch.ones(WIDTH, HIDDEN)}),
        f"{PREFIX}3.up_proj.weight: there as part of {GATE_UP}, and by itself; keep one",
    ),
    "missing": (
        lambda ckpt: edit_weights(ckpt, {}, remove=(GATE_UP_BIAS,)),
        f"{PREFIX}0.gate_proj.bias [24]: missing",
    ),
    "no sinks": (
        lambda ckpt: edit_weights(ckpt, {}, remove=("model.layers.1.self_attn.sinks",)),
        "model.layers.1.self_attn.sinks [6]: missing",
    ),
    "no bias of a router": (
        lambda ckpt: edit_weights(ckpt, {}, remove=("model.layers.1.mlp.router.bias",)),
        "model.layers.1.mlp.router.bias [4]: missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_fused_experts_that_do_not_fit_are_refused(ckpt, tmp_path, capsys, name):
    damage, sentence = DAMAGES[name]
    damage(ckpt)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert sentence in capsys.readouterr().err and not (tmp_path / "out").exists()

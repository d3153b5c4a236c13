"""What is pruned, what its masks multiply, and the blocks of text that decide."""

import pytest
import torch
from helpers.learning import geometry_of
from helpers.tiny import HF_MOE, masks_for, tiny_model

from learner.data.reading import BlockSampler
from learner.model.masking import apply_masks
from learner.model.units import Units
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import FAMILIES


@pytest.mark.parametrize("site", ["product", "gate_and_up"])
def test_masks_multiply_what_the_formats_say(site):
    """Against a forward pass of one layer written out, in float64."""
    model = tiny_model("llama", 6, 3, 40, num_hidden_layers=1).double()
    layer, tokens = model.model.layers[0], torch.arange(20)[None]
    heads, channels = torch.randn(6).double(), torch.randn(40).double()
    masks = masks_for([heads.tolist()], [channels])
    seen = {}
    layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: seen.update(o_in=args[0], o_out=output))
    layer.mlp.register_forward_hook(lambda module, args, output: seen.update(mlp_in=args[0], mlp_out=output))
    model(tokens)
    unmasked = seen["o_in"].view(1, 20, 6, 32)
    with apply_masks(model, masks, site):
        model(tokens)
    expected_heads = (unmasked * masks["model.layers.0.self_attn.head_mask"].double()[:, None]).flatten(-2)
    torch.testing.assert_close(seen["o_in"], expected_heads)
    torch.testing.assert_close(seen["o_out"], expected_heads @ layer.self_attn.o_proj.weight.T)
    c = masks["model.layers.0.mlp.channel_mask"].double()
    gate_projection = seen["mlp_in"] @ layer.mlp.gate_proj.weight.T
    up_projection = seen["mlp_in"] @ layer.mlp.up_proj.weight.T
    silu = torch.nn.functional.silu
    product = c * silu(gate_projection) * up_projection
    if site == "gate_and_up":
        product = silu(c * gate_projection) * (c * up_projection)
    torch.testing.assert_close(seen["mlp_out"], product @ layer.mlp.down_proj.weight.T)
    model(tokens)
    assert torch.equal(seen["o_in"].view(1, 20, 6, 32), unmasked), "hooks are left behind"


def test_blocks_are_dealt_once_before_any_comes_again():
    sampler = BlockSampler(torch.arange(105), sequence_length=10, seed=0)
    first = torch.cat([sampler.next_batch(4), sampler.next_batch(4), sampler.next_batch(2)])
    assert sorted(first[:, 0].tolist()) == list(range(0, 100, 10))
    assert torch.equal(first[0], torch.arange(first[0, 0], first[0, 0] + 10))
    with pytest.raises(InputError, match="105 tokens, fewer than one block of 200"):
        BlockSampler(torch.arange(105), sequence_length=200, seed=0)


def test_calibration_takes_each_block_once_and_says_when_there_are_too_few():
    said = []
    blocks = BlockSampler(torch.arange(105), sequence_length=10, seed=0).calibration(12, said.append)
    assert sorted(blocks[:, 0].tolist()) == list(range(0, 100, 10))
    assert said == ["--data has 10 sequences of 10 tokens, fewer than --calibration-sequences 12."]
    assert BlockSampler(torch.arange(105), sequence_length=10, seed=0).calibration(3, said.append).shape == (3, 10)
    assert len(said) == 1


def test_a_unit_is_a_query_head():
    units = Units.from_geometry(geometry_of(tiny_model("qwen3", 6, 3, 40)))
    assert units.widths == {"head": 6, "channel": 40}
    heads = torch.rand(3, 6)
    masks = units.without("channel").to_masks({"head": heads})
    assert torch.equal(masks["model.layers.1.self_attn.head_mask"], heads[1])


def test_a_tied_unit_is_a_kv_head_with_its_query_heads():
    units = Units.from_geometry(geometry_of(tiny_model("qwen3", 6, 3, 40)), tied=True)
    assert units.widths == {"head": 3, "channel": 40}
    values = {kind: torch.rand(3, width) for kind, width in units.widths.items()}
    masks = units.to_masks(values)
    assert torch.equal(masks["model.layers.1.self_attn.head_mask"], values["head"][1].repeat_interleave(2))
    assert torch.equal(masks["model.layers.2.mlp.channel_mask"], values["channel"][2])


@pytest.mark.parametrize("model_type", HF_MOE)
def test_channels_of_experts_are_units(model_type):
    has_dense_layers = model_type.startswith("qwen") and model_type != "qwen3_5_moe_text"
    config = {"mlp_only_layers": [1]} if has_dense_layers else {}
    model = tiny_model(model_type, 6, 3, 24, **config)
    units = Units.from_geometry(geometry_of(model))
    heads = {"head": 6} if FAMILIES[model_type].can_lose_heads else {}
    assert units.widths == heads | ({"channel": 24} if config else {}) | {"expert": 4 * 24}
    assert units.layers["expert"] == ((0, 2) if config else (0, 1, 2)) and units.layers.get("channel", (1,)) == (1,)
    values = {kind: torch.rand(units.shape(kind)) for kind in units.layers}
    masks = units.to_masks(values)
    assert torch.equal(masks["model.layers.2.mlp.experts.channel_mask"], values["expert"][-1].view(4, 24))
    assert ("model.layers.1.mlp.channel_mask" in masks) == bool(config)
    with apply_masks(model, masks):  # every mask has a place
        model(torch.arange(20)[None])

"""Layers of experts of different widths: as torch.compile sees them, and with biases and an activation of their own."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.ragged_moe import Inputs, compare, reference
from torch import nn

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.kernels.ragged_moe_arguments import Activation, Biases
from pruned_vllm.serving.expert_scheme import ExpertScheme, has_own_experts
from pruned_vllm.serving.expert_weights import quantized
from pruned_vllm.serving.ragged_moe import RaggedExperts


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        vllm_config = SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            compilation_config=SimpleNamespace(static_forward_context={}),
        )
        names = ("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
        self.layers = nn.ModuleList(RaggedExperts(vllm_config, (3, 5), 8, prefix=name) for name in names)

    def forward(self, x, topk_weights, topk_ids):
        for layer in self.layers:
            x = layer(x, topk_weights, topk_ids)
        return x


def test_no_name_of_a_layer_is_a_constant_of_the_graph():
    """A name in the graph would make the graphs of equal layers differ, and each would be compiled anew."""
    graphs = []

    def keep_graph(graph, inputs):
        graphs.append(graph.graph)
        return lambda *inputs: (torch.zeros(2, 8),)  # the op itself would look for a running engine

    arguments = torch.ones(2, 8), torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32)
    torch.compile(TwoLayers(), backend=keep_graph, fullgraph=True)(*arguments)
    (graph,) = graphs
    calls = [node for node in graph.nodes if node.op == "call_function" and "pruned_ragged_moe" in str(node.target)]
    assert len(calls) == 2
    for call in calls:
        assert [type(argument) for argument in call.args] == [torch.fx.Node] * 4, call.args


HIDDEN, WIDTHS = 64, (17, 0, 70, 1, 33)
GPT_OSS = Activation("swigluoai")


def random_expert(width: int) -> dict[str, torch.Tensor]:
    """Weights [outputs, inputs] and biases as a checkpoint has them: those that an expert of that width has."""
    shapes = {"w2.bias": (HIDDEN,)}
    if width:
        shapes |= {"w1.weight": (width, HIDDEN), "w3.weight": (width, HIDDEN), "w2.weight": (HIDDEN, width)}
        shapes |= {"w1.bias": (width,), "w3.bias": (width,)}
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def exact_layer(experts: list[dict[str, torch.Tensor]], scheme: ExpertScheme | None, x, topk_weights, topk_ids):
    """What all ranks together must give, and how far rounding may lead from there."""

    def joined(name: str) -> torch.Tensor:
        tensors = [expert[name].float() for expert in experts if name in expert]
        if scheme is not None and name.endswith("weight"):
            tensors = [numbers.float() * scale for numbers, scale in (quantized(tensor, scheme) for tensor in tensors)]
        return torch.cat([tensor.T if name == "w2.weight" else tensor for tensor in tensors])

    inputs = Inputs(
        x=x,
        gate_up=torch.stack([joined("w1.weight"), joined("w3.weight")]),
        down=joined("w2.weight"),
        offsets=torch.tensor([0, *WIDTHS]).cumsum(0),
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        max_width=max(WIDTHS),
    )
    down_bias = torch.stack([expert["w2.bias"].float() for expert in experts])
    return reference(inputs, GPT_OSS, Biases(torch.stack([joined("w1.bias"), joined("w3.bias")]), down_bias))


def experts_on(rank: int, ranks: int, monkeypatch, **settings) -> RaggedExperts:
    monkeypatch.setattr("pruned_vllm.serving.ragged_moe.get_tensor_model_parallel_rank", lambda: rank)
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )
    return RaggedExperts(vllm_config, hidden_size=HIDDEN, prefix="experts", **settings)


@pytest.mark.parametrize("scheme", (None, ExpertScheme("int8", is_online=True)), ids=str)
@pytest.mark.parametrize("ranks", (1, 2, 3))
def test_ranks_together_add_every_bias_once(ranks, scheme, monkeypatch):
    torch.manual_seed(0)
    experts = [random_expert(width) for width in WIDTHS]
    stored = [(f"{number}.{name}", tensor) for number, expert in enumerate(experts) for name, tensor in expert.items()]
    x, weights, ids = torch.randn(40, HIDDEN), torch.rand(40, 2), torch.rand(40, len(WIDTHS)).topk(2).indices
    total = torch.zeros(40, HIDDEN, dtype=torch.float64)
    for rank in range(ranks):
        settings = {"widths": WIDTHS, "scheme": scheme, "activation": GPT_OSS, "has_biases": True}
        layer = experts_on(rank, ranks, monkeypatch, **settings)
        assert set(layer.load_weights(iter(stored))) == {name for name, _ in layer.named_parameters()}
        assert hasattr(layer, "down_bias") == (rank == 0)
        total += layer.compute(x, weights, ids).double()
    expected, allowed = exact_layer(experts, scheme, x, weights, ids)
    assert not (problem := compare(total.float(), expected, ranks * allowed, torch.float32)), problem


def test_weights_that_move_or_change_are_found(monkeypatch):
    """As when vLLM loads a model again: into the same memory, into other memory, or as other parameters."""
    layer = experts_on(0, 1, monkeypatch, widths=WIDTHS)
    x, weights, ids = torch.randn(3, HIDDEN), torch.rand(3, 2), torch.rand(3, len(WIDTHS)).topk(2).indices.int()
    for parameter in layer.parameters():
        parameter.data = torch.randn_like(parameter)
    once = layer.compute(x, weights, ids)
    layer.down.mul_(2)
    torch.testing.assert_close(layer.compute(x, weights, ids), 2 * once)
    layer.down.data = 2 * layer.down.data
    torch.testing.assert_close(layer.compute(x, weights, ids), 4 * once)
    layer.register_parameter("down", torch.nn.Parameter(2 * layer.down.data, requires_grad=False))
    torch.testing.assert_close(layer.compute(x, weights, ids), 8 * once)


@pytest.mark.parametrize("rank", (0, 1))
def test_a_rank_without_channels_adds_what_it_has(rank, monkeypatch):
    layer = experts_on(rank, 2, monkeypatch, widths=(0, 0), activation=GPT_OSS, has_biases=True)
    biases = torch.randn(2, HIDDEN)
    names = set(layer.load_weights((f"{number}.w2.bias", bias) for number, bias in enumerate(biases)))
    x, weights, ids = torch.randn(1, HIDDEN), torch.tensor([[0.5, 2.0]]), torch.tensor([[0, 1]])
    expected = weights @ biases if rank == 0 else torch.zeros(1, HIDDEN)
    assert names == ({"down_bias"} if rank == 0 else set()) == {name for name, _ in layer.named_parameters()}
    torch.testing.assert_close(layer.compute(x, weights, ids), expected)


def test_biases_of_a_family_that_has_none_are_refused(monkeypatch):
    layer = experts_on(0, 1, monkeypatch, widths=(3,))
    with pytest.raises(InputError, match="have no tensors 'bias'"):
        list(layer.load_weights([("0.w1.bias", torch.ones(3))]))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, [False, False, True]), ({"bias": True}, [True, False, True]), ({"activation": "gelu"}, [True, False, True])],
)
def test_which_layers_vllm_itself_computes(changes, expected, monkeypatch):
    """Not those with biases or another activation, and never a layer without experts."""
    row = FAMILIES["qwen3_moe"]
    monkeypatch.setitem(FAMILIES, "qwen3_moe", replace(row, experts=replace(row.experts_format, **changes)))
    config = {
        "architectures": ["PrunedQwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "vocab_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 70,
        "intermediate_size": 48,
        "mlp_only_layers": [1],
        "per_layer_config": {"2": {"expert_intermediate_sizes": list(WIDTHS)}},
    }
    geometry, model = ModelGeometry.from_config(config), SimpleNamespace(quantization=None)
    assert [has_own_experts(model, geometry, None, index, ranks=1) for index in range(3)] == expected

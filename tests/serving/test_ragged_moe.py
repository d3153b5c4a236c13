"""Layers of experts of different widths as torch.compile sees them."""

from types import SimpleNamespace

import torch
from torch import nn

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

"""What each importer makes of a project's files, in an engine: it computes what that project's own code computes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from helpers import composer, l0
from helpers.cut import LLM_PRUNER, Project, channel_wise, config_like, cut_weights, half, rows, upto, zeroed
from helpers.ddp import KEYS, log_alphas, trainable_params
from helpers.dropped import keep_experts, write_mone
from helpers.imports import dropped, kill_hidden, write_flap, write_list
from helpers.levels import DOWN_PROJ, O_PROJ, modules, write_levels
from helpers.llama import Rules, logits
from helpers.masked import convert_pruned, edit_json
from helpers.puzzletron import block, heterogeneous, intermediate, num_kv_heads, overrides, write_subblocks
from helpers.serving import assert_computes, engine, generate
from helpers.tiny import HEAD_DIM, oracle, tiny_model

from converter.importers import importer_names

# 106 of 128 hidden dimensions are left, which four heads make 108: no multiple of 8.
L0_SHAPE = l0.Shape((2, 0, 4), (11, 37, 0), 106, head_dim=HEAD_DIM)


@dataclass
class Sibling:
    """Files as a project writes them.

    Attributes:
        source: what convert-pruned gets, with `args`.
        logits: tokens -> [len(tokens), vocabulary], independent of the converter.
        config: what config.json of the converted model must say, so that the case is what its name says.
    """

    source: Path
    logits: Callable[[list[int]], torch.Tensor]
    args: tuple = ()
    config: dict = field(default_factory=dict)


Write = Callable[[Path, pytest.MonkeyPatch], Sibling]


def stock(model) -> Callable[[list[int]], torch.Tensor]:
    """The logits of a Hugging Face model."""
    return lambda tokens: model(torch.tensor([tokens])).logits[0]


def written_out(tensors: dict[str, torch.Tensor], rules: Rules) -> Callable[[list[int]], torch.Tensor]:
    return lambda tokens: logits(tensors, HEAD_DIM, tokens, rules)


def flap(directory: Path, monkeypatch) -> Sibling:
    """A layer's attention and another one's MLP are biases and nothing else."""
    model = write_flap(directory / "in", ("llama", 6, 6, [[0, 2], [], [4]], [40, 3, 0]))
    return Sibling(directory / "in", stock(model))


def state_dict(directory: Path, monkeypatch) -> Sibling:
    model, heads, channels = tiny_model("qwen2", 6, 3, 40), [[0, 2], [1], [0, 1, 2]], [[3, 7], list(range(40)), [39]]
    model.save_pretrained(directory / "in")
    (directory / "in" / "model.safetensors").unlink()
    torch.save(cut_weights(model, heads, channels), directory / "in" / "pytorch_model.bin")
    return Sibling(directory / "in", stock(zeroed(model, heads, channels)))


def llm_pruner_blocks(directory: Path, monkeypatch) -> Sibling:
    model, heads, channels = half(tiny_model("llama", 6, 6, 40)), [list(range(6)), [1, 2, 5], [0, 4]], upto(40, 30, 17)
    project = Project(monkeypatch, LLM_PRUNER, "LlamaForCausalLM")
    weights = {name: tensor.half() for name, tensor in cut_weights(model, heads, channels).items()}
    pickled = project.model(weights, config_like(model, "num_key_value_heads"), head_dim=HEAD_DIM)
    torch.save({"model": pickled, "tokenizer": None}, directory / "pytorch_model.bin")
    return Sibling(directory / "pytorch_model.bin", stock(zeroed(model, heads, channels)), ("--dtype", "float32"))


def llm_pruner_channels(directory: Path, monkeypatch) -> Sibling:
    """70 of 96 hidden dimensions are left, which six heads make 72."""
    model = half(tiny_model("mistral", 6, 6, 40))
    pickled, expected = channel_wise(Project(monkeypatch, LLM_PRUNER, "LlamaForCausalLM"), model, 70)
    torch.save({"model": pickled, "tokenizer": None}, directory / "pytorch_model.bin")
    args = ("--dtype", "float32")
    return Sibling(directory / "pytorch_model.bin", stock(expected), args, {"hidden_size": 72, "head_dim": HEAD_DIM})


def ddp(*sizes, **values: torch.Tensor) -> Write:
    def write(directory: Path, monkeypatch) -> Sibling:
        model = tiny_model(*sizes)
        model.save_pretrained(directory / "base")
        torch.save(trainable_params(values), directory / "trainable_params.pt")
        masks = {KEYS[kind].format(i): row.clamp(min=0) for kind, mask in values.items() for i, row in enumerate(mask)}

        def masked(tokens: list[int]) -> torch.Tensor:
            return oracle(model, masks, "product", tokens, [0])[1]

        return Sibling(directory / "trainable_params.pt", masked, ("--base-model", directory / "base"))

    return write


def tyr(directory: Path, monkeypatch) -> Sibling:
    """In the second layer two KV heads keep one query head, the third one two."""
    model = tiny_model("llama", 6, 3, 40)
    model.save_pretrained(directory / "base")
    dead = {O_PROJ: [rows([0, 1]), rows([1, 2]), rows([5])], DOWN_PROJ: [[0, 39], list(range(39)), []]}
    choice = {module: index % 4 - 2 for index, module in enumerate(modules(model, O_PROJ, DOWN_PROJ))}
    zero_columns = {f"model.layers.{i}.{name}": columns[i] for name, columns in dead.items() for i in range(3)}
    write_levels(directory / "in", model, choice, zero_columns)
    return Sibling(directory / "in", stock(model), ("--base-model", directory / "base"))


def l0_masks(project: str, hidden_size: int) -> Write:
    """NutePrune, Compresso and LoRaPruner; masks that are not 0 or 1, and LoRA."""

    def write(directory: Path, monkeypatch) -> Sibling:
        model, zs = L0_SHAPE.model(), L0_SHAPE.zs()
        lora = l0.lora_weights(model.state_dict(), 8, "q_proj", "v_proj")
        base, masks = l0.write(directory, model, zs, lora)
        expected = written_out(l0.merged(model.state_dict(), lora, 1), l0.rules_of(project, zs))
        return Sibling(masks, expected, ("--base-model", base), {"hidden_size": hidden_size})

    return write


def sheared(directory: Path, monkeypatch) -> Sibling:
    """A checkpoint of the pruning stage, with a target shape; layers are removed by a mask of layers."""
    model, masks = L0_SHAPE.model(), composer.log_alphas(L0_SHAPE)
    model.save_pretrained(directory / "base")
    composer.save_checkpoint(directory / "run", composer.with_masks(model, masks))
    target = {"d_model": 98, "n_heads": 2, "intermediate_size": 9, "n_layers": 2}
    config = composer.DictConfig({"model": {"name": "llama", "l0_module": {"target_model": target}}})
    torch.save(config, directory / "run" / "config.pt")
    zs = composer.kept_masks(masks, {"hidden": 98, "head": 2, "intermediate": 9, "layer": 2})
    expected = written_out(model.state_dict(), composer.rules_of(zs, embedding=False))
    return Sibling(directory / "run", expected, ("--base-model", directory / "base"), {"hidden_size": 100})


def block_configs(directory: Path, monkeypatch) -> Sibling:
    layers = [(1, 64), (3, 5), (0, 0), (2, 0)]
    model = heterogeneous("llama", layers, hidden_size=192)
    write_subblocks(directory / "in", model, layers)
    blocks = [block(kv_heads, width, num_kv_heads, intermediate) for kv_heads, width in layers]
    edit_json(directory / "in" / "config.json", block_configs=blocks)
    return Sibling(directory / "in", stock(model))


def per_layer_config(directory: Path, monkeypatch) -> Sibling:
    layers = [(1, 64), (3, 5), (0, 7), (2, 0)]
    model = heterogeneous("qwen3", layers)
    write_subblocks(directory / "in", model, layers)
    edit_json(directory / "in" / "config.json", per_layer_config=overrides(layers), architectures=["AnyModel"])
    edit_json(directory / "in" / "config.json", base_architecture="Qwen3ForCausalLM", model_type="anymodel")
    return Sibling(directory / "in", stock(model))


def depth(directory: Path, monkeypatch) -> Sibling:
    model, lines = tiny_model("llama", 6, 3, 40), ["attn", "mlp", "attn+mlp"]
    model.save_pretrained(directory / "in")
    write_list(directory / "in", lines)
    return Sibling(directory / "in", stock(dropped(model, lines)))


def zeros(directory: Path, monkeypatch) -> Sibling:
    """The biases of a dead attention and a dead MLP stay."""
    model = tiny_model("llama", 6, 6, 40, attention_bias=True, mlp_bias=True)
    first, second, third = model.model.layers
    first.self_attn.o_proj.weight.zero_()
    second.self_attn.o_proj.weight[:, rows([1, 4])] = 0
    second.mlp.down_proj.weight.zero_()
    third.mlp.down_proj.weight[:, 5:] = 0
    model.save_pretrained(directory / "in")
    return Sibling(directory / "in", stock(model))


def hidden_zeros(directory: Path, monkeypatch) -> Sibling:
    """88 of 96 hidden dimensions are left, which six heads make 90."""
    model = tiny_model("llama", 6, 6, 40, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    kill_hidden(model, [0, 7, 8, 20, 33, 34, 50, 95])
    model.model.layers[1].self_attn.o_proj.weight.zero_()
    model.save_pretrained(directory / "in")
    return Sibling(directory / "in", stock(model), config={"hidden_size": 90})


# By the name of the importer, and what is special about a case.
def reap(directory: Path, monkeypatch) -> Sibling:
    """Another number of experts in every layer: vLLM's own expert layers, each with its own number."""
    model = tiny_model("qwen2_moe", 6, 3, 24)
    model.save_pretrained(directory / "in")
    keep_experts(directory / "in", model, [[0, 2, 3], [3, 1], [0, 1, 2, 3]])
    return Sibling(directory / "in", stock(model))


def mone(directory: Path, monkeypatch) -> Sibling:
    """In the last layer every expert is a constant, in the first one."""
    model = tiny_model("mixtral", 6, 3, 24)
    write_mone(directory / "in", model, {0: [2], 2: [0, 1, 2, 3]})
    return Sibling(directory / "in", stock(model))


SIBLINGS = {
    "shapes, FLAP": flap,
    "shapes, a state dict": state_dict,
    "shapes, REAP": reap,
    "mone": mone,
    "llm-pruner, block-wise": llm_pruner_blocks,
    "llm-pruner, channel-wise": llm_pruner_channels,
    "ddp": ddp("qwen3", 8, 4, 40, head=log_alphas(3, 8), intermediate=log_alphas(3, 40)),
    "ddp, experts": ddp("qwen3_moe", 6, 3, 40, head=log_alphas(3, 6), expert=log_alphas(3, 4, 24)),
    "tyr": tyr,
    "nuteprune": l0_masks("nuteprune", 108),
    "compresso": l0_masks("compresso", 108),
    "lorapruner": l0_masks("lorapruner", 128),
    "sheared": sheared,
    "puzzletron, block_configs": block_configs,
    "puzzletron, per_layer_config": per_layer_config,
    "depth": depth,
    "zeros": zeros,
    "zeros, hidden dimensions": hidden_zeros,
}


def importer_of(case: str) -> str:
    return case.partition(",")[0]


def test_every_importer_has_a_sibling():
    """What learn-masks writes is served in tests/serving/test_serving.py."""
    assert {*map(importer_of, SIBLINGS), "masked"} == {*importer_names()}


@pytest.mark.slow
@pytest.mark.parametrize("case", SIBLINGS)
@torch.no_grad()
def test_served_models_compute_what_the_project_computes(tmp_path, monkeypatch, case):
    sibling = SIBLINGS[case](tmp_path, monkeypatch)
    assert convert_pruned(sibling.source, tmp_path / "out", "--from", importer_of(case), *sibling.args) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: config[key] for key in sibling.config} == sibling.config
    with engine(tmp_path / "out") as llm:
        outputs = generate(llm)
    assert_computes(outputs, lambda tokens: sibling.logits(tokens)[: len(tokens) - 1].log_softmax(-1))

"""DDP's trainable_params.pt with the model that it was learned on: relu(z_loga) multiplies heads, channels, experts."""

import pytest
import torch
from helpers.ddp import KEYS, log_alphas, trainable_params
from helpers.masked import convert_pruned
from helpers.tiny import byte_tokenizer, converted, oracle, prompts, tiny_model

from converter.importers import recognised
from converter.plan import make_plan
from pruned_vllm.formats.masked import EXPERT_MASK
from pruned_vllm.hf.loading import load_pruned

PREFIXES = ("module.", "", "module.module.")


def without_a_layer(values: torch.Tensor, layer: int) -> torch.Tensor:
    """Nothing of a layer is left."""
    return values.index_fill(0, torch.tensor([layer]), -1.0)


# family, heads, KV heads, width; masks
CASES = {
    "heads and channels": (("llama", 6, 6, 40), {"head": log_alphas(3, 6), "intermediate": log_alphas(3, 40)}),
    "query heads": (("qwen3", 8, 4, 40), {"head": log_alphas(3, 8), "intermediate": log_alphas(3, 40)}),
    "channels alone": (("mistral", 8, 2, 24), {"intermediate": log_alphas(3, 24)}),
    "nothing is left of a layer": (
        ("llama", 6, 6, 40),
        {"head": without_a_layer(log_alphas(3, 6), 1), "intermediate": without_a_layer(log_alphas(3, 40), 2)},
    ),
    "experts": (("qwen3_moe", 6, 3, 40), {"head": log_alphas(3, 6), "expert": log_alphas(3, 4, 24)}),
}


@pytest.mark.parametrize(("sizes", "masks"), CASES.values(), ids=CASES)
def test_masks_are_folded_into_the_model(tmp_path, sizes, masks):
    model = tiny_model(*sizes)
    model.save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "step_100").mkdir()
    torch.save(trainable_params(masks), tmp_path / "step_100" / "trainable_params.pt")
    assert recognised(tmp_path / "step_100") == {"ddp": "trainable_params.pt"}
    assert convert_pruned(tmp_path / "step_100", tmp_path / "out", "--base-model", tmp_path / "base") == 0
    expected_masks = {
        KEYS[kind].format(layer): values[layer].clamp(min=0)
        for kind, values in masks.items()
        for layer in range(len(values))
    }
    pruned = load_pruned(tmp_path / "out", dtype=torch.float32)
    for prompt in prompts():
        _, expected = oracle(model, expected_masks, "product", prompt, [7])
        with torch.no_grad():
            found = pruned(torch.tensor([[*prompt, 7]])).logits[0, :-1].log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_experts_are_those_of_the_layers_that_have_any(tmp_path):
    """The first layer of DeepSeekMoE has none, so the masks are one less than the layers."""
    model, values = tiny_model("deepseek", 6, 6, 40), log_alphas(2, 4, 24)
    expected_masks = {EXPERT_MASK.format(layer + 1): values[layer].clamp(min=0) for layer in range(2)}
    expected = converted(tmp_path, model, expected_masks)
    torch.save(trainable_params({"expert": values}), tmp_path / "trainable_params.pt")
    base = ("--base-model", tmp_path / "ckpt", "--from", "ddp")
    assert convert_pruned(tmp_path / "trainable_params.pt", tmp_path / "ddp", *base) == 0
    names = {path.name for path in expected.glob("*.safetensors")}
    assert names and all((tmp_path / "ddp" / name).read_bytes() == (expected / name).read_bytes() for name in names)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_with_and_without_prefix(tmp_path, prefix):
    tiny_model("llama", 6, 6, 40).save_pretrained(tmp_path / "base")
    masks = {"head": log_alphas(3, 6), "intermediate": log_alphas(3, 40)}
    file = tmp_path / "params.pt"
    torch.save(trainable_params(masks, prefix), file)
    assert recognised(file) == {"ddp": "params.pt has l0_module.masks.*.z_loga"}
    plan = make_plan(file, str(tmp_path / "base"))
    kept = [(layer.num_attention_heads, layer.intermediate_size) for layer in plan.exact.layers]
    counts = (values.gt(0).sum(dim=1).tolist() for values in masks.values())
    assert kept == list(zip(*counts, strict=True))
    assert plan.source.notes == ("The masks are pickled: params.pt. Nothing in it was run.",)


HEAD, CHANNEL, EXPERT = (f"module.l0_module.masks.{kind}.z_loga" for kind in ("head", "intermediate", "expert"))
LLAMA, MOE = ("llama", 6, 6, 40), ("deepseek", 6, 6, 40)
REFUSED = {
    "layers": (LLAMA, {HEAD: log_alphas(2, 6)}, "masks for 2 layers, but the model has 3 layers with attention of 3"),
    "a row for a dense layer": (MOE, {EXPERT: log_alphas(3, 4, 24)}, "masks for 3 layers, but the model has 2 layers"),
    "heads": (LLAMA, {HEAD: log_alphas(3, 7)}, "torch.float32 [3, 7]; the model needs floats [3, 6]"),
    "axes": (LLAMA, {HEAD: log_alphas(3, 6, 1)}, "the model needs floats [3, 6]"),
    "no axes": (LLAMA, {HEAD: torch.tensor(1.0)}, "the model needs floats [3, 6]"),
    "integers": (LLAMA, {HEAD: torch.ones(3, 6, dtype=torch.int64)}, "torch.int64 [3, 6]; the model needs floats"),
    "experts of a dense model": (LLAMA, {EXPERT: log_alphas(3, 4, 24)}, "no layer of the model has experts"),
    "nan": (LLAMA, {HEAD: log_alphas(3, 6).fill_(float("nan"))}, "18 of 18 values are NaN or infinite"),
    "inf": (LLAMA, {HEAD: log_alphas(3, 6).fill_(float("inf"))}, "18 of 18 values are NaN or infinite"),
    "unknown": (LLAMA, {"module.l0_module.masks.layer.z_loga": torch.ones(3)}, "layer.z_loga': unknown key; known:"),
    "twice": (LLAMA, {HEAD: log_alphas(3, 6), HEAD[7:]: log_alphas(3, 6)}, "are there twice"),
    "multipliers alone": (LLAMA, {"l0_module.lambdas.lambda_1_head": torch.ones(1)}, "it holds no masks"),
    "two problems": (LLAMA, {HEAD: log_alphas(2, 6), CHANNEL: log_alphas(3, 41)}, "[3, 41]; the model needs"),
    "no tensors": (LLAMA, {HEAD: "head"}, "holds no tensors by their names"),
    "heads that hang together": (("olmoe", 4, 4, 24), {HEAD: log_alphas(3, 4)}, "normalises q and k over all heads"),
}


@pytest.mark.parametrize(("sizes", "content", "message"), REFUSED.values(), ids=REFUSED)
def test_masks_that_do_not_fit(tmp_path, capsys, sizes, content, message):
    tiny_model(*sizes).save_pretrained(tmp_path / "base")
    torch.save(content, tmp_path / "a.pt")
    arguments = ("--from", "ddp", "--base-model", tmp_path / "base")
    assert convert_pruned(tmp_path / "a.pt", tmp_path / "out", *arguments) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_is_missing_is_named(tmp_path, capsys):
    (tmp_path / "run" / "step_100").mkdir(parents=True)
    torch.save(trainable_params({"head": log_alphas(3, 6)}), tmp_path / "run" / "step_100" / "trainable_params.pt")
    assert convert_pruned(tmp_path / "run", tmp_path / "out", "--from", "ddp") == 2
    assert "step_100/trainable_params.pt; give the one that is meant" in capsys.readouterr().err
    assert convert_pruned(tmp_path / "run" / "step_100", tmp_path / "out") == 2
    assert "holds masks, but no weights; give the dense model" in capsys.readouterr().err

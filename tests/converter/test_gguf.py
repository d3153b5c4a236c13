"""convert-pruned export: a GGUF file computes what the masked model computes, and tells text as its tokenizer does.

llama.cpp itself runs in test_llama_cpp.py, where it is installed; here its forward pass is written out.
"""

import json

import pytest
import torch
from helpers.gguf_cases import CASES, LLAMA3, MHA, WIDTH, export
from helpers.gguf_tokenizers import TOKENIZERS, byte_level, sentencepiece_model
from helpers.masked import convert_pruned, edit_json
from helpers.tiny import converted, masks_for, prompts, tiny_model, write_masked
from tokenizers import Regex, pre_tokenizers

from learner.model.masking import apply_masks

gguf = pytest.importorskip("gguf")
from helpers.gguf_model import GgufModel  # noqa: E402


@pytest.mark.parametrize("name", CASES)
def test_the_file_computes_what_the_masked_model_computes(tmp_path, name):
    case = CASES[name]
    model, masks = case.model_and_masks()
    assert export(converted(tmp_path, model, masks), tmp_path / "model.gguf") == 0
    exported = GgufModel(tmp_path / "model.gguf")
    assert exported.architecture == case.architecture
    assert exported.metadata["tokenizer.ggml.model"] == "none", "there is no tokenizer beside the weights"
    for prompt in prompts():
        with torch.no_grad(), apply_masks(model, masks):
            expected = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(exported.logits(prompt), expected, rtol=1e-4, atol=1e-4)


def test_sizes_of_each_layer_are_lists(tmp_path, capsys):
    model, masks = CASES["llama, uneven groups"].model_and_masks()
    assert export(converted(tmp_path, model, masks), tmp_path / "model.gguf") == 0
    metadata = GgufModel(tmp_path / "model.gguf").metadata
    assert metadata["deci.attention.head_count"] == [6, 4, 9], "groups of 3 and 1 become two of 3"
    assert metadata["deci.attention.head_count_kv"] == [2, 2, 3]
    assert metadata["deci.feed_forward_length"] == [17, 40, 8]
    assert "Zeros in place of what llama.cpp cannot leave out" in capsys.readouterr().out


def test_what_cannot_differ_is_padded_and_said(tmp_path, capsys):
    model, masks = CASES["qwen3"].model_and_masks()
    assert export(converted(tmp_path, model, masks), tmp_path / "model.gguf") == 0
    metadata = GgufModel(tmp_path / "model.gguf").metadata
    assert metadata["qwen3.attention.head_count"] == 9 and metadata["qwen3.feed_forward_length"] == 40
    assert "every layer has those of the largest" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_matrices_keep_their_dtype(tmp_path, dtype):
    model, masks = CASES["llama, biases"].model_and_masks()
    assert export(converted(tmp_path, model.to(dtype), masks), tmp_path / "model.gguf") == 0
    exported = GgufModel(tmp_path / "model.gguf")
    name = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(dtype, "F32")
    for tensor, kind in exported.kinds.items():
        expected = "F32" if "norm" in tensor or tensor.endswith(".bias") else name
        assert kind.name == expected, tensor
    assert exported.metadata["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[name]


def test_biases_that_are_zero_are_left_out(tmp_path):
    """FLAP's models have one for o_proj alone; releases of llama.cpp before 2026 refuse the one of a smaller q."""
    model, masks = CASES["llama, biases"].model_and_masks()
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            module.bias.zero_()
    assert export(converted(tmp_path, model, masks), tmp_path / "model.gguf") == 0
    names = {name.split(".", 2)[2] for name in GgufModel(tmp_path / "model.gguf").tensors if name.endswith("bias")}
    assert names == {"attn_output.bias", "ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"}


def test_a_stock_model_is_exported(tmp_path):
    model = tiny_model("llama", 6, 3, 40)
    model.save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "model.gguf") == 0
    logits = GgufModel(tmp_path / "model.gguf").logits(prompts()[2])
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([prompts()[2]])).logits[0], rtol=1e-4, atol=1e-4)


def test_a_sliding_window_limits_the_context(tmp_path, capsys):
    model, masks = CASES["mistral, equal layers"].model_and_masks()
    assert export(converted(tmp_path, model, masks), tmp_path / "model.gguf") == 0
    assert GgufModel(tmp_path / "model.gguf").metadata["llama.context_length"] == 100
    assert "sliding window" in capsys.readouterr().out


@pytest.fixture
def out(tmp_path):
    """A converted model without a tokenizer, of 320 tokens."""
    model = tiny_model("llama", 4, 4, WIDTH, vocab_size=320)
    return converted(tmp_path, model, masks_for([list(kept) for kept in MHA], []))


@pytest.mark.parametrize("name", TOKENIZERS)
def test_byte_level_tokenizers(out, tmp_path, name):
    tokenizer = TOKENIZERS[name]()
    tokenizer.save_pretrained(out)
    assert export(out, tmp_path / "model.gguf") == 0
    metadata = GgufModel(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "gpt2" and metadata["tokenizer.ggml.pre"] == name
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == 320
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1] == "[PAD319]" and kinds[-1] == gguf.TokenType.UNUSED
    special, user = (tokenizer.convert_tokens_to_ids(token) for token in ("<|end|>", "[user]"))
    assert kinds[special] == gguf.TokenType.CONTROL and kinds[user] == gguf.TokenType.USER_DEFINED
    assert metadata["tokenizer.ggml.eos_token_id"] == special
    merges = json.loads((out / "tokenizer.json").read_text())["model"]["merges"]
    assert metadata["tokenizer.ggml.merges"] == [" ".join(merge) for merge in merges]


def test_sentencepiece_tokenizers(out, tmp_path):
    pytest.importorskip("sentencepiece")
    size = sentencepiece_model(out).vocab_size()
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}, str(size): {"content": "[user]"}}}
        )
    )
    assert export(out, tmp_path / "model.gguf") == 0
    metadata = GgufModel(tmp_path / "model.gguf").metadata
    assert metadata["tokenizer.ggml.model"] == "llama" and len(metadata["tokenizer.ggml.scores"]) == 320
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    assert tokens[:3] == ["<unk>", "<s>", "</s>"] and tokens[size] == "[user]"
    expected = ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert [gguf.TokenType(kind).name for kind in kinds[:4]] == expected
    assert kinds[size] == gguf.TokenType.USER_DEFINED and kinds[-1] == gguf.TokenType.UNUSED


def _of_json(**changes):
    return lambda out: (out / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": {}}} | changes)
    )


WRONG_TOKENIZERS = {
    "words": (_of_json(model={"type": "WordLevel", "vocab": {"a": 0}}), "is 'WordLevel'"),
    "an expression that is not known": (
        lambda out: byte_level(pre_tokenizers.Split(Regex("x+"), "isolated"), use_regex=False).save_pretrained(out),
        "has no name here",
    ),
    "spaces that stay": (
        _of_json(pre_tokenizer={"type": "Metaspace"}),
        "has no name here",
    ),
    "no merges": (_of_json(pre_tokenizer={"type": "ByteLevel"}), "has no merges"),
    "gaps": (
        _of_json(
            pre_tokenizer={"type": "ByteLevel"}, model={"type": "BPE", "vocab": {"a": 0, "b": 7}, "merges": ["a b"]}
        ),
        "have gaps",
    ),
    "too many tokens": (
        _of_json(
            pre_tokenizer={"type": "ByteLevel"},
            model={"type": "BPE", "vocab": {str(index): index for index in range(400)}, "merges": ["1 2"]},
        ),
        "has 400 tokens, the model 320",
    ),
    "a step that is a text": (_of_json(pre_tokenizer="ByteLevel"), "is damaged (AttributeError: "),
    "a token without id": (
        _of_json(
            pre_tokenizer={"type": "ByteLevel"},
            model={"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]},
            added_tokens=[{"content": "b"}],
        ),
        "is damaged (KeyError: 'id')",
    ),
    "neither file": (lambda out: (out / "vocab.txt").write_text("a"), "neither tokenizer.model nor tokenizer.json"),
    "normalised text": (lambda out: sentencepiece_model(out, remove_extra_whitespaces=True), "changes text before"),
    "unknown letters": (lambda out: sentencepiece_model(out, byte_fallback=False), "changes text before"),
    "damaged pieces": (lambda out: (out / "tokenizer.model").write_bytes(b"\xff" * 20), "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG_TOKENIZERS)
def test_other_tokenizers_are_refused_and_can_be_left_out(out, tmp_path, capsys, name):
    make, message = WRONG_TOKENIZERS[name]
    make(out)
    assert export(out, tmp_path / "model.gguf") == 2
    error = capsys.readouterr().err
    assert message in error and sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]
    assert export(out, tmp_path / "model.gguf", "--without-tokenizer") == 0
    assert GgufModel(tmp_path / "model.gguf").metadata["tokenizer.ggml.model"] == "none"


WRONG_MODELS = {
    "experts": (lambda: tiny_model("mixtral", 4, 4, 24), "holds all experts of a layer in one tensor"),
    "another family": (lambda: tiny_model("gemma3_text", 4, 4, 24, hidden_size=128), "is not known here"),
    "biases of Qwen3": (lambda: tiny_model("qwen3", 4, 4, 24, attention_bias=True), "has no such bias"),
    "yarn": (
        lambda: tiny_model("llama", 4, 4, 24, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type is 'yarn'",
    ),
    "the rope of Llama 3 in Qwen3": (lambda: tiny_model("qwen3", 4, 4, 24, **LLAMA3), "rope_type is 'llama3'"),
}


@pytest.mark.parametrize("name", WRONG_MODELS)
def test_models_that_llama_cpp_cannot_be_told_are_refused(tmp_path, capsys, name):
    make, message = WRONG_MODELS[name]
    make().save_pretrained(tmp_path / "model")
    assert export(tmp_path / "model", tmp_path / "model.gguf") == 2
    assert message in capsys.readouterr().err and not list(tmp_path.glob("*.gguf*"))


def test_wrong_calls_write_nothing(ckpt, tmp_path, capsys):
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    (tmp_path / "there.gguf").write_text("mine")
    assert export(tmp_path / "out", tmp_path / "there.gguf") == 2 and "exists" in capsys.readouterr().err
    assert export(ckpt, tmp_path / "new.gguf") == 2 and "convert it first" in capsys.readouterr().err
    assert export(tmp_path / "absent", tmp_path / "new.gguf") == 2 and "is missing" in capsys.readouterr().err
    edit_json(tmp_path / "out" / "config.json", hidden_size=64)
    assert export(tmp_path / "out", tmp_path / "new.gguf") == 2 and "do not fit" in capsys.readouterr().err
    assert (tmp_path / "there.gguf").read_text() == "mine" and not (tmp_path / "new.gguf").exists()


def test_nothing_is_left_when_the_disk_fails(ckpt, tmp_path, monkeypatch, capsys):
    assert convert_pruned(ckpt, tmp_path / "out") == 0
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    before = sorted(tmp_path.iterdir())
    assert export(tmp_path / "out", tmp_path / "new.gguf") == 2 and "No space" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_without_gguf_it_says_what_to_install(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert export(ckpt, tmp_path / "new.gguf") == 2 and "pip install gguf" in capsys.readouterr().err


def test_masks_of_an_odd_head_order_come_out(tmp_path):
    """Heads of one KV head are moved together with their columns of o_proj."""
    model = tiny_model("llama", 6, 2, WIDTH)
    masks = masks_for([[0, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0.5], [0, 0, 2, 0, 0, 0]], [])
    write_masked(tmp_path / "ckpt", model, masks)
    assert convert_pruned(tmp_path / "ckpt", tmp_path / "out") == 0
    assert export(tmp_path / "out", tmp_path / "model.gguf") == 0
    with torch.no_grad(), apply_masks(model, masks):
        expected = model(torch.tensor([prompts()[3]])).logits[0]
    torch.testing.assert_close(GgufModel(tmp_path / "model.gguf").logits(prompts()[3]), expected, rtol=1e-4, atol=1e-4)

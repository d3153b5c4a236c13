"""finetune-pruned: trains what is there and nothing else, can be interrupted, and leaves a converted model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.losses import divergence
from helpers.masked import edit_json
from helpers.tiny import byte_tokenizer, converted, expert_masks, masks_for, prompts, tiny_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast, TrainingArguments

from learner.data.reading import read_tokens
from learner.finetune import cli as finetune_cli
from learner.finetune.distillation import Distillation
from learner.finetune.finetune import finetune
from learner.finetune.job import SHARDING, FinetuneJob, default_learning_rate
from learner.model.perplexity import perplexity
from pruned_vllm.common.manifest import written_by
from pruned_vllm.hf.loading import load_pruned

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. "
UNEVEN = [[1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 0, 1], [0] * 12, [2.0] * 12]  # groups of [3, 1, 2], no attention, all
RAGGED = [[17, 0, 24, 5], [0, 0, 0, 0], [1, 2, 3, 4]]
NUM_STEPS = 12


def widths(*kept: int) -> list[torch.Tensor]:
    return [(torch.arange(40) < width).float() for width in kept]


def llama():
    return tiny_model("llama", 12, 3, 40), masks_for(UNEVEN, widths(17, 40, 0))


def phi3():  # its stock class has fused projections
    return tiny_model("phi3", 12, 3, 40), masks_for(UNEVEN, widths(17, 40, 0))


def even_llama():  # comes out as a stock model
    return tiny_model("llama", 6, 6, 40), masks_for([[1, 1, 1, 0, 0, 0]] * 3, widths(16, 16, 16))


def moe(model_type: str, kept: list[list[int]] = RAGGED):
    model = tiny_model(model_type, 6, 3, 24)
    return model, expert_masks(model, kept) | masks_for([[0, 0, 1, 1, 1, 1]] * 3 if kept is RAGGED else [], [])


MODELS = {
    "llama": llama,
    "phi3": phi3,
    "llama, stock": even_llama,
    "qwen3_moe": lambda: moe("qwen3_moe"),
    "qwen3_moe, stock": lambda: moe("qwen3_moe", [[16] * 4] * 3),
    "mixtral": lambda: moe("mixtral"),  # its modules have other names on disk
}


def make(tmp_path: Path, name: str) -> tuple[Path, Path]:
    """A converted model beside its dense one (ckpt/), and text."""
    out, text = converted(tmp_path, *MODELS[name]()), tmp_path / "text.txt"
    for directory in (out, tmp_path / "ckpt"):
        byte_tokenizer().save_pretrained(directory)
    text.write_text(TEXT * 40)
    return out, text


def job(out: Path, text: Path, rank: int, **options) -> FinetuneJob:
    small = {"steps": NUM_STEPS, "batch_size": 4, "micro_batch_size": 2, "sequence_length": 32, "learning_rate": 5e-3}
    small |= {"lora_rank": rank, "device": "cpu", "agreement_prompts": 0}
    return FinetuneJob(model=str(out), data=[str(text)], **small | options)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: x for path in directory.glob("*.safetensors") for name, x in load_file(path).items()}


@pytest.fixture
def interrupted(monkeypatch):
    """Raises KeyboardInterrupt in the middle of step 7, after a checkpoint at 5; undone when called."""
    monkeypatch.setattr("learner.finetune.finetune.SAVE_EVERY", 5)
    compute_loss, calls = Distillation.compute_loss, []

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 14:
            raise KeyboardInterrupt
        return compute_loss(self, *args, **kwargs)

    monkeypatch.setattr(Distillation, "compute_loss", stop)
    return lambda: monkeypatch.setattr(Distillation, "compute_loss", compute_loss)


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("name", MODELS)
def test_resumed_is_uninterrupted(tmp_path, name, rank, interrupted):
    out, text = make(tmp_path, name)
    work = job(out, text, rank)
    with pytest.raises(KeyboardInterrupt):
        finetune(work, tmp_path / "resumed")
    assert (tmp_path / "resumed.unfinished").is_dir() and not (tmp_path / "resumed").exists()
    interrupted()
    finetune(work, tmp_path / "resumed", resume=True)
    finetune(work, tmp_path / "whole")
    assert not list(tmp_path.glob("*.unfinished"))
    before, whole, resumed = tensors(out), tensors(tmp_path / "whole"), tensors(tmp_path / "resumed")
    assert resumed.keys() == whole.keys() == before.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=1e-6, msg=f"{key} of the resumed run differs")
    unmoved = {key for key, tensor in whole.items() if torch.equal(tensor, before[key])}
    untrained = {key for key in before if is_untrained(key, rank)}
    gone = ".layers.1." if name == "qwen3_moe" or name == "mixtral" else "nothing"  # its experts have no channels
    assert {key for key in unmoved ^ untrained if gone not in key} == set()


def is_untrained(key: str, rank: int) -> bool:
    if rank:
        return "_proj." not in key and not key.endswith((".w1.weight", ".w2.weight", ".w3.weight"))
    return key.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight"))


@pytest.mark.parametrize("rank", [4, 0])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "qwen3_moe, stock"])
def test_recovered_is_the_trained_model(tmp_path, name, rank, monkeypatch):
    out, text = make(tmp_path, name)
    tokens, trained, train = torch.tensor(prompts()[-1:]), [], Distillation.train

    def remember(self, *args, **kwargs):
        output = train(self, *args, **kwargs)
        with torch.no_grad():
            trained.append(self.model.eval()(input_ids=tokens).logits)
        return output

    monkeypatch.setattr(Distillation, "train", remember)
    results = finetune(job(out, text, rank, eval_data=[str(text)]), tmp_path / "recovered")
    recovered = load_pruned(tmp_path / "recovered")
    with torch.no_grad():
        torch.testing.assert_close(recovered(tokens).logits, trained[0], rtol=1e-3, atol=1e-4)
    ids = read_tokens(byte_tokenizer(), [text], seed=0)
    assert perplexity(load_pruned(out), ids) == pytest.approx(results["perplexity_before"])
    assert perplexity(recovered, ids) == pytest.approx(results["perplexity_after"])
    assert results["perplexity_after"] < results["perplexity_before"] / 2
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "recovered" / file).read_bytes() == (out / file).read_bytes(), file
    card = (tmp_path / "recovered" / "README.md").read_text()
    assert card.startswith((out / "README.md").read_text()) and f"{results['perplexity_after']:.4g} after" in card
    assert written_by(tmp_path / "recovered", "finetune-pruned") and written_by(out, "convert-pruned")


def test_teacher_brings_the_model_nearer_to_itself(tmp_path):
    out, text = make(tmp_path, "llama")
    dense, ids = MODELS["llama"]()[0], read_tokens(byte_tokenizer(), [text], seed=0)[None, :256]

    def distance(directory: Path) -> float:
        with torch.no_grad():
            return divergence(dense(ids).logits, load_pruned(directory)(ids).logits).item()

    results = {}
    for name, options in {"alone": {}, "taught": {"teacher": str(tmp_path / "ckpt"), "kd_weight": 5.0}}.items():
        finetune(job(out, text, 4, steps=20, **options), tmp_path / name)
        results[name] = distance(tmp_path / name)
    assert results["taught"] < 0.8 * min(results["alone"], distance(out)), (results, distance(out))


def test_half_precision_is_kept(tmp_path):
    out, text = make(tmp_path, "llama")
    load_pruned(out, dtype=torch.bfloat16).save_pretrained(out)
    for rank in (4, 0):
        finetune(job(out, text, rank, steps=2, gradient_checkpointing=True), tmp_path / f"rank{rank}")
        assert {tensor.dtype for tensor in tensors(tmp_path / f"rank{rank}").values()} == {torch.bfloat16}


def test_command(tmp_path, capsys):
    out, text = make(tmp_path, "llama")
    small = ["--steps", "2", "--batch-size", "2", "--sequence-length", "16", "--device", "cpu"]

    def run(*arguments) -> int:
        return finetune_cli.main([str(out), str(tmp_path / "recovered"), "--data", str(text), *small, *arguments])

    assert run("--eval-data", str(text)) == 0
    printed = capsys.readouterr().out
    assert "perplexity before" in printed and "perplexity after" in printed and "vllm serve" in printed
    done = json.loads((tmp_path / "recovered" / "finetuning.json").read_text())["job"]
    assert (done["lora_rank"], done["learning_rate"]) == (16, 1.4e-3)
    assert run() == 2 and "--overwrite" in capsys.readouterr().err
    (tmp_path / "recovered" / "notes.txt").write_text("mine")
    assert run("--overwrite", "--lora-rank", "0") == 0
    assert (tmp_path / "recovered" / "notes.txt").read_text() == "mine"


def test_the_trainer_keeps_its_arguments(tmp_path):
    """A copy of them would count the GPUs again, and split batches over all of them."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Distillation(args=arguments, model=tiny_model("llama", 6, 6, 40), teacher=None, kd_weight=1.0)
    assert trainer.args is arguments and not arguments.save_only_model


def test_default_learning_rate():
    """The law's values for the hidden sizes of Llama 3.2 1B and 3B, 3.1 8B and 70B."""
    expected = {2048: 4.91e-4, 3072: 3.58e-4, 4096: 2.86e-4, 8192: 1.66e-4}
    for hidden_size, rate in expected.items():
        assert default_learning_rate(hidden_size, 16) == pytest.approx(rate, rel=0.03)
        assert default_learning_rate(hidden_size, 0) == pytest.approx(rate / 10, rel=0.03)
    assert default_learning_rate(576, 16) == 1.3e-3 and default_learning_rate(64, 16) == default_learning_rate(512, 16)


def test_too_little_memory_is_a_message(tmp_path, capsys, monkeypatch):
    out, text = make(tmp_path, "llama")

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("no more of it")

    monkeypatch.setattr(Distillation, "compute_loss", fail)
    options = ["--device", "cpu", "--steps", "1", "--sequence-length", "16", "--batch-size", "2"]
    assert finetune_cli.main([str(out), str(tmp_path / "recovered"), "--data", str(text), *options]) == 2
    assert "the memory is not enough: no more of it" in capsys.readouterr().err
    assert not list(tmp_path.glob("recovered*"))


def test_wrong_input_is_refused_before_anything_is_written(tmp_path, capsys, monkeypatch):
    out, text = make(tmp_path, "llama")
    stranger = tiny_model("llama", 6, 6, 40)
    stranger.resize_token_embeddings(99)
    stranger.save_pretrained(tmp_path / "stranger")
    byte_tokenizer().save_pretrained(tmp_path / "stranger")
    tiny_model("llama", 6, 6, 40).save_pretrained(tmp_path / "other tokenizer")
    tokenizer = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: len(vocabulary) - 1 - index for token, index in vocabulary.items()}
    tokenizer["added_tokens"] = []
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(tokenizer)))
    other.save_pretrained(tmp_path / "other tokenizer")
    shutil.copytree(out, tmp_path / "quantized")
    edit_json(tmp_path / "quantized" / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, message in (
        ([tmp_path / "quantized", "--data", text], "is quantized; train the model that it was made from"),
        ([out, "--data", tmp_path / "none.txt"], "none.txt"),
        ([tmp_path / "ckpt", "--data", text], "says nothing of pruning"),
        ([tmp_path, "--data", text], "config.json is missing"),
        ([out, "--data", text, "--batch-size", 6, "--micro-batch-size", 4], "no multiple"),
        ([out, "--data", text, "--device", "cuda"], "PyTorch finds no GPU"),
        ([out, "--data", text, "--teacher", tmp_path / "stranger"], "has 99 tokens"),
        ([out, "--data", text, "--teacher", tmp_path / "other tokenizer"], "the teacher's tokenizer makes tokens"),
        ([out, "--data", text, "--teacher", tmp_path / "nowhere"], "neither a directory nor a model"),
    ):
        model, *rest = map(str, arguments)
        code = finetune_cli.main([model, str(tmp_path / "recovered"), "--sequence-length", "32", *rest])
        assert code == 2 and message in capsys.readouterr().err, message
    for flag, name in SHARDING.items():
        with monkeypatch.context() as launched:
            launched.setenv(flag, "true")
            assert finetune_cli.main([str(out), str(tmp_path / "recovered"), "--data", str(text)]) == 2
        assert f"accelerate is set up for {name}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_interrupted_command(tmp_path, interrupted, capsys, monkeypatch):
    out, text = make(tmp_path, "llama")
    unfinished = tmp_path / "recovered.unfinished"
    arguments = [
        str(out),
        str(tmp_path / "recovered"),
        "--data",
        str(text),
        "--sequence-length",
        "32",
        "--device",
        "cpu",
    ]
    arguments += ["--batch-size", "4", "--micro-batch-size", "2", "--steps", "8"]
    assert finetune_cli.main(arguments) == 130 and unfinished.is_dir()
    assert "--resume goes on" in capsys.readouterr().out
    assert finetune_cli.main(arguments) == 2 and "go on with --resume" in capsys.readouterr().err
    assert finetune_cli.main([*arguments, "--resume", "--seed", "7"]) == 2
    assert "seed: 42, now 7" in capsys.readouterr().err
    (unfinished / "checkpoint-5" / "trainer_state.json").unlink()  # as if it had ended while that was written
    assert finetune_cli.main([*arguments, "--resume"]) == 0 and not unfinished.exists()
    monkeypatch.setattr(Distillation, "compute_loss", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        finetune_cli.main([*arguments, "--overwrite"])
    assert not unfinished.exists(), "what cannot be resumed is left behind"


def test_deepseek_cannot_be_trained(tmp_path, capsys):
    model = tiny_model("deepseek", 6, 3, 40)
    out = converted(tmp_path, model, expert_masks(model, RAGGED))
    assert finetune_cli.main([str(out), str(tmp_path / "recovered"), "--data", str(out / "README.md")]) == 2
    assert "Transformers has no DeepseekForCausalLM" in capsys.readouterr().err

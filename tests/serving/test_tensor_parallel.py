"""Any number of ranks serves what one does, whatever heads, widths and vocabulary there are. On the CPU backend."""

import json
import shutil

import pytest
from helpers.serving import (
    ALL,
    BIASES,
    GEOMETRIES,
    MHA,
    NONE,
    NOT_FEW,
    ODD,
    UNEVEN,
    Geometry,
    assert_is_the_masked_model,
    assert_serves_the_masked_model,
    engine,
    generate,
)
from helpers.tiny import converted, expert_masks, tiny_model

TWO_RANKS = {
    name: GEOMETRIES[name]
    for name in (
        "llama ragged",
        "llama mqa",
        "llama uneven groups, biases",
        "llama no attention at all",
        "mistral uneven groups, sliding window",
        "qwen2 skips",
        "qwen3 very uneven groups",
        "qwen3 biases, uneven groups",
        "gemma3 uneven groups, biases",
        "phi3 skips, half of a head rotated",
        "qwen3.5 uneven groups",
    )
} | {
    "llama one head and one channel, biases survive": Geometry(
        ((0, 0, 0, 0, 0, 1), NONE, (1, 1, 1, 1, 1, 0)), (1, 99, 0), config=BIASES
    ),
    "qwen2 one wide group and single heads": Geometry(((5, 0, 0), (1, 0, 1), (5, 4, 1)), ODD, "qwen2", 5),
}
# vLLM pads the vocabulary to 64: 3 ranks divide neither 256 nor the 320 that 257 becomes. More ranks than 4 cannot be
# tried, but for 8: vLLM's sum over the ranks of a CPU says "Invalid world size".
MORE_RANKS = {
    (3, "llama mha"): Geometry(MHA, ODD),
    (3, "llama mqa, tied, one token too many"): Geometry(
        ((4,), (1,), (3,)), ODD, group=6, config={"vocab_size": 257, "tie_word_embeddings": True}
    ),
    (3, "qwen3 uneven groups"): Geometry(UNEVEN, ODD, "qwen3", 4, config={"vocab_size": 331}),
    (3, "gemma3 uneven groups, tied"): Geometry(UNEVEN, NOT_FEW, "gemma3_text", 4, config={"vocab_size": 331}),
    (4, "qwen3 uneven groups"): Geometry(UNEVEN, ODD, "qwen3", 4, config={"vocab_size": 331}),
}
USUAL = ("llama one head and one channel, biases survive",)


@pytest.fixture(autouse=True)
def cores_for_ranks(monkeypatch):
    """Without it vLLM looks for a NUMA node for each rank. Ranks may share a core."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")


@pytest.mark.parametrize(
    ("ranks", "geometry"),
    [
        pytest.param(ranks, geometry, id=f"{ranks} ranks, {name}", marks=[pytest.mark.slow] * (name not in USUAL))
        for (ranks, name), geometry in ({(2, name): value for name, value in TWO_RANKS.items()} | MORE_RANKS).items()
    ],
)
def test_ranks_serve_the_masked_model(tmp_path, ranks, geometry):
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks, geometry.site)
    assert_serves_the_masked_model(directory, model, masks, geometry.site, tensor_parallel_size=ranks)


@pytest.mark.slow
def test_stock_result_and_draft_that_three_ranks_do_not_divide(tmp_path):
    """Equal layers are written for a stock class, which refuses what the ranks do not divide; the plugin serves it.

    Here it has one KV head with four query heads, 33 channels and 257 tokens. Its draft is the same model, so that a
    draft that went wrong would show in the tokens that are accepted.
    """
    geometry = Geometry(((4,),) * 3, (33,) * 3, group=6, config={"vocab_size": 257}, stock=True)
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks)
    pruned = {"architectures": ["PrunedLlamaForCausalLM"]}
    draft_directory = shutil.copytree(directory, tmp_path / "draft")  # vLLM has no --hf-overrides for drafts
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    (draft_directory / "config.json").write_text(json.dumps(config | pruned))
    draft = {"method": "draft_model", "model": str(draft_directory), "num_speculative_tokens": 3}
    draft["use_local_argmax_reduction"] = True  # looks for the best token on each rank, padding masked
    options = {"hf_overrides": pruned, "speculative_config": draft, "disable_log_stats": False}
    with engine(directory, tensor_parallel_size=3, **options) as llm:
        outputs = generate(llm)
        counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    assert_is_the_masked_model(outputs, model, masks)
    accepted = counters["vllm:spec_decode_num_accepted_tokens"] / counters["vllm:spec_decode_num_draft_tokens"]
    assert accepted > 0.8  # what is drafted beyond the last token is cut off


@pytest.mark.slow
def test_pruned_draft_of_the_dense_model(tmp_path):
    """The dense model has 12 heads and 100 channels, which four ranks divide; the draft has sizes that they do not."""
    geometry = Geometry(((5,), (1,), (3,)), (99, 1, 51), group=12)
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks)
    model.save_pretrained(tmp_path / "dense")
    draft = {"method": "draft_model", "model": str(directory), "num_speculative_tokens": 3}
    with engine(tmp_path / "dense", tensor_parallel_size=4, speculative_config=draft) as llm:
        outputs = generate(llm)
    assert_is_the_masked_model(outputs, model, {})


def test_more_ranks_than_query_heads_are_refused(tmp_path):
    model, masks = Geometry(((1, 0), (0, 1), (1, 0)), ODD).model_and_masks()
    directory = converted(tmp_path, model, masks)
    with (
        pytest.raises(ValueError, match="is more than the 1 query heads of the largest layer"),
        engine(directory, tensor_parallel_size=2),
    ):
        pass


def test_ranks_that_would_pad_heads_which_are_normalised_together_are_refused(tmp_path):
    model = tiny_model("olmoe", 6, 6, 24)
    directory = converted(tmp_path, model, expert_masks(model, [[3, 4, 5, 6]] * 3))
    message = "no head can be padded, since .* normalises q and k over all heads .*; choose one that divides 6 heads"
    with pytest.raises(ValueError, match=message), engine(directory, tensor_parallel_size=4):
        pass


def test_lora_with_padded_ranks_is_refused(tmp_path):
    model, masks = Geometry((MHA[0], ALL, MHA[1]), ODD).model_and_masks()
    directory = converted(tmp_path, model, masks)
    with (
        pytest.raises(Exception, match="LoRA adapters have the unpadded shapes; use --tensor-parallel-size 1"),
        engine(directory, tensor_parallel_size=2, enable_lora=True),
    ):
        pass

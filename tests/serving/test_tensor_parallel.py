"""Two ranks serve what one does, whatever the head counts and widths. Runs on the CPU backend."""

import pytest
from helpers.serving import ALL, BIASES, GEOMETRIES, MHA, NONE, ODD, Geometry, assert_serves_the_masked_model, engine
from helpers.tiny import converted

UGLY = {
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
    )
} | {
    "llama one head and one channel, biases survive": Geometry(
        ((0, 0, 0, 0, 0, 1), NONE, (1, 1, 1, 1, 1, 0)), (1, 99, 0), config=BIASES
    ),
    "qwen2 one wide group and single heads": Geometry(((5, 0, 0), (1, 0, 1), (5, 4, 1)), ODD, "qwen2", 5),
}


@pytest.fixture(autouse=True)
def one_core_for_each_rank(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # without it vLLM looks for two NUMA nodes


USUAL = ("llama ragged", "qwen3 very uneven groups", "llama one head and one channel, biases survive")


@pytest.mark.parametrize(
    "geometry",
    [pytest.param(its, id=name, marks=() if name in USUAL else pytest.mark.slow) for name, its in UGLY.items()],
)
def test_two_ranks_serve_the_masked_model(tmp_path, geometry):
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks, geometry.site)
    assert_serves_the_masked_model(directory, model, masks, geometry.site, tensor_parallel_size=2)


def test_stock_results_that_do_not_divide_are_served_through_the_plugin(tmp_path):
    """Equal layers are written for a stock class, which refuses what tensor parallelism does not divide."""
    geometry = Geometry(((1, 1, 1, 0, 0, 0),) * 3, (33,) * 3, stock=True)
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks)
    overrides = {"architectures": ["PrunedLlamaForCausalLM"]}
    assert_serves_the_masked_model(directory, model, masks, tensor_parallel_size=2, hf_overrides=overrides)


def test_more_ranks_than_query_heads_are_refused(tmp_path):
    model, masks = Geometry(((1, 0), (0, 1), (1, 0)), ODD).model_and_masks()
    directory = converted(tmp_path, model, masks)
    with (
        pytest.raises(ValueError, match="is more than the 1 query heads of the largest layer"),
        engine(directory, tensor_parallel_size=2),
    ):
        pass


def test_lora_with_padded_ranks_is_refused(tmp_path):
    model, masks = Geometry((MHA[0], ALL, MHA[1]), ODD).model_and_masks()
    directory = converted(tmp_path, model, masks)
    with (
        pytest.raises(Exception, match="LoRA adapters have the unpadded shapes; use --tensor-parallel-size 1"),
        engine(directory, tensor_parallel_size=2, enable_lora=True),
    ):
        pass

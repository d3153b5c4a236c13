"""Tyr-the-Pruner: its supernet and whole runs on tiny models; see test_tyr_pruning.py and test_tyr_search.py."""

import copy
from pathlib import Path
from random import Random

import pytest
import torch
from helpers.learning import run, task_of
from helpers.losses import divergence
from helpers.tiny import HF_MOE, converted, tiny_model

from learner.methods.tyr import learn as tyr
from learner.methods.tyr import search as tyr_search
from learner.methods.tyr import supernet as tyr_supernet
from learner.methods.tyr.search import divergences
from learner.methods.tyr.sublayers import collect_hessians, sublayers_of
from learner.methods.tyr.supernet import Supernet
from learner.model.blockwise import Blockwise
from learner.model.masking import apply_masks
from learner.run.journal import Journal
from learner.settings import TyrSettings
from pruned_vllm.hf.loading import load_pruned

SMALL = {
    "calibration_sequences": 12,
    "sequence_length": 32,
    "iterations": 2,
    "generations": 2,
    "offspring": 18,
    "selection_tokens": 256,
}
MODELS = {"llama": (6, 6, 40), "qwen3": (6, 3, 40), "qwen3_moe": (6, 3, 40)}
TOKENS = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(3))


def small_task(name: str = "qwen3", sparsity=0.5, journal: Journal | None = None, tied: bool = False, **settings):
    return task_of(
        tiny_model(name, *MODELS[name]), TyrSettings(**SMALL | settings), sparsity, journal=journal, tied=tied
    )


def lost(genome, sublayers) -> dict[str, int]:
    """Units that a genome has lost, by kind."""
    kinds = {sublayer.kind for sublayer in sublayers}
    return {
        kind: sum(n for n, sublayer in zip(genome, sublayers, strict=True) if sublayer.kind == kind) for kind in kinds
    }


def supernet_of(task, directory: Path, reach: int = 4) -> Supernet:
    sublayers = sublayers_of(task.units)
    levels = tyr.space_around(tyr.uniform(task, sublayers), sublayers, 0, reach).levels
    return Supernet(directory, Blockwise(task.model, torch.device("cpu")), sublayers, levels, task.accelerator)


@pytest.mark.parametrize("sparsity", [0.5, 0.3, 0.05, 0.9])
def test_uniform_sparsity_is_exact(sparsity):
    task = small_task("qwen3_moe", sparsity)
    sublayers = sublayers_of(task.units)
    genome = tyr.uniform(task, sublayers)
    for kind, number in lost(genome, sublayers).items():
        assert number == round(task.units.count(kind) * sparsity)
        counts = [n for n, sublayer in zip(genome, sublayers, strict=True) if sublayer.kind == kind]
        assert max(counts) - min(counts) <= 1


def test_levels_get_finer_and_stay_within_the_sublayer():
    task = task_of(tiny_model("llama", 6, 6, 352, num_hidden_layers=1), TyrSettings(), 0.25)
    sublayers = sublayers_of(task.units)
    centre = tyr.uniform(task, sublayers)
    spaces = [tyr.space_around(centre, sublayers, iteration) for iteration in range(4)]
    assert [space.intervals for space in spaces] == [[1, 44], [1, 22], [1, 11], [1, 6]]
    assert spaces[0].levels == [(0, 1, 2, 3, 4, 5, 6), (0, 44, 88, 132, 176, 220, 264)]
    assert spaces[1].levels[1] == tuple(range(0, 177, 22)) and len(spaces[1].levels[1]) == 9


@pytest.mark.parametrize("model_type", HF_MOE)
def test_hessians_are_those_of_the_layers_outputs(model_type):
    """The weight's error as H sees it is the error of the layer, router weights and all."""
    model = tiny_model(model_type, 6, 3 if model_type != "olmoe" else 6, 40)
    task, layer = task_of(model), model.model.layers[1]
    members = [member for member in sublayers_of(task.units) if member.layer == 1]
    seen = []
    module = layer.mlp.experts
    hook = module.register_forward_hook(lambda module, args, output: seen.append((output.clone(), args)))
    with collect_hessians(layer, members) as hessians:
        model(TOKENS)
    hook.remove()
    (dense, args), pruned = seen[0], next(member for member in members if member.expert == 2)
    change = torch.randn(pruned.weight(layer).shape, generator=torch.Generator().manual_seed(0))
    pruned.weight(layer).add_(change)
    error = (module(*args) - dense).double().square().sum()
    by_hessian = (change.double() @ hessians[pruned.name].double() * change.double()).sum()
    torch.testing.assert_close(by_hessian, error, rtol=1e-3, atol=0)


def test_text_goes_on_through_the_mean_of_equation_5(tmp_path, monkeypatch):
    """What block 1 is pruned for is what block 0 puts out with candidates' outputs averaged, or the dense ones."""
    task, seen = small_task("qwen3"), {}
    model = copy.deepcopy(task.model)

    def spy(weight, hessian, *args):
        seen.setdefault(accumulate, []).append(hessian)
        return tyr_supernet_prune(weight, hessian, *args)

    tyr_supernet_prune = tyr_supernet.prune
    monkeypatch.setattr(tyr_supernet, "prune", spy)
    for accumulate in (True, False):
        supernet = supernet_of(task, tmp_path / str(accumulate))
        supernet.build(TOKENS, accumulate, "test")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), task.model.parameters(), strict=True))

    def hessian_of_block_1() -> torch.Tensor:
        with collect_hessians(model.model.layers[1], [supernet.sublayers[2]]) as hessians:
            model(TOKENS)
        return hessians["head"]

    torch.testing.assert_close(seen[False][2], hessian_of_block_1(), rtol=1e-4, atol=1e-2)
    supernet = supernet_of(task, tmp_path / "True")
    for index, module in enumerate((model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj)):
        levels, units = supernet.levels[index], supernet.sublayers[index].num_units
        assert levels[0] == 0 and len(levels) >= 7

        def mean_of_outputs(module, args, output, levels=levels, units=units, index=index):
            shares = [1 - count / units for count in levels]
            outputs = [args[0] @ supernet.weight(index, count).T for count in levels]
            return sum(share * output for share, output in zip(shares, outputs, strict=True)) / sum(shares)

        module.register_forward_hook(mean_of_outputs)
    expected = hessian_of_block_1()
    torch.testing.assert_close(seen[True][2], expected, rtol=1e-4, atol=1e-2)
    assert not torch.allclose(seen[False][2], expected, rtol=1e-2)


def test_divergences_are_those_of_the_whole_model(tmp_path, monkeypatch):
    """Against each genome's model written out; some genomes begin alike."""
    monkeypatch.setattr("learner.model.blockwise.TOKENS_PER_PASS", 96)  # in parts, the last one smaller
    task = small_task("qwen3_moe", 0.4)
    supernet = supernet_of(task, tmp_path)
    supernet.build(TOKENS, True, "test")
    random, centre = Random(0), tyr.uniform(task, supernet.sublayers)
    space = tyr.space_around(centre, supernet.sublayers, 0)
    genomes = [(0,) * len(centre), centre, *space.offspring(centre, 4, random)]
    tokens = TOKENS[:5]
    found = divergences(supernet, genomes, tokens)
    dense = task.model(tokens).logits[:, :-1]
    for genome, value in zip(genomes, found, strict=True):
        model = copy.deepcopy(task.model)
        for index, (sublayer, count) in enumerate(zip(supernet.sublayers, genome, strict=True)):
            sublayer.weight(model.model.layers[sublayer.layer]).copy_(supernet.weight(index, count))
        assert value == pytest.approx(divergence(dense, model(tokens).logits[:, :-1]).item(), rel=1e-3, abs=1e-6)
    assert found[0] == 0 and len(set(found)) == len(found)


def test_divergence_counts_the_likeliest_tokens_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tyr_search, "TOP_LOGITS", 10)
    task = small_task("llama")
    supernet = supernet_of(task, tmp_path, reach=0)
    supernet.build(TOKENS, True, "test")
    genome = tyr.uniform(task, supernet.sublayers)
    (found,) = divergences(supernet, [genome], TOKENS)
    top = task.model(TOKENS).logits[:, :-1].topk(10)
    tyr._install(task, supernet, genome)
    pruned = task.model(TOKENS).logits[:, :-1].gather(-1, top.indices)
    assert found == pytest.approx(divergence(top.values, pruned).item(), rel=1e-4)


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("qwen3", False), ("qwen3", True), ("qwen3_moe", False)])
def test_the_learned_model_is_the_pruned_model(tmp_path, name, tied):
    """Exact budgets, weights that are zero where masks are, and the same logits once it is converted."""
    task = small_task(name, {"head": 1 / 3, "channel": 0.4, "expert": 0.45}, tied=tied)
    dense = copy.deepcopy(task.model)
    learned = tyr.learn(task)
    for kind, values in learned.values.items():
        assert values.shape == task.units.shape(kind) and set(values.unique().tolist()) == {0, 1}
        assert (values == 0).sum() == round(task.units.count(kind) * task.budget.sparsity[kind])
    masks = task.units.to_masks(learned.values)
    logits = task.model(TOKENS).logits
    with apply_masks(task.model, masks):
        torch.testing.assert_close(task.model(TOKENS).logits, logits)
    with apply_masks(dense, masks):
        before = divergence(dense(TOKENS).logits, logits)
    assert before > 0.01, "weights were solved for anew"
    changed = {
        key
        for (key, a), b in zip(dense.named_parameters(), task.model.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed and all("o_proj" in key or "down_proj" in key for key in changed)
    pruned = load_pruned(converted(tmp_path, task.model, masks), dtype=torch.float32)
    torch.testing.assert_close(pruned(TOKENS).logits, logits, rtol=1e-3, atol=1e-3)


def test_solving_for_the_weights_pays():
    """On the text that it saw, against the same masks on the dense weights, and search against none."""

    def measure(**settings):
        task = small_task("llama", 0.3, calibration_sequences=60, **settings)
        tokens = task_of(task.model).blocks.blocks[:60]
        dense_model = copy.deepcopy(task.model)
        values = tyr.learn(task).values
        dense = dense_model(tokens).logits
        with apply_masks(dense_model, task.units.to_masks(values)):
            masked = divergence(dense, dense_model(tokens).logits).item()
        return divergence(dense, task.model(tokens).logits).item(), masked

    uniform, masked = measure(iterations=0)
    assert uniform < 0.9 * masked
    searched, _ = measure(iterations=2, generations=6)
    assert searched < uniform


@pytest.mark.parametrize(
    ("function", "call", "accumulation"),
    [
        ("prune", 3, "expectation"),
        ("prune", 11, "expectation"),
        ("prune", 8, "none"),
        ("score", 2, "expectation"),
        ("score", 9, "none"),
        ("install", 1, "expectation"),
    ],
)
def test_a_resumed_run_ends_as_if_it_had_not_been_interrupted(tmp_path, monkeypatch, function, call, accumulation):
    """Ctrl-C while candidates are made, in a search, and at the very end; the model is loaded anew."""
    whole = small_task(error_accumulation=accumulation)
    expected = tyr.learn(whole).values
    calls = 0
    where = {"prune": (tyr_supernet, "prune"), "score": (tyr, "divergences"), "install": (tyr, "_install")}[function]
    original = getattr(*where)

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(*where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            tyr.learn(small_task(journal=Journal(tmp_path), error_accumulation=accumulation))
    made = []

    def counted(*args):
        made.append(args)
        return original(*args)

    if function == "prune":
        monkeypatch.setattr(*where, counted)
    resumed = small_task(journal=Journal(tmp_path), error_accumulation=accumulation)
    found = tyr.learn(resumed).values
    assert all(torch.equal(found[kind], values) for kind, values in expected.items())
    for (name, a), b in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), f"{name} differs by {(a - b).abs().max()}"
    assert len(list(tmp_path.glob("candidates-*"))) == 1
    if function == "prune":
        blocks_done = (call - 1) // 2  # 2 sublayers in each of 3 blocks, in each of 2 iterations
        assert len(made) == 12 - 2 * blocks_done, "candidates of finished blocks are not made again"


def test_the_seed_decides():
    values = [tyr.learn(small_task("llama")).values for _ in range(2)]
    assert all(torch.equal(values[0][kind], values[1][kind]) for kind in values[0])


def test_the_command_writes_masks_and_weights(word_model):  # noqa: F811
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    out = word_model / "ckpt"
    arguments = ["--method", "tyr", "--data", word_model / "text.txt", *flags, "--error-accumulation", "none"]
    assert run(word_model / "model", out, *arguments) == 0
    assert {"model.safetensors", "pruning_masks.safetensors", "config.json"} <= {path.name for path in out.iterdir()}
    assert len((out / "learning.csv").read_text().splitlines()) == 5
    assert not (word_model / "ckpt.unfinished").exists()

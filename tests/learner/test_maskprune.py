"""MaskPrune: its proximal step, s and the multipliers, the budget in parameters, and stock models at the end."""

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from helpers.learning import geometry_of, unit_budget
from helpers.tiny import tiny_model, write_masked
from peft import PeftModel
from transformers import AutoModelForCausalLM

from converter.convert import convert
from converter.plan import make_plan
from learner.data.reading import BlockSampler
from learner.methods.maskprune import learn as maskprune
from learner.methods.maskprune.minimax import Minimax, next_smallest_square, shrink_smallest, smallest_square_norm
from learner.methods.method import Learned, Task
from learner.model.masking import apply_masks
from learner.model.units import Units
from learner.run.journal import Journal
from learner.settings import MaskPruneSettings
from pruned_vllm.formats.layer import LayerGeometry

MODELS = {
    "llama": ("llama", 4, 4, 40),
    "qwen3": ("qwen3", 8, 4, 40),
    "qwen3_moe": ("qwen3_moe", 8, 4, 40),
}
QUICK = MaskPruneSettings(steps=60, batch_size=4, sequence_length=16)


def task_for(model, settings: MaskPruneSettings, sparsity: float = 0.5, journal: Journal | None = None) -> Task:
    units = Units.from_geometry(geometry_of(model), tied=True)
    text = torch.randint(256, (40 * settings.sequence_length,), generator=torch.Generator().manual_seed(5))
    return Task(
        model=model,
        units=units,
        budgets=(unit_budget(units, sparsity),),
        settings=settings,
        seed=3,
        blocks=BlockSampler(text, settings.sequence_length, 3),
        journal=journal or Journal(),
        accelerator=Accelerator(cpu=True),
    )


@pytest.fixture(scope="module")
def learned():
    """By name of MODELS and site, the model with its adapter, what was learned, and its log; made once."""
    made = {}

    def make(name: str, site: str = "product") -> tuple[torch.nn.Module, Learned, list[dict[str, float]]]:
        if (name, site) not in made:
            model, journal = tiny_model(*MODELS[name]), Journal()
            outcome = maskprune.learn(task_for(model, replace(QUICK, channel_mask_site=site), journal=journal))
            made[name, site] = model, outcome, journal._rows
        return made[name, site]

    return make


@pytest.mark.parametrize("seed", range(20))
def test_proximal_step_is_the_minimum_that_a_search_finds(seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.rand(2, 5, generator=generator, dtype=torch.float64) * 2 - 0.5
    count, weight = seed % 6, 0.1 * 3 ** (seed % 4)

    def objective(m: torch.Tensor) -> float:
        return (0.5 * (m - start).square().sum() + weight * smallest_square_norm(m, count).sum()).item()

    best = objective(shrink_smallest(start, count, weight))
    # Given which entries are the smallest, the objective is a parabola in each entry: all choices, by enumeration.
    choices = torch.tensor([[bits >> i & 1 for i in range(5)] for bits in range(32)], dtype=torch.float64)
    choices = choices[choices.sum(1) == count]
    found = min(objective(torch.stack((row0, row1))) for row0 in start[0] / (1 + 2 * weight * choices)
                for row1 in start[1] / (1 + 2 * weight * choices))  # fmt: skip
    assert best == pytest.approx(found, abs=1e-12)
    nearby = shrink_smallest(start, count, weight) + 0.05 * torch.randn(500, 2, 5, generator=generator).double()
    assert all(objective(point) >= best - 1e-12 for point in nearby), "a random neighbour is lower"


def test_proximal_step_divides_exactly_the_smallest():
    masks = torch.tensor([[0.5, -0.1, 0.9, 0.3], [1.0, 1.0, 1.0, 1.0]])
    shrunk = shrink_smallest(masks, 2, 0.5)
    assert shrunk.tolist() == torch.tensor([[0.5, -0.05, 0.9, 0.15], [0.5, 0.5, 1.0, 1.0]]).tolist()


def test_subgradient_of_the_norm_is_what_one_more_unit_adds():
    masks = torch.rand(3, 6, dtype=torch.float64)
    for count in range(6):
        added = smallest_square_norm(masks, count + 1) - smallest_square_norm(masks, count)
        torch.testing.assert_close(next_smallest_square(masks, count), added)
    assert next_smallest_square(masks, 6).tolist() == masks.amax(1).square().tolist(), "min(Dim(m), s + 1)"


def minimax(**changes) -> Minimax:
    return Minimax(
        **{
            "widths": {"head": 4, "channel": 10},
            "parameters": {"head": 300, "channel": 700},
            "removed": {"head": 2, "channel": 5},
            "budgets": [["head"], ["channel"]],
            "rates": (0.1, 0.5, 2.0),
            "start": 0.2,
        }
        | changes
    )


def test_multipliers_ascend_by_their_violations():
    constraints, masks = minimax(), {"head": torch.full((3, 4), 0.5), "channel": torch.ones(3, 10)}
    constraints.update(masks)
    # Before: s = 0, so the next smallest mask pulls back by y m^2 and z pushes by its cost, which is all of its budget.
    s = torch.tensor([0.1 * (0.2 - 0.2 * 0.25), 0.1 * (0.2 - 0.2 * 1)], dtype=torch.float64)
    torch.testing.assert_close(constraints.s, s)
    assert [constraints.count(kind) for kind in masks] == [1, 0], "the ceiling of 4 * 0.015 and of 0"
    torch.testing.assert_close(constraints.y, torch.tensor([0.2 + 0.5 * (0.25 / 4 + 0) / 2], dtype=torch.float64))
    torch.testing.assert_close(constraints.z, 0.2 + 2.0 * (0.5 - s))


def test_s_rises_to_the_budget_and_no_further():
    constraints, masks = minimax(), {"head": torch.ones(3, 4), "channel": torch.ones(3, 10)}
    for _ in range(200):
        before = constraints.y.clone(), constraints.z.clone()
        constraints.update(masks)
        for name, kind in (("head", 0), ("channel", 1)):  # the masks shrink as s says
            masks[name] = shrink_smallest(masks[name], constraints.count(name), 0.5)
            assert constraints.s[kind] <= 0.5, f"{name}: s {constraints.s[kind]} beyond its target"
        assert constraints.y >= before[0] and (constraints.z >= before[1]).all(), "multipliers ascend"
    assert constraints.s.tolist() == pytest.approx([0.5, 0.5])
    assert constraints.final_counts() == {"head": 2, "channel": 5}


def test_one_budget_moves_units_from_where_they_are_needed():
    """Masks of channels are smaller than those of heads, so that more channels and fewer heads go."""
    constraints = minimax(budgets=[["head", "channel"]], rates=(0.1, 0.0, 2.0))
    masks = {"head": torch.ones(3, 4), "channel": torch.linspace(0, 1, 10).expand(3, 10)}
    for _ in range(200):
        constraints.update(masks)
    head, channel = constraints.s.tolist()
    assert head < 0.5 < channel
    assert 0.3 * head + 0.7 * channel == pytest.approx(0.5, abs=0.01)
    counts = constraints.final_counts()
    removed = 300 / 4 * counts["head"] + 700 / 10 * counts["channel"]
    assert 0 <= removed - 500 < 70, f"{counts} remove {removed} parameters of 500, not met or by a channel too much"


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_the_geometry(name):
    model = tiny_model(*MODELS[name])
    dense, units = geometry_of(model), Units.from_geometry(geometry_of(model), tied=True)
    found = maskprune.kind_parameters(model, units)
    smaller = {
        "head": lambda layer: replace(layer, query_heads_per_kv_head=layer.query_heads_per_kv_head[:-1]),
        "channel": lambda layer: replace(layer, intermediate_size=layer.intermediate_size - 1),
        "expert": lambda layer: replace(
            layer, expert_intermediate_sizes=tuple(size - 1 for size in layer.expert_intermediate_sizes)
        ),
    }
    for kind, parameters in found.items():
        without_one: list[LayerGeometry] = [smaller[kind](layer) for layer in dense.layers]
        removed = dense.num_parameters - dense.with_layers(tuple(without_one)).num_parameters
        assert parameters == removed * maskprune.row_width(units, kind), kind


def test_interval_falls_linearly_to_one():
    settings = MaskPruneSettings(steps=91)
    intervals = [maskprune.prox_interval(step, settings) for step in range(91)]
    assert (intervals[0], intervals[40], intervals[45], intervals[-1]) == (10, 6, 6, 1)
    assert intervals == sorted(intervals, reverse=True)


@pytest.mark.parametrize("name", MODELS)
def test_every_row_loses_the_same_and_was_near_zero_before(learned, name):
    model, outcome, log = learned(name)
    units = Units.from_geometry(geometry_of(tiny_model(*MODELS[name])), tied=True)
    assert outcome.values.keys() == units.layers.keys()
    for kind, values in outcome.values.items():
        width = maskprune.row_width(units, kind)
        kept = (values.view(-1, width) > 0).sum(1).double()
        assert kept.var() == 0 and kept[0] == width / 2, f"{kind}: {kept.tolist()} of {width}"
        assert values.max() <= 1 and values.shape == units.shape(kind)
        assert log[0][f"{kind}_cut"] > 0.4 and log[-1][f"{kind}_cut"] < 0.02, f"{kind} was cut hard"


@pytest.mark.parametrize(("name", "site"), [(name, "product") for name in MODELS] + [("llama", "gate_and_up")])
def test_converted_model_is_stock_and_computes_the_same(learned, tmp_path, name, site):
    model, outcome, _ = learned(name, site)
    assert outcome.channel_mask_site == site
    masks = Units.from_geometry(geometry_of(tiny_model(*MODELS[name])), tied=True).to_masks(outcome.values)
    ckpt = write_masked(tmp_path / "ckpt", tiny_model(*MODELS[name]), masks, site, lora_adapter="adapter")
    outcome.save_adapter(ckpt / "adapter")
    convert(make_plan(ckpt), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert "per_layer_config" not in config
    assert config["architectures"] == [
        {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}.get(name, "Qwen3MoeForCausalLM")
    ]
    tokens = torch.arange(50)[None]
    with torch.no_grad(), apply_masks(model, masks, site):
        expected = model(input_ids=tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-4)


def test_adapter_is_what_peft_loads(learned, tmp_path):
    model, outcome, _ = learned("llama")
    outcome.save_adapter(tmp_path)
    again = PeftModel.from_pretrained(tiny_model(*MODELS["llama"]), tmp_path)
    tokens = torch.arange(50)[None]
    with torch.no_grad():
        plain, expected = tiny_model(*MODELS["llama"])(input_ids=tokens).logits, model(input_ids=tokens).logits
        torch.testing.assert_close(again(input_ids=tokens).logits, expected)
    assert not torch.allclose(plain, expected, atol=1e-3), "the adapter does nothing"


def test_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    settings = replace(QUICK, steps=60)

    def run(journal: Journal) -> tuple[Learned, dict[str, torch.Tensor]]:
        model = tiny_model(*MODELS["qwen3"])
        return maskprune.learn(task_for(model, settings, journal=journal)), model.state_dict()

    whole, weights = run(Journal())
    update, calls = Minimax.update, []

    def interrupted(self, masks):
        calls.append(1)
        if len(calls) == 57:  # the state is saved at step 50
            raise KeyboardInterrupt
        update(self, masks)

    monkeypatch.setattr(Minimax, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(Journal(tmp_path))
    assert Journal(tmp_path).restore()["step"] == 50
    resumed, resumed_weights = run(Journal(tmp_path))
    assert len(calls) == 57 + 10
    for kind, values in whole.values.items():
        assert torch.equal(resumed.values[kind], values), kind
    for name, weight in weights.items():
        assert torch.equal(resumed_weights[name], weight), name


def test_without_rank_there_is_no_adapter_and_a_short_run_warns(capsys):
    model = tiny_model(*MODELS["llama"])
    settings = replace(QUICK, steps=2, lora_rank=0)
    outcome = maskprune.learn(task_for(model, settings, 0.3))
    assert outcome.save_adapter is None
    assert not any("lora" in name for name, _ in model.named_parameters())
    printed = capsys.readouterr().out
    assert all(f"the {kind} masks that were set to 0 at the end averaged" in printed for kind in ("head", "channel"))


def test_cut_leaves_the_same_number_where_more_masks_are_zero():
    masks = torch.tensor([[0.0, 0.0, 0.0, 0.7], [0.4, 0.1, 1.0, 0.2]])
    kept = maskprune.cut(masks, 2)
    assert (kept > 0).sum(1).tolist() == [2, 2]
    assert kept[1].tolist() == torch.tensor([0.4, 0.0, 1.0, 0.0]).tolist()
    assert maskprune.cut_share(masks, 2) == pytest.approx(0.3 / 2.4)

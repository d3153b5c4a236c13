"""bench.sweep: what is removed, which cells run side by side, going on after a stop, and what is summed up.

The engines only say when: each takes as long as its bytes and operations do, ragged ones a tenth longer.
"""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from bench.speed import engines as engines_module
from bench.speed import setting as setting_module
from bench.sweep import plan, run
from bench.sweep.__main__ import main as sweep
from bench.sweep.cells import chosen, grid_cells, paper_cells
from bench.sweep.patterns import ragged_layers, uniform_layers
from bench.sweep.shapes import PAPER_SHAPES, grid_shapes
from bench.sweep.summary import printed
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, step_bytes, step_flops

CASES = [Case.parse("decode:8:32:16"), Case.parse("prefill:1:512")]
SHAPES = grid_shapes(None, None) | PAPER_SHAPES
SLOWER = 1.1


@pytest.mark.parametrize("sparsity", [10, 20, 50, 70])
@pytest.mark.parametrize("model", SHAPES)
def test_ragged_keeps_the_share_and_uniform_is_of_its_size(model, sparsity):
    dense = ModelGeometry.from_config(SHAPES[model])
    ragged = ragged_layers(dense, 1 - sparsity / 100, align=32)
    uniform = uniform_layers(dense, ragged, align=32)
    has_experts = dense.experts is not None

    def units(geometry: ModelGeometry) -> tuple[int, int]:
        channels = sum(layer.intermediate_size + sum(layer.expert_intermediate_sizes) for layer in geometry.layers)
        return sum(layer.num_attention_heads for layer in geometry.layers), channels

    heads, channels = (after / before for after, before in zip(units(ragged), units(dense), strict=True))
    assert channels == pytest.approx(1 - sparsity / 100, abs=0.02)
    assert heads == (1 if has_experts else pytest.approx(1 - sparsity / 100, abs=0.02))
    assert len(set(ragged.layers)) > len(dense.layers) / 2 and len(set(uniform.layers)) == 1
    step = 3 * dense.hidden_size * len(dense.layers) * (dense.experts.num_experts if has_experts else 1) * 32
    assert abs(uniform.num_parameters - ragged.num_parameters) <= step / 2
    if has_experts:
        assert all(len(set(layer.expert_intermediate_sizes)) > 8 for layer in ragged.layers)


def test_query_heads_go_one_by_one_and_kv_heads_with_their_last():
    dense = ModelGeometry.from_config(SHAPES["GQA"])
    layers = ragged_layers(dense, 0.3, align=32).layers
    full = dense.dense_layers[0]
    assert any(not layer.has_even_groups for layer in layers)
    assert any(layer.num_key_value_heads < full.num_key_value_heads for layer in layers)
    assert all(1 <= min(layer.query_heads_per_kv_head) <= layer.widest_group <= full.widest_group for layer in layers)


def test_uniform_is_served_by_vllms_own_class_where_it_can_be():
    cells = {cell.name: cell for cell in grid_cells(grid_shapes(None, None), [0, 50], align=32)}
    stock = {name for name, cell in cells.items() if not cell.pruned_config["architectures"][0].startswith("Pruned")}
    assert {name for name in cells if "ragged" in name} & stock == set()
    assert {"mha_uniform_50", "gqa_uniform_50", "moe_uniform_50"} <= stock
    assert len(cells) == 3 * (1 + 2), "nothing removed is one cell, uniform and ragged alike"


def test_cells_are_chosen_by_name():
    cells = grid_cells(grid_shapes(None, None), [0, 20], align=32)
    assert [cell.name for cell in chosen(cells, ["gqa_*_20", "moe_unpruned_0"])] == [
        "gqa_uniform_20",
        "gqa_ragged_20",
        "moe_unpruned_0",
    ]
    with pytest.raises(InputError, match=r"--only mhaa_\*: no such cell; there are mha_unpruned_0, "):
        chosen(cells, ["mha_*", "mhaa_*"])


def test_models_are_written_for_other_benchmarks(tmp_path):
    command = ["--only", "moe_ragged_50", "gqa_uniform_20", "--write-models", "--output-dir", str(tmp_path)]
    assert sweep(["--sparsities", "20", "50", *command]) == 0
    written = (tmp_path / "models").iterdir()
    models = {path.name: ModelGeometry.from_config(json.loads((path / "config.json").read_text())) for path in written}
    assert set(models) == {"moe_dense", "moe_ragged_50", "gqa_dense", "gqa_uniform_20"}
    assert models["moe_dense"].is_dense and models["moe_ragged_50"].num_parameters < models["moe_dense"].num_parameters


def test_groups_fit_into_memory_and_pairs_stay_together():
    cells = grid_cells(grid_shapes(None, None), [0, 20, 50, 70], align=32)
    memory = 12 * plan.GIB
    groups = plan.groups(cells, CASES, memory)
    assert sorted(cell.name for group in groups for cell in group) == sorted(cell.name for cell in cells)
    for group in groups:
        assert plan.group_bytes(group, CASES) <= memory and len({cell.model for cell in group}) == 1
        names = {cell.name for cell in group}
        assert {name.replace("ragged", "uniform") for name in names if "ragged" in name} <= names
    largest = max(plan.group_bytes([cell], CASES) for cell in cells)
    alone = plan.groups(cells, CASES, largest)
    assert len(alone) > len(groups) and any(
        "ragged" in cell.name for group in alone if len(group) == 1 for cell in group
    )
    with pytest.raises(InputError, match="mha_unpruned_0 and the dense model: .* GiB"):
        plan.groups(cells, CASES, largest - 1)


@pytest.mark.parametrize("model", PAPER_SHAPES)
def test_layers_are_cut_only_until_the_engines_fit(model):
    def depth(memory: float) -> int:
        return plan.depth_that_fits(lambda layers: paper_cells(model, layers, 32), full, CASES, memory)

    full = PAPER_SHAPES[model]["num_hidden_layers"]
    assert depth(300 * plan.GIB) == full
    pair = max(plan.group_bytes([cell], CASES) for cell in paper_cells(model, full, 32))
    assert depth(pair) == full > depth(pair - 1) >= plan.SMALLEST_DEPTH
    cut = depth(18 * plan.GIB)
    fits = [max(plan.group_bytes([cell], CASES) for cell in paper_cells(model, layers, 32)) for layers in (cut, full)]
    assert 1 <= cut < full and fits[0] <= 18 * plan.GIB < fits[1]


def test_the_papers_figures_are_those_of_its_tables():
    cells = {cell.name: cell for model in PAPER_SHAPES for cell in paper_cells(model, 2, 32)}
    found = {name: printed(cell) for name, cell in cells.items()}
    throughput = {  # requests per second of Tables 7 and 8, dense first
        "llama-7b": {0: 10.88, 20: 14.75, 50: 23.98},
        "llama-13b": {0: 27.20, 20: 32.14, 50: 38.56},
        "qwen3-30b-a3b": {0: 29.86, 20: 33.25, 40: 37.42, 60: 45.16},
    }
    for name, figure in found.items():
        model, _, sparsity = name.rsplit("_", 2)
        rates = throughput.get(model, {})
        expected = rates[int(sparsity)] / rates[0] if int(sparsity) in rates else None
        assert (figure and figure["speedup"]) == (expected and pytest.approx(expected, abs=0.006)), name
    assert found["qwen3-32b_ragged_20"] is None and "Table 8" in found["qwen3-30b-a3b_ragged_40"]["where"]


@pytest.fixture
def started(monkeypatch) -> list[list[str]]:
    """Engines that take as long as their sizes say. Gets what is started, by group."""
    log: list[list[str]] = []
    dtype = SimpleNamespace(itemsize=2, __str__=lambda self: "torch.bfloat16")

    @contextmanager
    def running(options, start_seconds):
        start_seconds += [0.0] * len(options)
        configs = [json.loads((run.Path(option["model"]) / "config.json").read_text()) for option in options]
        log.append([run.Path(option["model"]).name for option in options])
        engines = []
        for option, config in zip(options, configs, strict=True):
            assert not option["enforce_eager"] and option["load_format"] == "dummy"
            through = option.get("hf_overrides", config)["architectures"][0]
            model_config = SimpleNamespace(dtype=dtype)
            engines.append(SimpleNamespace(config=config, model_config=model_config, through=through))
        yield engines

    def measured(engines, cases, vocab_size, repeats):
        return {case: [[seconds(engine, case)] * repeats for engine in engines] for case in cases}

    def seconds(engine, case) -> float:
        geometry = ModelGeometry.from_config(engine.config)
        slower = SLOWER if len(set(geometry.layers)) > 1 else 1.0
        if case.kind == "decode":
            return step_bytes(geometry, case, 2) * case.num_steps / 1e10 * slower
        return step_flops(geometry, case) / 1e11 * slower

    machine = {"bandwidth_gb_per_s": 10, "gemm_tflop_per_s": 0.1, "threads": 1, "dtype": "bfloat16"}
    monkeypatch.setattr(engines_module, "running_engines", running)
    monkeypatch.setattr(setting_module, "measure", measured)
    monkeypatch.setattr(setting_module, "probe_machine", lambda *_: machine)
    for module in (setting_module, run):
        monkeypatch.setattr(module, "describe_hardware", lambda: {"cpu": "Imaginary 9000"})
        monkeypatch.setattr(module, "describe_versions", lambda: {"vllm": "0.32.0"})
    monkeypatch.setattr(plan, "this_machine", lambda: plan.Machine(20 * plan.GIB, 20, 0.15, (80, 30)))
    return log


SMALL = ["--hidden-size", "256", "--num-hidden-layers", "4", "--sparsities", "0", "50", "--repeats", "3"]
SMALL += ["--cases", "decode:8:32:16", "prefill:1:64"]


def test_a_sweep_is_measured_summed_up_and_reported(started, tmp_path):
    assert sweep([*SMALL, "--output-dir", str(tmp_path)]) == 0
    assert started == [["dense", f"{kind}_unpruned_0", f"{kind}_uniform_50", f"{kind}_ragged_50"] for kind in KINDS]
    results = json.loads((tmp_path / "sweep.json").read_text())
    cells = {cell["name"]: cell for cell in results["cells"]}
    assert len(cells) == 9 and results["command"].startswith("python -m bench.sweep --hidden-size 256")
    for name, cell in cells.items():
        for case in cell["cases"]:
            assert case["of_ideal"] == pytest.approx(1 / SLOWER if "ragged" in name else 1), (name, case["name"])
            assert case["full_depth_ideal_speedup"] is None
            assert ("of_uniform" in case) == ("ragged" in name)
            if "ragged" in name:
                assert case["of_uniform"]["speedup"] == pytest.approx(1 / SLOWER), "their sizes may differ"
    assert (
        all((tmp_path / f"report.{suffix}").exists() for suffix in ("md", "html")) and (tmp_path / "sweep.png").exists()
    )
    markdown = (tmp_path / "report.md").read_text().replace("\\", "")
    removed = 1 - cells["gqa_ragged_50"]["parameters"] / cells["gqa_ragged_50"]["dense_parameters"]
    assert f"| gqa_ragged_50 | decode:8:32:16 | {removed:.1%} |" in markdown and f"| {1 / SLOWER:.2f} (" in markdown


KINDS = ("mha", "gqa", "moe")


def test_nothing_removed_goes_through_the_plugins_class(started, tmp_path, monkeypatch):
    seen = {}
    running = engines_module.running_engines

    @contextmanager
    def watched(options, start_seconds):
        with running(options, start_seconds) as engines:
            seen.update({run.Path(o["model"]).name: e.through for o, e in zip(options, engines, strict=True)})
            yield engines

    monkeypatch.setattr(engines_module, "running_engines", watched)
    assert sweep([*SMALL, "--only", "gqa_*", "--output-dir", str(tmp_path)]) == 0
    assert seen["dense"] == seen["gqa_uniform_50"] == "LlamaForCausalLM"
    assert seen["gqa_unpruned_0"] == seen["gqa_ragged_50"] == "PrunedLlamaForCausalLM"


def test_ragged_is_set_against_uniform_only_where_both_ran_side_by_side(started, tmp_path):
    options = [*SMALL, "--output-dir", str(tmp_path)]
    assert sweep([*options, "--only", "mha_uniform_50"]) == 0
    assert sweep([*options, "--only", "mha_ragged_50"]) == 0
    cells = {cell["name"]: cell for cell in json.loads((tmp_path / "sweep.json").read_text())["cells"]}
    assert set(cells) == {"mha_uniform_50", "mha_ragged_50"}
    assert not any("of_uniform" in case for case in cells["mha_ragged_50"]["cases"])


def test_a_stopped_sweep_goes_on_where_it_was(started, tmp_path, capsys):
    """After the first group; what it measured is kept, and the rest is added."""
    options = [*SMALL, "--output-dir", str(tmp_path)]
    assert sweep([*options, "--only", "mha_*"]) == 0
    first = (tmp_path / "cells" / "mha_ragged_50.json").read_text()
    del started[:]
    assert sweep(options) == 0
    assert [group[1].split("_")[0] for group in started] == ["gqa", "moe"]
    assert (tmp_path / "cells" / "mha_ragged_50.json").read_text() == first
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 9
    del started[:]
    assert sweep([*options, "--only", "moe_*"]) == 0 and started == []
    assert len(json.loads((tmp_path / "sweep.json").read_text())["cells"]) == 9, "what others measured stays"
    assert "done" in capsys.readouterr().out


def test_a_file_of_another_sweep_is_no_result_of_this_one(started, tmp_path, monkeypatch, capsys):
    """Nor one of another machine, or of other libraries: cells of a sweep are set beside each other."""
    options = [*SMALL, "--output-dir", str(tmp_path), "--only", "mha_*"]
    assert sweep(options) == 0
    before = {path: path.read_text() for path in tmp_path.rglob("*.json")}
    del started[:]
    for *other, words in (
        ("--repeats", "4", "repeats"),
        ("--rounds", "2", "rounds"),
        ("--align", "16", "configs"),
        ("--eager", "compile"),
        ("--hidden-size", "512", "configs"),
        ("--cases", "decode:8:32:16", "cases"),
    ):
        assert sweep([*options, *other]) == 2
        assert f"mha_ragged_50.json was measured with other {words}:" in capsys.readouterr().err
    for name, there in (("hardware", {"cpu": "Another"}), ("versions", {"vllm": "0.33.0"})):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(run, f"describe_{name}", lambda there=there: there)
            assert sweep(options) == 2
        assert f"mha_ragged_50.json was measured with other {name}:" in capsys.readouterr().err
    assert started == [] and before == {path: path.read_text() for path in tmp_path.rglob("*.json")}


def test_rounds_start_all_engines_anew_in_the_opposite_order(started, tmp_path):
    options = [*SMALL, "--only", "mha_*_50", "--rounds", "2", "--output-dir", str(tmp_path)]
    assert sweep(options) == 0
    assert started == [["dense", "mha_uniform_50", "mha_ragged_50"], ["mha_ragged_50", "mha_uniform_50", "dense"]]
    (case, _) = json.loads((tmp_path / "cells" / "mha_ragged_50.json").read_text())["cases"]
    assert len(case["pruned"]["samples_s"]) == 6 and case["of_ideal"] == pytest.approx(1 / SLOWER)
    summed_up = {cell["name"]: cell for cell in json.loads((tmp_path / "sweep.json").read_text())["cells"]}
    (case, _) = summed_up["mha_ragged_50"]["cases"]
    assert case["speedup_confidence"] == case["of_uniform"]["speedup_confidence"] == 0.5, "of two rounds"


def test_a_dry_run_starts_and_writes_nothing(started, tmp_path, capsys):
    assert sweep(["--dry-run", "--output-dir", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "mha_ragged_70" in out and "minutes in all" in out and "551M" in out
    assert started == [] and not (tmp_path / "out").exists()


def test_the_papers_models_are_set_beside_its_figures(started, tmp_path):
    options = ["--paper", "--only", "llama-7b*", "qwen3-32b_*_20", "--cases", "decode:8:32:16", "--repeats", "1"]
    assert sweep([*options, "--output-dir", str(tmp_path)]) == 0
    cells = {cell["name"]: cell for cell in json.loads((tmp_path / "sweep.json").read_text())["cells"]}
    cell = cells["llama-7b_ragged_50"]
    assert cell["paper"]["speedup"] == 2.20 and cell["num_hidden_layers"] < 32 == cell["full_num_hidden_layers"]
    case = cell["cases"][0]
    assert 1.8 < case["ideal_speedup"] < case["full_depth_ideal_speedup"] < 2, "lm_head weighs more in fewer layers"
    (case,) = cells["llama-7b_ragged_20"]["cases"]
    assert 1.1 < case["ideal_speedup"] < case["full_depth_ideal_speedup"] < 1.3
    assert cells["llama-7b_ragged_40"]["paper"] is None
    markdown = (tmp_path / "report.md").read_text()
    assert "| 2.20x, RTX 5090, Table 7 |" in markdown and "DDP (arXiv 2603.08065v1)" in markdown
    assert "| Qwen3-32B, 20 % |" in markdown


@pytest.mark.parametrize(
    "options", [["--paper", "--sparsities", "20"], ["--hidden-size", "1000"], ["--paper", "--hidden-size", "512"]]
)
def test_options_that_do_not_fit_are_refused(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        sweep(options)
    assert "--hidden-size" in capsys.readouterr().err

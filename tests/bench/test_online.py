"""The online benchmark: what it refuses, what it makes of runs, the bracket of the ideal; and, slow, all of it once."""

import json
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench import online_speedup
from bench.pico import pico_model
from bench.speed import online, plan
from bench.speed.memory import Share
from bench.speed.online import Contestant, compare, ideal_speedups, mean_context, scenario_record, serve_arguments
from bench.speed.online_tables import scenarios_table, servers_table
from bench.speed.traffic import Scenario
from bench.speed.workload import Request
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, step_bytes, step_flops
from pruned_vllm.formats.layer import LayerGeometry

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "vocab_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
}
DENSE = ModelGeometry.from_config(CONFIG)
PRUNED = DENSE.with_layers((LayerGeometry((1, 1), 64), LayerGeometry((1,), 40)))


@pytest.fixture
def models(tmp_path) -> tuple[Path, Path]:
    """Two directories with a config.json, which is all that dummy weights need."""
    for name, config in (("dense", CONFIG), ("pruned", converted_config(PRUNED, CONFIG))):
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", config)
    return tmp_path / "dense", tmp_path / "pruned"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--dense", "missing", "--pruned", "also-missing"],
            "- --pruned also-missing: also-missing/config.json is missing",
        ),
        (["--request-rates", "0"], "argument --request-rates: '0' is not a number above 0"),
        (["--concurrency", "0"], "argument --concurrency: '0' is not a whole number of at least 1"),
        (["--workload", "poem"], "'poem' is neither chat nor long-context nor INPUT:OUTPUT"),
        (["--goodput", "ttft"], "'ttft' is no target such as ttft:2000"),
        (["--no-saturation"], "--no-saturation leaves nothing to run"),
        (["--max-model-len", "513"], "max_position_embeddings is 512 but 513 tokens of context are needed"),
        (["--workload", "500:13"], "--workload 500:13 needs 513 tokens of context; --max-model-len allows 512"),
        (["--sharegpt", "s.json"], "--sharegpt needs a tokenizer in both directories"),
        (["--prompts", "text"], "--prompts text needs a tokenizer in both directories"),
        (["--memory", "0.0005"], "--memory 0.00 GiB is too small"),
        (["--memory", "5000"], "a server takes 5000.0 GiB for weights and KV cache"),
        (["--", "--dtype", "float16"], "--dtype: give --dtype before the --"),
        (["--", "--max_model_len=5"], "--max-model-len: give --max-model-len before the --"),
        (["--", "--port", "80"], "--port: is chosen here"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(options, message, models, tmp_path, monkeypatch, capsys):
    dense, pruned = models
    monkeypatch.chdir(tmp_path)
    arguments = ["--dense", str(dense), "--pruned", str(pruned), "--load-format", "dummy", *options]
    try:
        code = online_speedup.main(arguments)
    except SystemExit as exit:
        code = exit.code
    assert code == 2 and message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "pruned"]


@pytest.mark.parametrize(
    "stored, options, chosen",
    [
        (("float32", "float32"), ("auto", "auto"), "bfloat16"),
        ((None, None), ("auto", "auto"), "bfloat16"),
        (("float16", "float16"), ("auto", "auto"), "float16"),
        (("float16", "bfloat16"), ("float32", "auto"), "float32"),
        (("float16", "float32"), ("auto", "dummy"), "bfloat16"),
    ],
)
def test_both_servers_get_one_dtype(stored, options, chosen):
    assert plan.choose_dtype([{"dtype": dtype} for dtype in stored], *options) == chosen


def test_models_of_two_dtypes_need_an_option():
    with pytest.raises(InputError, match="--dense is stored in float16, --pruned in bfloat16; choose one with --dtype"):
        plan.choose_dtype([{"dtype": "float16"}, {"torch_dtype": "bfloat16"}], "auto", "auto")


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--gpu-memory-utilization", "0.4"], 0.4),
        (["--max-num-seqs", "8", "--gpu_memory_utilization=0.7"], 0.7),
        (["--max-num-seqs", "8"], None),
    ],
)
def test_what_the_arguments_say_of_the_gpu(words, expected):
    assert plan.utilization(words) == expected


def test_a_server_gets_what_the_user_says_and_its_share_of_the_memory():
    arguments = serve_arguments(
        dtype="bfloat16",
        max_model_len=512,
        load_format="dummy",
        tokenizer=False,
        share=Share(100, 900),
        more=["--max-num-seqs", "8"],
    )
    pairs = ["--dtype bfloat16", "--max-model-len 512", "--load-format dummy", "--kv-cache-memory-bytes 900"]
    assert all(pair in " ".join(arguments) for pair in pairs)
    assert "--skip-tokenizer-init" in arguments and arguments[-2:] == ["--max-num-seqs", "8"]
    plain = serve_arguments(
        dtype="auto", max_model_len=512, load_format="auto", tokenizer=True, share=Share(100, None), more=[]
    )
    assert not {"--load-format", "--skip-tokenizer-init", "--kv-cache-memory-bytes", "--enforce-eager"} & set(plain)


@pytest.mark.parametrize(("dtype", "size"), [("auto", 2), ("float32", 4)])
def test_what_pruning_saves_in_weights_becomes_kv_cache_and_nothing_else(dtype, size, models, tmp_path):
    """Weights and cache are the same number of bytes for either server, by the sizes of either model."""
    dense, pruned = models
    options = {"load_format": "dummy", "num_prompts": 2, "memory": 0.25, "dtype": dtype}
    made = plan.make_plan(plan.Options(dense, pruned, tmp_path / "out", **options))
    shares = {contestant.name: contestant.share for contestant in made.contestants}
    assert {name: share.weights_bytes for name, share in shares.items()} == {
        "dense": size * DENSE.num_parameters,
        "pruned": size * PRUNED.num_parameters,
    }
    assert [sum((share.weights_bytes, share.kv_cache_bytes)) for share in shares.values()] == [2**28] * 2
    for contestant in made.contestants:
        cache = str(shares[contestant.name].kv_cache_bytes)
        assert cache == contestant.serve_arguments[contestant.serve_arguments.index("--kv-cache-memory-bytes") + 1]


def run(requests_per_s: float, ttft: float, batch: float | None = 4.0, goodput: float | None = None) -> dict:
    latencies = {name: ttft for name in online.LESS_IS_BETTER}
    rates = {name: requests_per_s for name in online.MORE_IS_BETTER}
    others = {"duration_s": 12 / requests_per_s, "mean_batch": batch, "preemptions": 0}
    return {**rates, **latencies, **others, "goodput_requests_per_s": goodput}


def test_speedups_are_gains_of_the_pruned_model_whether_more_or_less_is_better():
    """The machine halves its speed in the second repeat: pairs do not notice."""
    runs = {"dense": [run(2, 60), run(1, 120), run(2, 60)], "pruned": [run(3, 30), run(1.5, 60), run(3, 30)]}
    record = scenario_record(Scenario("rate", 2.0), runs, (DENSE, PRUNED), [(10, 20)], element_bytes=2)
    assert (record["name"], record["kind"], record["value"]) == ("rate:2", "rate", 2.0)
    speedups = record["speedups"]
    assert speedups["requests_per_s"]["speedup"] == 1.5 and speedups["ttft_p99_ms"]["speedup"] == 2.0
    assert (speedups["requests_per_s"]["speedup_low"], speedups["requests_per_s"]["speedup_high"]) == (1.5, 1.5)
    assert speedups["goodput_requests_per_s"] is None and record["dense"]["median"]["goodput_requests_per_s"] is None
    assert record["dense"]["median"]["requests_per_s"] == 2 and len(record["pruned"]["runs"]) == 3
    assert record["warnings"] == []
    assert 1 < record["ideal"]["decode_same_batch"] == record["ideal"]["decode"], "the batches are the same"


def test_a_figure_that_is_zero_or_missing_in_one_run_has_no_speedup():
    runs = {"dense": [run(2, 60, goodput=0.0), run(2, 60)], "pruned": [run(3, 30, goodput=1.0), run(3, 30)]}
    record = scenario_record(Scenario("saturation"), runs, (DENSE, PRUNED), [(10, 20)], element_bytes=2)
    assert record["speedups"]["goodput_requests_per_s"] is None
    unknown = {name: [run(2, 60, batch=None)] for name in ("dense", "pruned")}
    record = scenario_record(Scenario("saturation"), unknown, (DENSE, PRUNED), [(10, 20)], 2)
    assert record["ideal"] is None and record["warnings"] == ["1 repeat gives no interval: choose more --repeats"]


def test_the_ideal_of_a_model_against_itself_is_one():
    assert set(ideal_speedups(DENSE, DENSE, [(10, 20), (30, 5)], (4.0, 4.0), 2).values()) == {1.0}


def test_the_ideal_is_the_cost_of_prompts_and_of_tokens():
    lengths, batches = [(10, 20), (30, 60)], (2.0, 5.25)
    ideal = ideal_speedups(DENSE, PRUNED, lengths, batches, 2)
    prompts = [Case("prefill", 1, 10, 1), Case("prefill", 1, 30, 1)]
    costs = [sum(step_flops(geometry, case) for case in prompts) for geometry in (DENSE, PRUNED)]
    assert ideal["prefill"] == costs[0] / costs[1] > 1
    # Of 80 output tokens 20 belong to an answer whose middle is at 10 + 10 tokens, 60 to one at 30 + 30.
    assert mean_context(lengths) == (20 * 20 + 60 * 60) / 80
    dense, same, five, six = (
        step_bytes(geometry, Case("decode", batch, 50, 0), 2)
        for geometry, batch in ((DENSE, 2), (PRUNED, 2), (PRUNED, 5), (PRUNED, 6))
    )
    assert ideal["decode_same_batch"] == pytest.approx(dense / same)
    assert ideal["decode"] == pytest.approx(dense / 2 / ((0.75 * five + 0.25 * six) / 5.25))
    assert ideal["decode"] > ideal["decode_same_batch"], "a larger batch shares the weights"


def test_everything_about_both_servers_and_their_runs_is_recorded(tmp_path, monkeypatch):
    """A comparison on servers that do nothing; the null test: equal runs give a gain of 1.00."""
    log = []

    @contextmanager
    def running_server(model, arguments, log_file, environment):
        assert "VLLM_CPU_KVCACHE_SPACE" not in environment, "it would overrule --kv-cache-memory-bytes"
        log_file.write_text("INFO 11-25 21:41:05 [x.py:1] Loading weights took 1.5 seconds\n")
        Path(environment["VLLM_CACHE_ROOT"]).mkdir(parents=True)
        log.append(f"+{model}")
        yield SimpleNamespace(
            ready_s=20.0, command=f"vllm serve {model}", name=str(model), peak_memory_bytes=lambda: 5 * 2**30
        )
        log.append(f"-{model}")

    def drive(server, requests, scenario, *, log, goodput_ms=None, seed=0):
        calls.append((server.name, len(requests), scenario.name, goodput_ms, seed))
        return run(2, 50, goodput=1.0)

    calls: list = []
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    for name, fake in (
        ("running_server", running_server),
        ("drive", drive),
        ("first_token", lambda server: 21.5),
        ("kv_cache_tokens", lambda server: 1000),
        ("SETTLE_SECONDS", 0),
    ):
        monkeypatch.setattr(online, name, fake)
    contestants = [
        Contestant(name, Path(name), geometry, Share(2**30, None), [], tmp_path / f"{name}.log")
        for name, geometry in (("dense", DENSE), ("pruned", DENSE))
    ]
    results = compare(
        contestants,
        [Request([1], 1, 8)] * 6,
        [Scenario("saturation")],
        repeats=2,
        both_live=True,
        goodput_ms={"ttft": 100.0},
        seed=7,
        client_log=tmp_path / "client.log",
        element_bytes=2,
    )
    assert log == ["+dense", "+pruned", "-pruned", "-dense"]
    warm_ups, timed = calls[:2], calls[2:]
    assert [call[:3] for call in warm_ups] == [(name, 4, "saturation") for name in ("dense", "pruned")]
    order = [("dense", 7), ("pruned", 7), ("pruned", 8), ("dense", 8)]
    assert timed == [(name, 6, "saturation", {"ttft": 100.0}, seed) for name, seed in order]
    server = results["servers"]["pruned"]
    assert server["command"] == "vllm serve pruned" and server["kv_cache_tokens"] == 1000
    assert server["peak_memory_bytes"] == 5 * 2**30 and server["weights_bytes"] == 2**30
    times = {"weights_load_s": 1.5, "compile_s": None, "init_engine_s": None, "ready_s": 20.0, "first_token_s": 21.5}
    assert server["starts"] == [{"cold": True, **times}]
    (scenario,) = results["scenarios"]
    assert scenario["speedups"]["requests_per_s"]["speedup"] == scenario["speedups"]["e2e_p90_ms"]["speedup"] == 1.0
    json.dumps(results)
    assert servers_table(results["servers"]).row_count == 2 and scenarios_table([scenario]).row_count > 10


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dummy weights without a tokenizer", "trained weights under ShareGPT"])
def test_two_real_servers_under_traffic(case, models, tmp_path):
    dense, pruned = models
    options = ["--load-format", "dummy", "--workload", "chat", "--max-model-len", "256", "--memory", "0.2"]
    if "trained" in case:
        dense = pico_model("llama")
        pruned = dense  # the null test
        text = (dense / "heldout.txt").read_text()
        turns = [[{"value": text[i : i + 200]}, {"value": text[i + 200 : i + 260]}] for i in range(0, 9000, 300)]
        (tmp_path / "sharegpt.json").write_text(json.dumps([{"conversations": pair} for pair in turns]))
        options = ["--sharegpt", str(tmp_path / "sharegpt.json"), "--memory", "0.3"]
    options += ["--num-prompts", "6", "--repeats", "1", "--request-rates", "20", "--concurrency", "2"]
    command = [sys.executable, "bench/online_speedup.py", "--dense", str(dense), "--pruned", str(pruned), *options]
    command += ["--goodput", "ttft:100000", "--output-dir", str(tmp_path / "results"), "--", "--enforce-eager"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results" / "online_speedup.json").read_text())
    assert [scenario["name"] for scenario in results["scenarios"]] == ["saturation", "rate:20", "concurrency:2"]
    for scenario in results["scenarios"]:
        for name in ("dense", "pruned"):
            (measured,) = scenario[name]["runs"]
            assert measured["goodput_requests_per_s"] == measured["requests_per_s"] > 0
            assert measured["mean_batch"] >= 1 and measured["tpot_p50_ms"] > 0 and measured["preemptions"] == 0
    servers = results["servers"]
    assert all(server["peak_memory_bytes"] > 2**28 for server in servers.values())
    if "dummy" in case:
        gain = servers["pruned"]["kv_cache_tokens"] / servers["dense"]["kv_cache_tokens"]
        assert gain > DENSE.num_key_value_heads / PRUNED.num_key_value_heads, "the weights left room, too"

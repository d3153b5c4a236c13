"""Whose turn it is, how many servers live at a time, and how one amount of memory is shared out."""

import re
from contextlib import contextmanager

import pytest
from helpers.speed_results import LLAMA_CONFIG

from bench.speed.memory import GIB, PROCESS_BYTES, Share, both_fit, share_memory, weights_bytes
from bench.speed.traffic import Scenario
from bench.speed.turns import Servers, schedule
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.geometry import ModelGeometry

NAMES = ["dense", "pruned"]
SCENARIOS = [Scenario("saturation"), Scenario("rate", 2.0)]


def turns(both_live: bool) -> list[tuple[int, str, str]]:
    return [(repeat, scenario.kind, name) for repeat, scenario, name in schedule(NAMES, SCENARIOS, 3, both_live)]


def test_two_live_servers_take_turns_within_each_scenario_and_turn_round():
    forth = [("saturation", "dense"), ("saturation", "pruned"), ("rate", "dense"), ("rate", "pruned")]
    back = [("saturation", "pruned"), ("saturation", "dense"), ("rate", "pruned"), ("rate", "dense")]
    assert turns(True) == [(i, *turn) for i, order in enumerate((forth, back, forth)) for turn in order]


def test_one_server_at_a_time_starts_as_rarely_as_the_order_allows():
    names = [name for _, _, name in turns(False)]
    assert names == ["dense"] * 2 + ["pruned"] * 4 + ["dense"] * 4 + ["pruned"] * 2
    assert sorted(turns(False)) == sorted(turns(True)), "each runs everything as often"


@pytest.mark.parametrize(
    "both_live, expected",
    [
        (True, ["+dense", "+pruned", "-pruned", "-dense"]),
        (False, ["+dense", "-dense", "+pruned", "-pruned", "+dense", "-dense"]),
    ],
)
def test_servers_start_when_they_are_needed_and_none_is_left(both_live, expected):
    log = []

    @contextmanager
    def start(name: str):
        log.append(f"+{name}")
        try:
            yield name
        finally:
            log.append(f"-{name}")

    with pytest.raises(ZeroDivisionError), Servers(start, both_live) as servers:
        assert [servers.ensure(name) for name in ("dense", "pruned", "pruned", "dense")] == [
            *("dense", "pruned", "pruned", "dense")
        ]
        raise ZeroDivisionError
    assert log == expected


def test_what_the_weights_leave_becomes_kv_cache():
    shares = share_memory(10_000, {"dense": 8000, "pruned": 5000}, {"dense": 2, "pruned": 1}, max_model_len=100)
    assert shares == {"dense": Share(8000, 2000), "pruned": Share(5000, 5000)}


def test_a_memory_without_room_for_one_sequence_is_refused_with_the_least_that_will_do():
    weights, bytes_per_token = {"dense": 3 * GIB, "pruned": GIB}, {"dense": 2**20, "pruned": 2**19}
    with pytest.raises(
        InputError, match=r"--memory 3.00 GiB is too small:\n  - --dense: the weights take 3.00 GiB"
    ) as error:
        share_memory(3 * GIB, weights, bytes_per_token, 1000)
    (least,) = re.findall(r"give at least ([\d.]+)", str(error.value))
    shares = share_memory(round((float(least) + 0.01) * GIB), weights, bytes_per_token, 1000)
    assert shares["dense"].kv_cache_bytes >= 1000 * bytes_per_token["dense"]


@pytest.mark.parametrize("servers, fit", [(2, True), (1.9, False), (1, False)])
def test_two_servers_live_if_the_machine_holds_two(servers, fit):
    assert both_fit(GIB, round(servers * (GIB + PROCESS_BYTES))) is fit


def test_a_machine_that_holds_not_even_one_server_is_too_small():
    with pytest.raises(InputError, match="a server takes 1.0 GiB for weights and KV cache and about 3 GiB beside; the"):
        both_fit(GIB, GIB + PROCESS_BYTES - 1)


def test_quantized_weights_take_what_their_files_take(tmp_path):
    geometry = ModelGeometry.from_config(LLAMA_CONFIG)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1234)
    assert weights_bytes(tmp_path, geometry, LLAMA_CONFIG, 2) == geometry.num_parameters * 2
    assert weights_bytes(tmp_path, geometry, {**LLAMA_CONFIG, "quantization_config": {"bits": 4}}, 2) == 1234

"""Times a model dense, pruned, quantized and both, in turns; compares the last with the product of the gains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from bench.quantized.plan import Settings
from bench.real.plan import DTYPE
from bench.speed import engines
from bench.speed.memory import loaded_bytes
from bench.speed.results import CASE_KEYS
from bench.speed.setting import Setting, time_models
from bench.speed.statistics import median_interval, noise_warnings, quartiles, speedup_statistics
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.ideal import Case, step_bytes

Samples = Mapping[str, Sequence[float]]


def compare(directories: Mapping[str, Path], settings: Settings, *, through_plugin: bool) -> dict:
    """Times all cases; returns {"cases", "machine", "settings", "versions", "hardware"}.

    Args:
        directories: of "dense", "pruned", "quantized" and "both".
        through_plugin: as in `bench.quantized.plan.Pair`.
    """
    geometries = {name: ModelGeometry.from_config(read_config(directory)) for name, directory in directories.items()}
    models = [
        {"model": str(directory)} | (engines.through_plugin(geometries[name]) if through_plugin else {})
        for name, directory in directories.items()
    ]
    setting = Setting(settings.cases, settings.repeats, settings.rounds, dtype=DTYPE, compile=settings.compile)
    samples, dtype, machine = time_models(setting, geometries["dense"], models)
    records = []
    for case in settings.cases:
        moved = {
            name: step_bytes(geometries[name], case, dtype.itemsize, loaded_bytes(directory, dtype.itemsize))
            for name, directory in directories.items()
        }
        by_name = dict(zip(directories, samples[case], strict=True))
        records.append(case_record(case, by_name, moved, settings.rounds))
    return {"cases": records, "machine": machine, **setting.describe(dtype)}


def case_record(case: Case, samples: Samples, moved: Mapping[str, float], rounds: int) -> dict:
    """What quantized.json says of one case.

    Args:
        samples: seconds of each repeat, in turns, of "dense", "pruned", "quantized" and "both".
        moved: bytes of an average step.
    """
    record: dict = {key: getattr(case, key) for key in CASE_KEYS}
    warnings = []
    for name, seconds in samples.items():
        found = {
            "median_latency_s": median(seconds),
            "throughput_tokens_per_s": case.num_timed_tokens / median(seconds),
            "samples_s": list(seconds),
            "bytes_per_step": moved[name],
        }
        if name != "dense":
            statistics = speedup_statistics(samples["dense"], seconds, rounds)
            ideal = moved["dense"] / moved[name]
            found |= {**statistics, "ideal_speedup": ideal, "of_ideal": statistics["speedup"] / ideal}
            pair = {"dense": samples["dense"], name: seconds}
            warnings += [f"{name}: {warning}" for warning in noise_warnings(pair, statistics)]
        record[name] = found
    return {**record, "of_product": of_product(samples, rounds), "warnings": warnings}


def of_product(samples: Samples, rounds: int) -> dict:
    """The speedup of both over the product of the single ones, repeat by repeat: median, quartiles, interval."""
    rows = zip(*(samples[name] for name in ("dense", "pruned", "quantized", "both")), strict=True)
    values = [pruned * quantized / (dense * both) for dense, pruned, quantized, both in rows]
    q1, middle, q3 = quartiles(values)
    low, high = median_interval(values, rounds) or (None, None)
    return {"ratio": middle, "ratio_q1": q1, "ratio_q3": q3, "ratio_low": low, "ratio_high": high}

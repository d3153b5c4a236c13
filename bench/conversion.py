"""Times convert-pruned against `cp -r` of the same checkpoint, on the same disk, with cold caches, side by side.

    python -m bench.conversion --directory /data/conversion                 # 30 GB; the disk needs 60
    python -m bench.conversion --directory /data/conversion --gigabytes 3   # one layer

Writes a checkpoint with the layers of Llama-2-70B, as many as fit into --gigabytes: random numbers in bfloat16, and
masks that leave every layer other heads and FFN channels, with values other than 1, so that weights are multiplied and
rounded. It stays in --directory for the next run. Then `cp -r` and `convert-pruned` take turns. Before each, what is
in memory of files is dropped: by /proc/sys/vm/drop_caches where that is permitted, else file by file, which the
result says.

What the figures mean:
- `cp -r` ends when the last byte is in memory. convert-pruned ends when all bytes are on the disk, to outlast
  a power failure. So cp is timed twice: to its end, and to the end of an fsync of its files.
- cp reads and writes all bytes, convert-pruned reads what is kept and writes that. So speeds are compared by time, and
  by bytes that were read and written per second.
- Anonymous memory is what a process holds beside pages of files: the most of it, sampled fifty times a second, and how
  much that is above a --dry-run, which imports the same and makes the same plan.
- Seconds of CPUs, those of the kernel included, tell what binds: where they come near the seconds that passed times
  the cores, the CPUs do, else the disk.
- The seconds of the --dry-run are those before the first byte is written: imports, headers, masks.
"""

import argparse
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from pruned_vllm.common.arguments import positive_float, positive_int
from pruned_vllm.common.command import run_command
from pruned_vllm.common.directories import atomic_directory
from pruned_vllm.common.environment import cpu_name, library_versions
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import write_json
from pruned_vllm.common.filesystem import sync
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.masked import CHANNEL_MASK, HEAD_MASK, MASKS_FILE, PruningInfo

# config.json of meta-llama/Llama-2-70b-hf without keys that change no shape.
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 80,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}
ELEMENT_BYTES = 2  # bfloat16
SHARD_BYTES = 5_000_000_000
CHUNK_NUMBERS = 1 << 25
SAMPLE_SECONDS = 0.02
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def config_of(gigabytes: float) -> dict[str, Any]:
    """CONFIG with as many layers as come nearest to this size; one at least."""
    geometry = ModelGeometry.from_config(CONFIG)
    outside = geometry.num_parameters - geometry.num_layer_parameters
    layers = round((gigabytes * 1e9 / ELEMENT_BYTES - outside) / geometry.layer_parameters(0))
    return {**CONFIG, "num_hidden_layers": min(max(1, layers), CONFIG["num_hidden_layers"])}


def write_checkpoint(directory: Path, config: Mapping[str, Any], seed: int = 0) -> None:
    """A masked checkpoint with random weights and ragged masks."""
    import numpy as np
    from safetensors.numpy import save_file

    from converter.writer import lay_out, shard_file, write_index

    chance = np.random.default_rng(seed)
    geometry = ModelGeometry.from_config(config)
    shapes = geometry.tensor_shapes()
    shards = lay_out(shapes, dict.fromkeys(shapes, "BF16"), SHARD_BYTES)
    for shard in shards:
        with shard_file(directory, shard) as file:
            for start in range(0, shard.content_bytes // ELEMENT_BYTES, CHUNK_NUMBERS):
                count = min(CHUNK_NUMBERS, shard.content_bytes // ELEMENT_BYTES - start)
                # Without the highest bit of the exponent every number is finite, and below 2.
                numbers = np.frombuffer(chance.bytes(count * ELEMENT_BYTES), np.uint16) & np.uint16(0xBFFF)
                file.write(numbers.data, len(shard.header) + start * ELEMENT_BYTES)
    write_index(directory, shards)
    masks = {}
    for index, layer in enumerate(geometry.layers):
        units = {HEAD_MASK: layer.num_attention_heads, CHANNEL_MASK: layer.intermediate_size}
        for key, count in units.items():
            kept = chance.random(count) < chance.uniform(0.3, 0.9)
            kept[chance.integers(count)] = True  # a sublayer that is gone would be less to do
            masks[key.format(index)] = np.where(kept, chance.uniform(0.2, 8, count), 0).astype(np.float32)
    save_file(masks, directory / MASKS_FILE)
    PruningInfo("synthetic", "product").write(directory)
    write_json(directory / "config.json", config)


def drop_caches(*directories: Path) -> str:
    """Drops what is in memory of files, and says how."""
    os.sync()
    try:
        DROP_CACHES.write_text("3")
        return str(DROP_CACHES)
    except OSError:
        for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        return "posix_fadvise of the files that are read"


def measure(command: list[str]) -> dict[str, Any]:
    """Runs a command: its seconds, those of CPUs among them, and the most memory that it was seen to hold, in bytes.

    Raises:
        InputError: it failed.
    """
    most = {"VmHWM": 0, "RssAnon": 0, "rchar": 0}
    with tempfile.TemporaryFile("w+") as messages:
        used, started = _cpu_seconds(), time.perf_counter()
        process = subprocess.Popen(command, stdout=messages, stderr=messages)
        while process.poll() is None:
            for name, value in _facts(process.pid).items():
                most[name] = max(most[name], value)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        if process.returncode:
            messages.seek(0)
            raise InputError(f"{shlex.join(command)} failed: {messages.read()[-2000:]}")
    return {
        "seconds": seconds,
        "cpu_seconds": _cpu_seconds() - used,
        "resident_bytes": most["VmHWM"],
        "anonymous_bytes": most["RssAnon"],
        "read_bytes": most["rchar"],
    }


def _cpu_seconds() -> float:
    """Of all children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _facts(pid: int) -> dict[str, int]:
    """What Linux says of a process, in bytes; empty once it has ended."""
    try:
        lines = "".join(Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "io")).splitlines()
    except OSError:
        return {}
    words = [line.split() for line in lines]
    facts = {line[0].rstrip(":"): line for line in words if line}
    found = {name: int(facts[name][1]) * 1024 for name in ("VmHWM", "RssAnon") if name in facts}
    return found | {name: int(facts[name][1]) for name in ("rchar",) if name in facts}


def size_of(directory: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def _copy(source: Path, target: Path) -> dict[str, Any]:
    """cp -r, and how long until its files are on the disk."""
    run = measure(["cp", "-r", str(source), str(target)])
    started = time.perf_counter()
    for path in target.rglob("*"):
        sync(path)
    return {**run, "synced_seconds": run["seconds"] + time.perf_counter() - started, "read_bytes": size_of(source)}


def _convert(source: Path, target: Path) -> dict[str, Any]:
    return measure([sys.executable, "-m", "converter.cli", str(source), str(target), "--no-verify"])


CONTESTANTS = {"cp": _copy, "convert-pruned": _convert}


def compare(checkpoint: Path, directory: Path, repeats: int) -> dict[str, Any]:
    """Runs both in turns; what conversion.json holds of them."""
    plan = measure([sys.executable, "-m", "converter.cli", str(checkpoint), str(directory / "out"), "--dry-run"])
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    dropped_by = ""
    for repeat in range(repeats):
        for name in sorted(CONTESTANTS, reverse=bool(repeat % 2)):
            target = directory / f"{name}.out"
            shutil.rmtree(target, ignore_errors=True)
            dropped_by = drop_caches(checkpoint)
            run = CONTESTANTS[name](checkpoint, target)
            runs[name].append({**run, "written_bytes": size_of(target)})
            shutil.rmtree(target)
            print(f"{name}: {run['seconds']:.1f} s", flush=True)
    return {"caches_dropped_by": dropped_by, "dry_run": plan, "runs": runs, "summary": summary(plan, runs)}


def summary(plan: Mapping[str, Any], runs: Mapping[str, list[dict[str, Any]]]) -> dict[str, float]:
    """Medians over the runs, and the ratios to cp: above 1, convert-pruned is the faster one."""

    def typical(name: str, value: str) -> float:
        return median(run[value] for run in runs[name])

    def rate(name: str, seconds: str = "seconds") -> float:
        return median((run["read_bytes"] + run["written_bytes"]) / run[seconds] for run in runs[name])

    anonymous = max(run["anonymous_bytes"] for run in runs["convert-pruned"])
    return {
        "cp_seconds": typical("cp", "seconds"),
        "cp_synced_seconds": typical("cp", "synced_seconds"),
        "convert_seconds": typical("convert-pruned", "seconds"),
        "by_time": typical("cp", "seconds") / typical("convert-pruned", "seconds"),
        "by_time_synced": typical("cp", "synced_seconds") / typical("convert-pruned", "seconds"),
        "by_bytes": rate("convert-pruned") / rate("cp"),
        "by_bytes_synced": rate("convert-pruned") / rate("cp", "synced_seconds"),
        "anonymous_bytes": anonymous,
        "anonymous_bytes_above_dry_run": anonymous - plan["anonymous_bytes"],
        "resident_bytes": max(run["resident_bytes"] for run in runs["convert-pruned"]),
    }


def _print(results: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{results['input_bytes'] / 1e9:.1f} GB; caches dropped by {results['caches_dropped_by']}")
    for header in ("", "s", "s, synced", "CPU s", "GB read", "GB written", "MB anonymous", "MB resident"):
        table.add_column(header, justify="right" if header else "left")
    for name, runs in results["runs"].items():
        for run in runs:
            synced = run.get("synced_seconds", run["seconds"])
            row = [name, *(f"{seconds:.1f}" for seconds in (run["seconds"], synced, run["cpu_seconds"]))]
            row += [f"{run[key] / 1e9:.2f}" for key in ("read_bytes", "written_bytes")]
            table.add_row(*row, *(f"{run[key] / 1e6:.0f}" for key in ("anonymous_bytes", "resident_bytes")))
    found = results["summary"]
    Console(width=120).print(table)
    print(
        f"convert-pruned is {found['by_time']:.2f} times as fast as cp by time ({found['by_time_synced']:.2f} to the "
        f"end of an fsync), {found['by_bytes']:.2f} by bytes ({found['by_bytes_synced']:.2f}); "
        f"{results['dry_run']['seconds']:.1f} s of it pass before the first byte. Anonymous memory: "
        f"{found['anonymous_bytes'] / 1e6:.0f} MB, "
        f"{found['anonymous_bytes_above_dry_run'] / 1e6:.0f} MB above a dry run."
    )


def _run(args: argparse.Namespace) -> None:
    config = config_of(args.gigabytes)
    needed = ModelGeometry.from_config(config).num_parameters * ELEMENT_BYTES
    checkpoint = args.directory / f"ckpt-{config['num_hidden_layers']}-layers"
    args.directory.mkdir(parents=True, exist_ok=True)
    missing = needed if checkpoint.exists() else 2 * needed
    if (free := shutil.disk_usage(args.directory).free) < missing:
        raise InputError(f"{args.directory} needs {missing / 1e9:.0f} GB, but its disk has {free / 1e9:.0f} GB left")
    if not checkpoint.exists():
        with atomic_directory(checkpoint, writer="bench.conversion", overwrite=False) as partial:
            write_checkpoint(partial, config)
    results = {
        "command": shlex.join(["python", "-m", "bench.conversion", *sys.argv[1:]]),
        "settings": {"layers": config["num_hidden_layers"], "repeats": args.repeats},
        "input_bytes": size_of(checkpoint),
        **compare(checkpoint, args.directory, args.repeats),
        "versions": library_versions(("pruned-vllm", "torch", "numpy", "safetensors")),
        "hardware": {
            "cpu": cpu_name(),
            "cpu_cores": len(os.sched_getaffinity(0)),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        },
    }
    _print(results)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "conversion.json", results)
    print(f"written: {args.output_dir / 'conversion.json'}; {checkpoint} stays for the next run")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.conversion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--gigabytes", type=positive_float, default=30, metavar="N", help="size of the checkpoint; default: 30")
    add("--repeats", type=positive_int, default=3, metavar="N", help="runs of each, in turns; default: 3")
    add("--directory", type=Path, required=True, metavar="DIR", help="on the disk that is to be measured; created")
    add("--output-dir", type=Path, default=Path("results"), metavar="DIR", help="created; default: results")
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: _run(args))


if __name__ == "__main__":
    sys.exit(main())

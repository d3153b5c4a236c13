"""What bench.conversion measured: convert-pruned beside `cp -r`."""

from bench.tables.markdown import paragraph, results

CONVERSION = "cpu_conversion/conversion.json"


def sentences() -> str:
    measured = results(CONVERSION)
    summary = measured["summary"]
    written, read = (
        max(run[key] for run in measured["runs"]["convert-pruned"]) / 1e9 for key in ("written_bytes", "read_bytes")
    )
    return paragraph(
        f"A checkpoint of {measured['input_bytes'] / 1e9:.1f} GB, {measured['settings']['layers']} layers of "
        f"Llama-2-70B's shape: `cp -r` takes {summary['cp_seconds']:.1f} s ({summary['cp_synced_seconds']:.1f} s until "
        f"all of it is on the disk), `convert-pruned` {summary['convert_seconds']:.1f} s, for {read:.1f} GB that it "
        f"reads and {written:.1f} GB that it writes to the disk: {summary['by_time']:.2f} times as fast by time, "
        f"{summary['by_bytes']:.2f} by bytes. Cold caches, medians of {measured['settings']['repeats']} runs in turns. "
        f"It holds {summary['anonymous_bytes'] / 1e6:.0f} MB of anonymous memory, "
        f"{summary['anonymous_bytes_above_dry_run'] / 1e6:.0f} MB more than a dry run does."
    )

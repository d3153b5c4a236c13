"""The blocks of measured figures in the documents: which there are, and how they get into the text."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.tables import (
    breakdown,
    compare,
    conversion,
    experts,
    layouts,
    learning,
    methods,
    models,
    online,
    quantized,
    real,
    sweep,
)
from pruned_vllm.common.errors import InputError

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "bench" / "README.md")
BLOCK = re.compile(r"<!-- measured: (?P<name>[\w-]+) -->\n(?P<body>.*?)<!-- end -->\n", re.DOTALL)

# name in the markers -> what makes the block
BLOCKS: dict[str, Callable[[], str]] = {
    "headline": sweep.headline,
    "sweep": sweep.table,
    "sweep-notes": sweep.notes,
    "online": online.traffic,
    "online-servers": online.servers,
    "online-notes": online.notes,
    "null-test": online.null_test,
    "breakdown": breakdown.table,
    "breakdown-notes": breakdown.notes,
    "real-headline": real.headline,
    "real": real.table,
    "real-notes": real.notes,
    "real-speed": real.speed,
    "real-chat": real.chat,
    "real-gemma3": partial(real.table, "real_gemma3"),
    "real-gemma3-notes": partial(real.notes, "real_gemma3"),
    "real-gemma3-speed": partial(real.speed, "real_gemma3"),
    "real-gemma3-chat": partial(real.chat, "real_gemma3"),
    "compare-methods": partial(compare.methods, "compare/avx2/compare.json"),
    "compare-recovery": partial(compare.recovery, "compare/avx2/compare.json"),
    "compare-recovery-2e4": partial(compare.recovery, "compare/compare.json"),
    "compare-recovery-h200": partial(compare.recovery, "compare/h200/compare.json"),
    "compare-recovery-long": partial(compare.recovery, "compare/h200_then_avx2/compare.json"),
    "compare-answers": partial(compare.answers, "compare/avx2/compare.json"),
    "compare-answers-h200": partial(compare.answers, "compare/h200/compare.json"),
    "compare-answers-long": partial(compare.answers, "compare/h200_then_avx2/compare.json"),
    "targets": learning.targets,
    "targets-avx2": partial(learning.targets, "targets/avx2/targets.json"),
    "targets-deep": partial(learning.targets, "targets/avx2/deep/targets.json"),
    "targets-moe": breakdown.of_target,
    "budgets": learning.budgets,
    "budgets-joint": learning.joint,
    "learning-speed": partial(learning.speed, "learning_speed/learning_speed.json"),
    "learning-speed-h200": partial(
        learning.speed, "learning_speed/h200/llama-8b.json", "learning_speed/h200/qwen3-moe-10b.json"
    ),
    "learning-memory": learning.memory,
    "demo-perplexity": models.demo_perplexity,
    "conversion": conversion.sentences,
    "layouts": layouts.table,
    "layouts-notes": layouts.notes,
    "experts": experts.drawn_widths,
    "experts-notes": experts.notes,
    "experts-learned": experts.learned_widths,
    "experts-need": experts.perplexity,
    "experts-quantized": experts.quantized,
    "quantized": quantized.table,
    "quantized-notes": quantized.notes,
    "quantized-fp8": quantized.fp8_table,
    "quantized-fp8-notes": quantized.fp8_notes,
    "methods": methods.table,
    "methods-notes": methods.table_notes,
    "ablation-ddp": methods.ddp_parts,
    "ablation-budget": methods.budgets,
    "ablation-tyr": methods.tyr_parts,
    "ablation-notes": methods.ablation_notes,
}


def with_blocks(text: str) -> str:
    """`text` with every block made anew. Raises InputError for a name that BLOCKS lacks."""

    def block(match: re.Match[str]) -> str:
        if match["name"] not in BLOCKS:
            raise InputError(f"no block is called {match['name']!r}; there are {', '.join(BLOCKS)}")
        return f"<!-- measured: {match['name']} -->\n{BLOCKS[match['name']]()}\n<!-- end -->\n"

    return BLOCK.sub(block, text)


def stale_blocks(text: str) -> list[str]:
    """Names of the blocks in `text` that `with_blocks` would change."""
    return [match["name"] for match in BLOCK.finditer(text) if with_blocks(match[0]) != match[0]]

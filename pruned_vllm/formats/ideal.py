"""What a pruned model could gain at best in a case, a workload that may be timed. Pure Python.

The ideal speedup of a case is the dense model's cost over the pruned model's: the bytes that a step of decode moves,
the operations of a prefill. What counts is in pruned_vllm/formats/cost.py.

    case = Case.parse("decode:8:32:64")
    ideal_speedup(dense_geometry, pruned_geometry, case, element_bytes=2)
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pruned_vllm.formats.cost import moved_bytes, sequence_flops
from pruned_vllm.formats.geometry import ModelGeometry


@dataclass(frozen=True)
class Case:
    """One workload.

    Attributes:
        kind: "decode" (from the first output token to the last) or "prefill" (the prompt, up to its one token).
        batch_size: sequences that run together.
        input_len, output_len: tokens per sequence.
    """

    kind: str
    batch_size: int
    input_len: int
    output_len: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Reads "decode:BATCH:INPUT:OUTPUT" or "prefill:BATCH:INPUT". Raises ValueError with what is wrong."""
        kind, *numbers = text.split(":")
        if len(numbers) != {"decode": 3, "prefill": 2}.get(kind) or not all(map(str.isdecimal, numbers)):
            raise ValueError(f"{text!r} is neither decode:BATCH:INPUT:OUTPUT nor prefill:BATCH:INPUT")
        batch_size, input_len, output_len = map(int, numbers if kind == "decode" else [*numbers, "1"])
        case = cls(kind, batch_size, input_len, output_len)
        if min(case.batch_size, case.input_len) < 1:
            raise ValueError(f"{text!r}: BATCH and INPUT must be at least 1")
        if kind == "decode" and case.output_len < 2:
            raise ValueError(f"{text!r}: OUTPUT must be at least 2, the first token belongs to the prefill")
        return case

    @property
    def name(self) -> str:
        sizes = f"{self.kind}:{self.batch_size}:{self.input_len}"
        return f"{sizes}:{self.output_len}" if self.kind == "decode" else sizes

    @property
    def num_steps(self) -> int:
        """Steps of the timed part."""
        return self.output_len - 1 if self.kind == "decode" else 1

    @property
    def mean_context(self) -> float:
        """Tokens that the average decode step attends to: step k of them to the input and k generated tokens."""
        return self.input_len + self.output_len / 2

    @property
    def num_timed_tokens(self) -> int:
        """Tokens of the batch in the timed part: generated ones in decode, those of the prompts in prefill."""
        return self.batch_size * (self.num_steps if self.kind == "decode" else self.input_len)


def ideal_speedup(dense: ModelGeometry, pruned: ModelGeometry, case: Case, element_bytes: int) -> float:
    """Cost of the dense model over that of the pruned one; `element_bytes` is 2 for bfloat16."""
    return ideal_cost(dense, case, element_bytes) / ideal_cost(pruned, case, element_bytes)


def ideal_cost(geometry: ModelGeometry, case: Case, element_bytes: int) -> float:
    """What bounds a step of this case: bytes in decode, operations in prefill."""
    if case.kind == "decode":
        return step_bytes(geometry, case, element_bytes)
    return step_flops(geometry, case)


def step_bytes(
    geometry: ModelGeometry, case: Case, element_bytes: int, tensor_bytes: Mapping[str, int] | None = None
) -> float:
    """Bytes that the average step of the timed part moves; of the KV cache in decode what a step reads of every
    sequence, in prefill what it writes.

    Args:
        tensor_bytes: of a quantized model, as in `moved_bytes`.
    """
    decode = case.kind == "decode"
    tokens = case.batch_size * (1 if decode else case.input_len)
    kv_tokens = case.batch_size * (case.mean_context if decode else case.input_len)
    moved_states = case.batch_size * (2 if decode else 1)  # a decode step reads and writes them
    return moved_bytes(geometry, tokens, kv_tokens, element_bytes, tensor_bytes, moved_states)


def step_flops(geometry: ModelGeometry, case: Case) -> float:
    """Floating-point operations of the average step of the timed part."""
    if case.kind == "decode":
        return case.batch_size * sequence_flops(geometry, 1, case.mean_context)
    pairs = case.input_len * (case.input_len + 1) // 2
    return case.batch_size * sequence_flops(geometry, case.input_len, pairs)

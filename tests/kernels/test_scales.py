"""What the kernels for experts of different widths accept as scales of quantized weights."""

from dataclasses import replace

import pytest
import torch
from helpers.quantized_moe import KINDS, Kind, quantized_inputs
from helpers.ragged_moe import Case

from pruned_vllm.kernels.ragged_moe_arguments import check_arguments, run_offsets

INT8, FP8, INT4 = torch.int8, torch.float8_e4m3fn, torch.uint8
CASE = Case(3, 24, (2, 4), 2)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_fits_is_accepted(kind):
    inputs, scales, _ = quantized_inputs(CASE, torch.bfloat16, kind, 0, "cpu")
    check_arguments(*inputs, scales)
    with pytest.raises(ValueError, match="gate_up is .*, x torch.bfloat16"):
        check_arguments(*inputs)


@pytest.mark.parametrize(
    ("codes", "group_size", "changes", "expected"),
    [
        (INT8, None, {"group_size": 5}, ["group_size is 5, which does not divide hidden = 24"]),
        (INT8, None, {"group_size": 0}, ["group_size is 0, which does not divide hidden = 24"]),
        (INT8, None, {"group_size": -8}, ["group_size is -8, which does not divide hidden = 24"]),
        (INT4, 8, {"group_size": 3}, ["group_size is 3; with 4 bits a column it must be even"]),
        (INT8, 8, {"group_size": 12}, ["scales.gate_up is torch.float32 [2, 6, 3], not torch.float32 [2, 6, 2]"]),
        (
            INT8,
            None,
            {"gate_up": torch.ones(2, 6), "down": torch.ones(2, 23)},
            [
                "scales.gate_up is torch.float32 [2, 6], not torch.float32 [2, 6, 1]",
                "scales.down is torch.float32 [2, 23], not torch.float32 [2, 24]",
            ],
        ),
        (
            FP8,
            None,
            {"gate_up": torch.ones(2, 6, 1).bfloat16(), "down": torch.ones(2, 24).double()},
            [
                "scales.gate_up is torch.bfloat16 [2, 6, 1], not torch.float32 [2, 6, 1]",
                "scales.down is torch.float64 [2, 24], not torch.float32 [2, 24]",
            ],
        ),
        (
            INT8,
            None,
            {"down_offsets": torch.tensor([0, 1, 2])},
            ["scales.down_offsets is torch.int64 [3], not torch.int32 [3]"],
        ),
        (INT8, None, {"down": torch.ones(24, 2).T}, ["scales.down is not contiguous"]),
    ],
)
def test_scales_that_do_not_fit_are_all_listed(codes, group_size, changes, expected):
    inputs, scales, _ = quantized_inputs(CASE, torch.bfloat16, Kind(codes, group_size), 0, "cpu")
    with pytest.raises(ValueError) as refusal:
        check_arguments(*inputs, replace(scales, **changes))
    message = str(refusal.value)
    assert [part for part in expected if part not in message] == []
    assert message.count("\n  - ") == len(expected), message


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            lambda i: {"down": i.down.to(torch.int16)},
            "gate_up is torch.int8 and down torch.int16; with scales both must",
        ),
        (lambda i: {"gate_up": i.gate_up.float(), "down": i.down.float()}, "down torch.float32; with scales both must"),
        (lambda i: {"gate_up": i.gate_up.view(INT4), "down": i.down.view(INT4)}, r"must be \[2, rows, hidden / 2\]"),
        (lambda i: {"gate_up": i.gate_up[:, :, :12], "down": i.down[:, :12]}, r"must be \[2, rows, hidden\]"),
    ],
)
def test_codes_that_do_not_fit(change, problem):
    inputs, scales, _ = quantized_inputs(CASE, torch.bfloat16, Kind(INT8, None), 0, "cpu")
    with pytest.raises(ValueError, match=problem):
        check_arguments(*inputs._replace(**change(inputs)), scales)


def test_with_4_bits_hidden_must_be_even():
    inputs, scales, _ = quantized_inputs(CASE, torch.bfloat16, Kind(INT4, None), 0, "cpu")
    odd = inputs._replace(x=inputs.x[:, :23])
    with pytest.raises(ValueError, match="hidden is 23; with 4 bits a column it must be even"):
        check_arguments(*odd, scales)


@pytest.mark.parametrize(
    ("group_size", "expected"),
    [(None, [0, 1, 1, 2, 3]), (1, [0, 3, 3, 4, 8]), (2, [0, 2, 2, 3, 5]), (9, [0, 1, 1, 2, 3])],
)
def test_run_offsets(group_size, expected):
    assert run_offsets([0, 3, 3, 4, 8], group_size) == expected

"""The norm between sublayers: one op of vLLM's CPU build where that can compute it, else the stock one."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform

from pruned_vllm.serving.norms import ROUNDS_BFLOAT16, AddAndNorm

HIDDEN_SIZE = 96
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def kernels():
    current_platform.import_kernels()
    if not hasattr(torch.ops._C, "fused_add_rms_norm"):
        pytest.skip("this build of vLLM has no op for it")


def make_norm(dtype: torch.dtype, hidden_size: int = HIDDEN_SIZE, **options) -> AddAndNorm:
    with set_current_vllm_config(VllmConfig()):
        norm = AddAndNorm(hidden_size, eps=1e-5, dtype=dtype, **options)
    norm.weight.data.uniform_(0.5, 1.5)
    return norm.requires_grad_(False)


def make_inputs(dtype: torch.dtype, tokens: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(tokens, HIDDEN_SIZE).to(dtype), 3 * torch.randn(tokens, HIDDEN_SIZE).to(dtype)


def errors(outputs: tuple[torch.Tensor, torch.Tensor], norm: AddAndNorm, inputs: tuple[torch.Tensor, torch.Tensor]):
    """Mean errors of the normed sum and of the sum, against float64."""
    total = inputs[0].double() + inputs[1].double()
    scale = (total.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    expected = (total * scale * norm.weight.double(), total)
    return [(output.double() - value).abs().mean().item() for output, value in zip(outputs, expected, strict=True)]


@pytest.mark.parametrize("tokens", (0, 1, 64))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounds_no_worse_than_the_stock_norm(dtype, tokens):
    norm, inputs = make_norm(dtype), make_inputs(dtype, tokens)
    stock = norm.forward_native(*(value.clone() for value in inputs))
    mine = tuple(value.clone() for value in inputs)
    outputs = norm(*mine)
    in_place = outputs[0] is mine[0] and outputs[1] is mine[1]
    assert in_place == (dtype is not torch.bfloat16 or ROUNDS_BFLOAT16), "as the op works, and the stock norm does not"
    assert outputs[0].shape == outputs[1].shape == (tokens, HIDDEN_SIZE)
    if tokens:
        for error, stock_error in zip(errors(outputs, norm, inputs), errors(stock, norm, inputs), strict=True):
            assert error <= 1.25 * stock_error + 1e-7


def strided(value: torch.Tensor) -> torch.Tensor:
    return torch.stack([value, torch.full_like(value, torch.nan)], 1)[:, 0]


@pytest.mark.parametrize(
    ("options", "change"),
    [
        pytest.param({}, lambda x, residual: (strided(x), residual), id="strided input"),
        pytest.param({}, lambda x, residual: (x, strided(residual)), id="strided residual"),
        pytest.param({}, lambda x, residual: (x.double(), residual), id="two dtypes"),
        pytest.param({"var_hidden_size": 32}, lambda x, residual: (x, residual), id="variance of a part"),
        pytest.param({"has_weight": False}, lambda x, residual: (x, residual), id="no weight"),
        *(
            pytest.param(
                {"hidden_size": size},
                lambda x, residual, size=size: (x[:, :size].contiguous(), residual[:, :size].contiguous()),
                id=f"{size} columns",
            )
            for size in (1, 7, 12, 95)
        ),
    ],
)
def test_what_the_op_cannot_compute_is_left_to_the_stock_norm(options, change):
    norm = make_norm(torch.float32, **options)
    inputs = change(*make_inputs(torch.float32))
    expected = norm.forward_native(*(value.clone() for value in inputs))
    outputs = norm(*inputs)
    assert all(torch.equal(output, value) for output, value in zip(outputs, expected, strict=True))

"""Norms of a decoder layer: one op where nothing is compiled and vLLM's CPU build has it; nothing for no sublayer."""

import torch
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

# Without AVX-512 the op cuts bfloat16 off: twice the stock norm's error.
ROUNDS_BFLOAT16 = torch.cpu._is_avx512_supported()


class AddAndNorm(RMSNorm):
    """The stock norm, which adds and norms in one op of vLLM's CPU build where that can compute it.

    vLLM itself lists that op for GPUs only (`vllm/kernels/vllm_c.py`), so that --ir-op-priority cannot choose it, and
    runs some ten ops of PyTorch instead: 30 microseconds for one token, not 4. For eager mode: Inductor, which fuses
    the ten, makes them faster than the op.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        """norm(x), or with a residual (norm(x + residual), x + residual); may overwrite both, as the stock norm may."""
        if residual is not None and self._has_one_op(x, residual):
            torch.ops._C.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
            return x, residual
        return super().forward(x, residual)

    def _has_one_op(self, x: torch.Tensor, residual: torch.Tensor) -> bool:
        """The op refuses rows that are not whole vectors of 8 (`csrc/cpu/layernorm.cpp`)."""
        return (
            x.is_cpu
            and x.shape[-1] % 8 == 0
            and self.has_weight
            and self.variance_size_override is None
            and x.dtype == residual.dtype == self.weight.dtype
            and (x.dtype is not torch.bfloat16 or ROUNDS_BFLOAT16)
            and x.is_contiguous()
            and residual.is_contiguous()
            and hasattr(torch.ops._C, "fused_add_rms_norm")
        )


class RemovedNorm(nn.Module):
    """In place of the norm before a sublayer that is gone: the sublayer gets zeros, and hands them on.

    Whatever a stock layer does to the output of a sublayer, be it to scale or to norm it, zeros stay zeros.
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None):
        zeros = torch.zeros_like(x)
        return zeros if residual is None else (zeros, x + residual)

"""What a channel makes of its gate and its up, in Triton; see `Activation` in ragged_moe_arguments.py."""

import triton
import triton.language as tl


@triton.jit
def activated(gate, up, NAME: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """0 where gate and up are 0. What is no number stays none."""
    if NAME == "silu":
        product = gate / (1.0 + tl.exp(-gate)) * up
    elif NAME == "gelu":
        product = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif NAME == "gelu_tanh":  # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2z))
        doubled = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        product = gate / (1.0 + tl.exp(-doubled)) * up
    else:
        tl.static_assert(NAME == "swigluoai")
        gate = tl.minimum(gate, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        product = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
    return product

"""The fault of vLLM's rotary embedding on CPUs that the plugin's layers with a latent vector avoid."""

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers import rotary_embedding
from vllm.platforms import current_platform

from pruned_vllm.serving.latent import _rotate_natively

POSITIONS = torch.arange(3, 10)


@pytest.fixture
def rotary(monkeypatch):
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    with set_current_vllm_config(VllmConfig()):
        parameters = {"rope_type": "default", "rope_theta": 1e4}
        yield rotary_embedding.get_rope(64, 128, rope_parameters=parameters, is_neox_style=False, dtype=torch.float32)


def query_and_key() -> tuple[torch.Tensor, torch.Tensor]:
    """What attention with a latent vector hands over: the part of q that turns, and one k for all heads."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(len(POSITIONS), 5, 96, generator=generator)
    return q[..., 32:], torch.randn(len(POSITIONS), 1, 64, generator=generator)


def test_heads_are_turned_as_in_two_dimensions(rotary):
    q, k = query_and_key()
    expected = rotary.forward_native(POSITIONS, q.flatten(1), k.flatten(1))
    _rotate_natively(rotary)
    found = rotary(POSITIONS, *query_and_key())
    for turned, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(turned.flatten(1), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the fault is in vLLM's CPU build")
def test_vllm_has_the_fault_still(rotary):
    """Once this fails, `_rotate_natively` can go for the versions of vLLM that have the fix."""
    expected = rotary.forward_native(POSITIONS, *query_and_key())
    found = rotary.forward_cpu(POSITIONS, *query_and_key())
    assert max(float((turned - wanted).abs().max()) for turned, wanted in zip(found, expected, strict=True)) > 0.1

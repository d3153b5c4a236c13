"""What saves memory while learning changes the result by rounding alone: bfloat16 weights, recomputed activations."""

import pytest
import torch
from helpers.learning import task_of
from helpers.tiny import tiny_model

from learner.methods import ddp
from learner.settings import DDPSettings


def first_gradients(model, monkeypatch, batch_size: int = 4, **settings) -> dict[str, torch.Tensor]:
    """Gradients of z in DDP's first step, all kinds in one row each."""
    found, make_optimizer = {}, ddp._optimizer

    def watched(z, multipliers, settings):
        optimizer = make_optimizer(z, multipliers, settings)
        optimizer.register_step_pre_hook(
            lambda *_: found.update({kind: values.grad.flatten() for kind, values in z.items()})
        )
        return optimizer

    with monkeypatch.context() as patch:
        patch.setattr(ddp, "_optimizer", watched)
        ddp.learn(task_of(model, DDPSettings(steps=1, batch_size=batch_size, sequence_length=32, **settings)))
    return found


def count_forward_passes(model) -> list:
    passes = []  # counted on entry: a recomputation stops as soon as it has what it needs
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    return passes


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_recomputed_activations_give_the_same_gradients(model_type, monkeypatch):
    """The masks must be there when activations are computed again, in the backward pass."""
    plain = first_gradients(tiny_model(model_type, 6, 3, 40), monkeypatch)
    model = tiny_model(model_type, 6, 3, 40)
    passes = count_forward_passes(model)
    recomputed = first_gradients(model, monkeypatch, gradient_checkpointing=True)
    assert len(passes) == 3, "teacher, student, and the student again"
    for kind, expected in plain.items():
        torch.testing.assert_close(recomputed[kind], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_bfloat16_weights_give_nearly_the_same_gradients(model_type, monkeypatch):
    exact = first_gradients(tiny_model(model_type, 6, 3, 40), monkeypatch)
    coarse = first_gradients(tiny_model(model_type, 6, 3, 40).bfloat16(), monkeypatch, gradient_checkpointing=True)
    for kind, expected in exact.items():
        assert coarse[kind].dtype == torch.float32, "masks and their gradients are float32"
        similarity = torch.cosine_similarity(coarse[kind], expected, dim=0).item()
        assert similarity > 0.98, f"{kind}: {similarity}"


@pytest.mark.slow
def test_bfloat16_weights_give_nearly_the_same_masks():
    settings = DDPSettings(steps=150, batch_size=4, sequence_length=32)
    exact = ddp.learn(task_of(tiny_model("llama", 6, 6, 40), settings)).values
    coarse = ddp.learn(task_of(tiny_model("llama", 6, 6, 40).bfloat16(), settings)).values
    for kind, expected in exact.items():
        assert coarse[kind].dtype == torch.float32
        agreement = ((coarse[kind] > 0) == (expected > 0)).float().mean().item()
        assert agreement > 0.9, f"{kind}: {agreement} of the units are kept or removed by both"


def test_float16_resolves_the_gradients_of_a_large_batch(monkeypatch):
    """Of the mean over 32 * 1024 tokens, as in a batch of DDP's defaults."""
    exact, coarse = (
        first_gradients(tiny_model("llama", 6, 6, 40).to(dtype), monkeypatch, batch_size=1024, micro_batch_size=128)
        for dtype in (torch.float32, torch.float16)
    )
    for kind, expected in exact.items():
        similarity = torch.cosine_similarity(coarse[kind], expected, dim=0).item()
        assert similarity > 0.9995, f"{kind}: {similarity}"
        assert coarse[kind].norm().item() == pytest.approx(expected.norm().item(), rel=0.01)

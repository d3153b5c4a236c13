"""DDP's gradients against central differences, in float64, of its objective as the paper prints it.

The objective is written out here once more: L_ce + eta KL(teacher || student) (17) + the penalties (13), (15) and (19).
Where 0 < z < 2 mu, neither ReLU nor clamp cuts anything off, and the gradient is that of the objective. Elsewhere both
pass gradients straight through: the loss is differentiated by the mask, the penalty by the score, each where it
stands, and the score as if it were not clamped.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from helpers.learning import unit_budget
from helpers.tiny import tiny_model

from learner.data.reading import BlockSampler
from learner.methods import ddp
from learner.methods.method import Task
from learner.model.masking import apply_masks
from learner.model.units import Units
from learner.run.journal import Journal
from learner.settings import DDPSettings
from pruned_vllm.formats.geometry import ModelGeometry

MU = 0.5  # at the first step
SETTINGS = {"steps": 1, "batch_size": 3, "micro_batch_size": 2, "kd_temperature": 2.0, "settle": 0}
TARGET = {"head": 0.7, "channel": 0.2, "expert": 0.2}  # of heads too many are left, of the others too few


def make_task(model_type: str, budget: str) -> Task:
    config = {"qwen3_moe": {"moe_intermediate_size": 5, "mlp_only_layers": [1]}}.get(model_type, {})
    model = tiny_model(model_type, 4, 2, 6, hidden_size=48, num_hidden_layers=2, **config).double()
    model.set_experts_implementation("eager")  # the default has no float64
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)
    geometry = ModelGeometry.from_config(model.config.to_dict() | {"architectures": [type(model).__name__]})
    units = Units.from_geometry(geometry)
    tokens = torch.randint(256, (3 * 8,), generator=torch.Generator().manual_seed(2))
    return Task(
        model=model,
        units=units,
        budgets=(unit_budget(units, {kind: TARGET[kind] for kind in units.layers}),),
        settings=DDPSettings(**SETTINGS, sequence_length=8, budget=budget),
        seed=0,
        blocks=BlockSampler(tokens, 8, seed=0),
        journal=Journal(),
        accelerator=Accelerator(cpu=True),
    )


def _rms_norm(norm: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Without the way through float32 that Transformers takes, whose rounding would drown the differences."""
    return torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@pytest.fixture(autouse=True)
def routers_in_float64(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: x.softmax(dim))


class FirstStep:
    """Gradients of the first step from given parameters, and the multipliers after it."""

    def __init__(self, task: Task, z: dict, multipliers: dict, monkeypatch) -> None:
        make_optimizer = ddp._optimizer

        def from_given(own_z, own_multipliers, settings):
            for kind in z:
                own_z[kind].data.copy_(z[kind])
                for parameter, given in zip(own_multipliers[kind], multipliers[kind], strict=True):
                    parameter.data.copy_(given)
            optimizer = make_optimizer(own_z, own_multipliers, settings)
            optimizer.register_step_pre_hook(lambda *_: self._keep(own_z, own_multipliers))
            self._multipliers = own_multipliers
            return optimizer

        monkeypatch.setattr(ddp, "_optimizer", from_given)
        ddp.learn(task)
        self.multipliers_after = {
            kind: torch.stack([parameter.detach() for parameter in of_kind])
            for kind, of_kind in self._multipliers.items()
        }

    def _keep(self, z: dict, multipliers: dict) -> None:
        self.z_gradients = {kind: values.grad.clone() for kind, values in z.items()}
        self.multiplier_gradients = {
            kind: torch.stack([parameter.grad.clone() for parameter in of_kind])
            for kind, of_kind in multipliers.items()
        }


def task_loss(task: Task, m: dict[str, torch.Tensor]) -> float:
    """L_ce + eta KL, means over tokens; the temperature's square keeps the gradient's size."""
    tokens, temperature = task.blocks.blocks, task.settings.kd_temperature
    with torch.no_grad():
        teacher = task.model(tokens).logits
        with apply_masks(task.model, task.units.to_masks(m)):
            student = task.model(tokens).logits
    cross_entropy = -student[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean()
    p, q = (logits.div(temperature).log_softmax(-1) for logits in (teacher, student))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    return (cross_entropy + task.settings.kd_weight * temperature**2 * divergence).item()


def score(m: torch.Tensor) -> torch.Tensor:
    """Equation (12) before the clamp."""
    return 1.2 / (1 + torch.exp(-math.log(11) * (m - MU) / MU)) - 0.1


def kept_shares(task: Task, kind: str) -> float:
    groups = task.units.num_groups(kind, task.settings.budget)
    return task.units.kept(kind, TARGET[kind], task.settings.budget) * groups / task.units.count(kind)


def penalty(task: Task, s: dict[str, torch.Tensor], multipliers: dict) -> float:
    """Equations (13), (15) and (19), summed over kinds."""
    total = 0.0
    for kind, values in s.items():
        groups = values.reshape(task.units.num_groups(kind, task.settings.budget), -1)
        for index, group in enumerate(groups):
            violation = group.mean() - kept_shares(task, kind)
            lambda1, lambda2, lambda3 = (multiplier[index] for multiplier in multipliers[kind])
            of_group = lambda1 * violation + lambda2 * violation**2 + lambda3 * (group * (1 - group)).mean()
            total += of_group.item() / len(groups)
    return total


def differences(function: Callable[[dict], float], at: dict[str, torch.Tensor], step: float = 1e-5) -> dict:
    """Central differences of a function of tensors by kind, one entry at a time."""
    found = {kind: torch.zeros_like(values) for kind, values in at.items()}
    for kind, values in at.items():
        for index in range(values.numel()):
            ends = []
            for sign in (1, -1):
                moved = values.clone()
                moved.view(-1)[index] += sign * step
                ends.append(function(at | {kind: moved}))
            found[kind].view(-1)[index] = (ends[0] - ends[1]) / (2 * step)
    return found


def draw(task: Task, low: float, high: float) -> tuple[dict, dict]:
    """z uniform in [low, high], representable in float32, and multipliers."""
    generator = torch.Generator().manual_seed(3)
    z, multipliers = {}, {}
    for kind in task.units.layers:
        z[kind] = (low + (high - low) * torch.rand(task.units.shape(kind), generator=generator)).double()
        groups = task.units.num_groups(kind, task.settings.budget)
        multipliers[kind] = torch.randn(3, groups, generator=generator) * torch.tensor([[2.0], [5.0], [1.0]])
    return z, multipliers


CASES = pytest.mark.parametrize(
    ("model_type", "budget"), [("llama", "global"), ("llama", "layer"), ("qwen3_moe", "expert")]
)


def assert_same(found: dict, expected: dict) -> None:
    for kind in expected:  # the learner's losses are float32
        torch.testing.assert_close(found[kind].double(), expected[kind], rtol=2e-4, atol=2e-6)


@CASES
def test_inside_the_linear_range_it_is_the_gradient_of_the_objective(model_type, budget, monkeypatch):
    task = make_task(model_type, budget)
    z, multipliers = draw(task, 0.05, 0.95)

    def objective(z: dict) -> float:
        m = {kind: values.clamp(min=0) for kind, values in z.items()}
        s = {kind: score(values).clamp(0, 1) for kind, values in m.items()}
        return task_loss(task, m) + penalty(task, s, multipliers)

    assert_same(FirstStep(task, z, multipliers, monkeypatch).z_gradients, differences(objective, z))


@CASES
def test_beyond_it_gradients_go_straight_through(model_type, budget, monkeypatch):
    task = make_task(model_type, budget)
    z, multipliers = draw(task, -0.1, 3.0)
    for values in z.values():
        values[0, 0], values[0, 1] = -0.05, 2.5  # cut off by ReLU, by clamp
    m = {kind: values.clamp(min=0) for kind, values in z.items()}
    s = {kind: score(values).clamp(0, 1) for kind, values in m.items()}
    by_mask = differences(lambda m: task_loss(task, m), m)
    by_score = differences(lambda s: penalty(task, s, multipliers), s)
    expected = {}
    for kind, values in m.items():
        slope = (score(values + 1e-5) - score(values - 1e-5)) / 2e-5
        assert slope.min() > 0, "a saturated score still moves"
        expected[kind] = by_mask[kind] + by_score[kind] * slope
    assert_same(FirstStep(task, z, multipliers, monkeypatch).z_gradients, expected)


@CASES
def test_multipliers_ascend(model_type, budget, monkeypatch):
    task = make_task(model_type, budget)
    z, multipliers = draw(task, 0.3, 0.9)
    step = FirstStep(task, z, multipliers, monkeypatch)
    for kind, values in z.items():
        s = score(values).reshape(multipliers[kind].shape[1], -1)
        violation = s.mean(1) - kept_shares(task, kind)
        assert torch.all(violation > 0 if kind == "head" else violation < 0)
        expected = torch.stack([violation, violation**2, (s * (1 - s)).mean(1)]) / len(violation)
        torch.testing.assert_close(step.multiplier_gradients[kind].double(), expected, rtol=1e-4, atol=1e-6)
        # the first step of Adam is as long as the learning rate
        lengths = torch.tensor([[2e-2], [0.8], [2e-2]])
        moved = step.multipliers_after[kind] - multipliers[kind]
        torch.testing.assert_close(moved, lengths * expected.sign().float(), rtol=1e-2, atol=1e-5)

"""Where the time of an engine's steps goes, as seen by its worker: timers around the phases of a step, and torch's
profiler for what runs inside the model. bench/breakdown.py turns both into a table.

    recorder = Recorder(worker.model_runner, profile=False)
    ...                                  # the engine runs
    steps = recorder.stop()              # [{"tokens": 8, "phases": {"forward": 0.021, ...}, "ops": {...}}, ...]

A phase's time is its own, without that of phases inside it, so that phases add up to the worker's time. Phases are
methods of vLLM's model runner; one that a release of vLLM lacks is left out, and its time is in "rest of the worker".
Operators count with their own time, not with that of operators inside them.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

STEP = "step "  # what profiler events of a step begin with; its index follows
PHASE, MODULE = "phase ", "module "
PROFILED_STEPS = 8

# Method of the model runner -> phase.
PHASES = {
    "execute_model": "rest of the worker",
    "sample_tokens": "rest of the worker",
    "_update_states": "input preparation",
    "_prepare_inputs": "input preparation",
    "_determine_batch_execution_and_padding": "input preparation",
    "_get_slot_mappings": "input preparation",
    "_preprocess": "input preparation",
    "_build_attention_metadata": "attention metadata",
    "_model_forward": "forward",
    "_sample": "sampler",
    "_bookkeeping_sync": "sampler",
}
LOGITS = "logits"  # model.compute_logits

# What operators, compiled kernels and modules are, by the first pattern that their name matches. Of a kernel that
# inductor fused, the name lists what it was made of. Operators that match none count as the module around them.
PARTS = {
    "experts": r"moe|expert|MoE|Expert",
    "KV-cache update": r"reshape_and_cache|cache_kernel|kv_cache_update",
    "attention op": r"attention|attn|flash|^Attention$|UnevenGroups",
    "GEMMs": r"onednn_mm|weight_packed|zentorch|addmm|\bmm\b|bmm|matmul|aten::linear|gemm|cutlass|Linear|LMHead|Logits",
    "norms": r"rms_norm|layer_norm|rsqrt|Norm",
    "activation": r"silu|gelu|sigmoid|Silu|Gelu|Activation",
    "rotary": r"rotary|Rotary|_cos|_sin",
    "embedding": r"embedding|Embedding",
}
OTHER = "other operators"
# Events around calls of what torch compiled: no operators, but Python and dispatch. Their names hold random letters.
CALLS = re.compile(r"## Call |Torch-Compiled |TorchDynamo |Pregraph |AOTDispatcher ")


class Recorder:
    """Records the steps of a model runner from its creation to `stop`.

    Args:
        profile: also profile what the model runs in the first PROFILED_STEPS steps after `skip`; slows these steps.
        skip: steps that are not profiled: a prefill before the decode steps.
    """

    def __init__(self, runner: Any, profile: bool = False, skip: int = 0) -> None:
        self.runner, self.skip = runner, skip
        self.steps: list[dict] = []
        self._inner: list[float] = []  # of each running phase: seconds of the phases inside it
        self._hooks: list[Any] = []
        self._profiler: Any = self._new_profiler() if profile else None
        self._is_profiling = False
        for method, phase in PHASES.items():
            if hasattr(runner, method):
                setattr(runner, method, self._timed(getattr(runner, method), phase, is_step=method == "execute_model"))
        runner.model.compute_logits = self._timed(runner.model.compute_logits, LOGITS)
        if profile:
            self._name_modules()

    def stop(self) -> list[dict]:
        """Removes all timers. A record of each step: its "tokens", seconds by phase, and where it was profiled "ops":
        {phase: {part: {operator: seconds}}}."""
        for method in PHASES:
            self.runner.__dict__.pop(method, None)
        del self.runner.model.compute_logits
        for hook in self._hooks:
            hook.remove()
        if self._is_profiling:
            self._stop_profiler()
        if self._profiler is not None:
            for index, ops in operator_seconds(self._profiler.events(), self.runner.device.type).items():
                self.steps[index]["ops"] = ops
        for step in self.steps:
            step["phases"] = dict(step["phases"])
        return self.steps

    def _timed(self, function: Callable, phase: str, is_step: bool = False) -> Callable:
        def timed(*args, **options):
            if is_step:
                self._begin_step(args[0])
            if not self._is_profiling:
                return self._run(function, phase, args, options)
            import torch

            with torch.profiler.record_function(STEP + str(len(self.steps) - 1) if is_step else PHASE + phase):
                return self._run(function, phase, args, options)

        return timed

    def _run(self, function: Callable, phase: str, args: tuple, options: Mapping) -> Any:
        self._inner.append(0.0)
        started = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            self._synchronize()
            seconds = time.perf_counter() - started
            inner = self._inner.pop()
            if self._inner:
                self._inner[-1] += seconds
            if self.steps:
                self.steps[-1]["phases"][phase] += seconds - inner

    def _begin_step(self, scheduler_output: Any) -> None:
        index = len(self.steps)
        self.steps.append({"tokens": scheduler_output.total_num_scheduled_tokens, "phases": defaultdict(float)})
        if self._profiler is not None and index == self.skip:
            self._profiler.start()
            self._is_profiling = True
        elif self._is_profiling and index == self.skip + PROFILED_STEPS:
            self._stop_profiler()

    def _stop_profiler(self) -> None:
        self._is_profiling = False
        self._profiler.stop()

    def _synchronize(self) -> None:
        if self.runner.device.type != "cpu":
            import torch

            torch.accelerator.synchronize()

    def _new_profiler(self) -> Any:
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self.runner.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        return profile(activities=activities)

    def _name_modules(self) -> None:
        """Profiler events around the modules that PARTS knows; what is compiled calls no module."""
        import torch

        def before(module, inputs):
            module.__dict__["_breakdown_scope"] = scope = torch.profiler.record_function(MODULE + type(module).__name__)
            scope.__enter__()

        def after(module, inputs, output):
            module.__dict__.pop("_breakdown_scope").__exit__(None, None, None)

        for module in self.runner.model.modules():
            if part_of(type(module).__name__):
                self._hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def part_of(name: str) -> str | None:
    """The part that an operator, a compiled kernel or a module of this name belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), None)


def operator_seconds(events: Iterable[Any], device: str) -> dict[int, dict[str, dict[str, dict[str, float]]]]:
    """Seconds of operators by step, phase, part and name; see PARTS. What phases, modules and calls take themselves is
    Python, and not in it."""
    found: dict[int, dict[str, dict[str, dict[str, float]]]] = {}
    for event in events:
        if event.name.startswith((STEP, PHASE, MODULE)) or CALLS.match(event.name):
            continue
        microseconds = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        part, phase, ancestor = part_of(event.name), None, event.cpu_parent
        while ancestor is not None and not ancestor.name.startswith(STEP):
            if ancestor.name.startswith(PHASE):
                phase = phase or ancestor.name.removeprefix(PHASE)
            elif part is None and not CALLS.match(ancestor.name):
                part = part_of(ancestor.name.removeprefix(MODULE))
            ancestor = ancestor.cpu_parent
        if ancestor is None or phase is None:
            continue
        step = found.setdefault(int(ancestor.name.removeprefix(STEP)), {})
        seconds = step.setdefault(phase, {}).setdefault(part or OTHER, {})
        seconds[event.name] = seconds.get(event.name, 0.0) + microseconds / 1e6
    return found

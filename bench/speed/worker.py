"""What benchmarks ask of the process in which an engine's model runs. vLLM mixes `Probe` into its worker's class
(`worker_extension_cls`); `engine.collective_rpc("probe_machine", args=...)` calls it there, with the threads, cores and
memory policy that the engine got.
"""

import time
from collections.abc import Sequence
from typing import Any

PROBE = f"{__name__}.Probe"


class Probe:
    """Methods that a worker has besides its own. What they take and return goes through messages: plain values."""

    model_runner: Any
    device: Any

    def probe_machine(self, shapes: Sequence[Sequence[int]]) -> dict:
        """What this machine can do at best; see `bench.speed.machine.measure_machine`."""
        from bench.speed.machine import measure_machine

        return measure_machine(self.device, self.model_runner.dtype, shapes)

    def probe_delay(self, share: float) -> None:
        """From now on every step lasts this share of its own time longer; 0 ends that.

        The worker spins on its core, as a slower kernel would; the engine's other processes see a slow step.
        """
        runner = self.model_runner
        runner.__dict__.pop("execute_model", None)
        if not share:
            return
        execute_model = runner.execute_model

        def delayed(*args, **options):
            started = time.perf_counter()
            result = execute_model(*args, **options)
            if self.device.type != "cpu":
                import torch

                torch.accelerator.synchronize()
            ends = started + (1 + share) * (time.perf_counter() - started)
            while time.perf_counter() < ends:
                pass
            return result

        runner.execute_model = delayed

    def probe_record(self, profile: bool, skip: int) -> None:
        """Starts to record the steps of this worker; see `bench.speed.profile.Recorder`."""
        from bench.speed.profile import Recorder

        self._recorder = Recorder(self.model_runner, profile, skip)

    def probe_steps(self) -> list[dict]:
        """Ends the recording and returns its steps."""
        return self._recorder.stop()

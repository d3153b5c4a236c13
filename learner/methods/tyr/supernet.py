"""The supernet of Tyr-the-Pruner: every sublayer at several sparsities, on disk.

A genome says how many units each sublayer has lost; all of them are sub-networks of the supernet. It is built block by
block from the dense weights. Text runs through the block, H = X^T X of its sublayers is collected, they are pruned to
all their sparsities (pruning.py), and the text goes on to the next block through a mean of the candidates,
so that later blocks are pruned for inputs that carry the errors to be expected (arXiv 2503.09657, equation 5):

    x = sum_e (1 - S_e) x_e / sum_e (1 - S_e)        S_e: share of the units that candidate e has lost

The sublayers are linear, so the mean of the outputs is the output of the mean of the weights. (The authors' code
passes dense outputs on, as `--error-accumulation none` does.)

Several processes share the work. Each runs a part of the text through the blocks, H is the sum over all, and each
prunes some of a block's sublayers. So H, and with it the weights, differ by rounding from those of one process.

Files: `{layer}.{process}of{processes}.safetensors` with `{sublayer}.{units removed}.kept` (bool [units]) and `.weight`
(columns of the kept units). A block is done when the files of all processes are there; a build that was interrupted
goes on behind the last of them, with as many processes as there are then.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from learner.methods.tyr.pruning import prune
from learner.methods.tyr.sublayers import Sublayer, collect_hessians
from learner.model.blockwise import Blockwise
from learner.run.disk import writing
from learner.run.processes import together
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar

Genome = tuple[int, ...]  # units that each sublayer has lost
UNITS_PER_ROUND = {"head": 1, "channel": 16, "expert": 16}


class Supernet:
    """
    Args:
        directory: where candidates are kept; made if need be.
        blockwise: the dense model.
        sublayers: in the order of the decoder layers.
        levels: for each sublayer, the numbers of units that its candidates have lost.
        accelerator: the processes; all see `directory`.
    """

    def __init__(
        self,
        directory: Path,
        blockwise: Blockwise,
        sublayers: Sequence[Sublayer],
        levels: Sequence[Sequence[int]],
        accelerator: Accelerator,
    ) -> None:
        self.directory, self.blockwise, self.sublayers, self.levels = directory, blockwise, sublayers, levels
        self.accelerator = accelerator
        self._members: list[list[int]] = [[] for _ in range(len(blockwise))]  # of each block, indices of its sublayers
        for index, sublayer in enumerate(sublayers):
            self._members[sublayer.layer].append(index)
        self._files: dict[str, safe_open] = {}  # of one layer, by name of the sublayer
        self._files_layer: int | None = None
        directory.mkdir(parents=True, exist_ok=True)

    def genes(self, layer: int) -> slice:
        """Which part of a genome is about this block."""
        end = sum(len(members) for members in self._members[: layer + 1])
        return slice(end - len(self._members[layer]), end)

    @torch.no_grad()
    def build(self, tokens: torch.Tensor, accumulate: bool, title: str) -> None:
        """Makes the candidates that are not there yet.

        Args:
            tokens: calibration text, token ids [sequences, length].
            accumulate: pass on the errors of equation (5).
            title: of the progress bar.

        Raises:
            InputError: the model's activations are not finite.
        """
        layers, accelerator = range(len(self.blockwise)), self.accelerator
        done = {layer for layer in layers if self._paths(layer)}  # before any process writes
        accelerator.wait_for_everyone()
        if len(done) == len(layers):
            return
        share = tokens.tensor_split(accelerator.num_processes)[accelerator.process_index]
        hidden_states = self.blockwise.embed(share)
        for layer in progress_bar(layers, desc=title, unit="layer", disable=not accelerator.is_main_process):
            block = self.blockwise.block(layer)
            dense_output = None if accumulate else hidden_states
            if layer in done:
                if not accumulate:
                    self.blockwise.run(layer, block, hidden_states, dense_output)
            else:
                members = [self.sublayers[index] for index in self._members[layer]]
                with collect_hessians(block, members) as hessians:
                    self.blockwise.run(layer, block, hidden_states, dense_output)
                for hessian in hessians.values():
                    if accelerator.num_processes > 1:
                        hessian.copy_(accelerator.reduce(hessian))
                with together(accelerator):
                    self._prune(layer, block, hessians)
            if accumulate:
                for index in self._members[layer]:
                    self.sublayers[index].weight(block).copy_(self._expected_weight(index))
                self.blockwise.run(layer, block, hidden_states, hidden_states)

    def install(self, layer: int, block: nn.Module, genes: Genome, installed: Genome | None = None) -> None:
        """Gives `block` the weights of `genes`, its part of a genome.

        Args:
            installed: what it has now, so that only changes are read; None: unknown.
        """
        for place, index in enumerate(self._members[layer]):
            if installed is None or genes[place] != installed[place]:
                self.sublayers[index].weight(block).copy_(self.weight(index, genes[place]))

    def kept(self, index: int, count: int) -> torch.Tensor:
        """Which units sublayer number `index` keeps when it loses `count`: bool [units]."""
        sublayer = self.sublayers[index]
        if count == 0:
            return torch.ones(sublayer.num_units, dtype=torch.bool)
        return self._read(sublayer, count, "kept")

    def weight(self, index: int, count: int) -> torch.Tensor:
        """Weight of sublayer number `index` without `count` units: [outputs, inputs], zero where a unit is gone."""
        sublayer = self.sublayers[index]
        dense = sublayer.weight(self.blockwise.model.model.layers[sublayer.layer])
        if count == 0:
            return dense
        weight = torch.zeros(dense.shape, dtype=dense.dtype)
        inputs = self.kept(index, count).repeat_interleave(dense.shape[1] // sublayer.num_units)
        weight[:, inputs] = self._read(sublayer, count, "weight")
        return weight

    def _expected_weight(self, index: int) -> torch.Tensor:
        """Equation (5) for the weights of a sublayer."""
        total, shares = torch.zeros(()), 0.0
        for count in self.levels[index]:
            share = 1 - count / self.sublayers[index].num_units
            total, shares = total + share * self.weight(index, count).float(), shares + share
        return total / shares if shares else total  # without shares every candidate has lost all units and is zero

    def _prune(self, layer: int, block: nn.Module, hessians: dict[str, torch.Tensor]) -> None:
        """Writes the candidates of this process' share of the sublayers of a block."""
        tensors, process, processes = {}, self.accelerator.process_index, self.accelerator.num_processes
        for index in self._members[layer][process::processes]:
            sublayer, hessian = self.sublayers[index], hessians[self.sublayers[index].name]
            if not hessian.isfinite().all():
                raise InputError(
                    f"layer {layer}: outputs of {sublayer.name} units overflow in {sublayer.weight(block).dtype}; "
                    "use --dtype bfloat16 or float32"
                )
            counts = [count for count in self.levels[index] if count]
            per_round = UNITS_PER_ROUND[sublayer.kind]
            weight = sublayer.weight(block)
            for count, candidate in prune(weight, hessian, sublayer.num_units, counts, per_round).items():
                tensors[f"{sublayer.name}.{count}.kept"] = candidate.kept.cpu()
                tensors[f"{sublayer.name}.{count}.weight"] = candidate.weight.to("cpu", weight.dtype).contiguous()
        path = self.directory / f"{layer}.{process}of{processes}.safetensors"
        partial = path.with_suffix(".partial")
        with writing():
            save_file(tensors, partial)
        os.replace(partial, path)

    def _paths(self, layer: int) -> list[Path]:
        """The files of a block; none if it is not done."""
        found: dict[int, list[Path]] = {}
        for path in self.directory.glob(f"{layer}.*.safetensors"):
            if match := re.fullmatch(r"\d+\.\d+of(\d+)\.safetensors", path.name):
                found.setdefault(int(match[1]), []).append(path)
        return next((sorted(paths) for processes, paths in sorted(found.items()) if len(paths) == processes), [])

    def _read(self, sublayer: Sublayer, count: int, what: str) -> torch.Tensor:
        if self._files_layer != sublayer.layer:
            self._files, self._files_layer = {}, sublayer.layer
            for path in self._paths(sublayer.layer):
                file = safe_open(path, framework="pt")
                self._files |= {key.partition(".")[0]: file for key in file.keys()}  # noqa: SIM118 # not a dictionary
        return self._files[sublayer.name].get_tensor(f"{sublayer.name}.{count}.{what}")

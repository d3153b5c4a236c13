"""Runs a causal LM that lies in CPU memory one decoder layer ("block") at a time on another device.

The model itself is never touched: what runs are copies of its blocks, whose weights the caller may change.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import PreTrainedModel

from learner.model.loss import scaled

TOKENS_PER_PASS = 8192  # that go through a block at once, or one sequence if it is longer


class Blockwise:
    """
    Args:
        model: a Llama-like ...ForCausalLM in evaluation mode.
        device: where blocks run.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        self.model, self.device = model, device
        self._arguments: dict[torch.Size, list[dict[str, Any]]] = {}  # of each block, by [sequences, length]

    def __len__(self) -> int:
        return len(self.model.model.layers)

    def block(self, index: int) -> nn.Module:
        """A copy of a decoder layer on the device."""
        return copy.deepcopy(self.model.model.layers[index]).to(self.device)

    @cached_property
    def _head(self) -> nn.Module:
        return copy.deepcopy(nn.Sequential(self.model.model.norm, self.model.lm_head)).to(self.device)

    def logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits [..., vocabulary] of the last block's output [..., hidden_size] on the device."""
        return scaled(self.model, self._head(hidden_states))

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Input of the first block [sequences, length, hidden_size] on the CPU, for token ids [sequences, length]."""
        hidden_states = []
        for part in self.slices(tokens):
            with self._only_embed() as calls:
                self.model.model(input_ids=tokens[part].to(self.model.device), use_cache=False)
            hidden_states.append(calls[0][0].cpu())
            if tokens[part].shape not in self._arguments:
                self._arguments[tokens[part].shape] = [send_to_device(kwargs, self.device) for _, kwargs in calls]
        return torch.cat(hidden_states)

    @torch.no_grad()
    def run(self, index: int, block: nn.Module, hidden_states: torch.Tensor, into: torch.Tensor | None) -> None:
        """Runs `block`, a copy of block number `index`.

        Args:
            hidden_states: [sequences, length, hidden_size], of as many sequences and as long as were embedded once.
            into: where the output goes; may be `hidden_states` itself. None drops it.
        """
        for part in self.slices(hidden_states):
            x = hidden_states[part].to(self.device)
            y = block(x, **self._arguments[x.shape[:2]][index])
            if into is not None:
                into[part] = y.to(into.device)

    @staticmethod
    def slices(x: torch.Tensor) -> Iterator[slice]:
        """Cuts x [sequences, length, ...] into what goes through a block at once."""
        step = max(1, TOKENS_PER_PASS // x.shape[1])
        return (slice(start, start + step) for start in range(0, len(x), step))

    @contextmanager
    def _only_embed(self) -> Iterator[list[tuple[torch.Tensor, dict[str, Any]]]]:
        """While it runs, decoder layers return their input, and what they are called with is collected."""
        calls = []

        def record(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
            calls.append((hidden_states, kwargs))
            return hidden_states

        with ExitStack() as stack:
            for layer in self.model.model.layers:
                layer.forward = record  # hides the method of the class
                stack.callback(delattr, layer, "forward")
            yield calls

"""The text of a run as token ids, and whether the model can read it."""

from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learner.data.reading import BlockSampler, beginning, blocks_of_text, read_tokens
from learner.data.self_generated import SOURCE, self_generated_tokens
from learner.model.dense import DenseModel
from learner.model.perplexity import EVAL_BLOCK_SIZE
from learner.run.processes import together
from pruned_vllm.common.errors import InputError

MAX_TOKENS = 2**25  # that are read, unless the run needs more


def training_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: Any,
    sequence_length: int,
    sequences: int,
    dense: DenseModel | None,
    processes: Any,
) -> BlockSampler:
    """What `job` learns from: blocks from all over its --data, where there is more of it than is consumed.

    Of "self" among other sources come as many blocks as of all others together.

    Args:
        job: has model, data, self_tokens, text_column, split and seed.
        sequences: that the run takes.
        dense: writes the text of "self".
        processes: an Accelerator or PartialState. All must call this, and it fails in all; the first shows progress.

    Raises:
        InputError: the text cannot be read or is too short, the model cannot read it, or nothing can write "self".
    """
    positions, show = num_positions(model), processes.is_main_process
    if positions and sequence_length > positions:  # most models would go on, but their outputs would mean nothing
        raise InputError(
            f"--sequence-length {sequence_length} is more than the {positions} positions that {job.model} was made for "
            f"(max_position_embeddings in its config.json); use --sequence-length {positions} or less"
        )
    consumed = sequences * sequence_length
    others = [source for source in job.data if source != SOURCE]
    first = beginning(tokenizer)
    block_size, parts = max(1, sequence_length - len(first)), []
    if others:
        with together(processes):
            parts.append(_read(model, tokenizer, others, job, consumed, show))
            if SOURCE in job.data and len(parts[0]) < block_size:
                raise InputError(
                    f"{', '.join(others)}: {len(parts[0])} tokens, fewer than one block of {block_size}, cannot be "
                    "half of the text; give more beside self (--data), or shorter blocks (--sequence-length)"
                )
    if SOURCE in job.data:
        if dense is None:
            raise InputError("--data self is text that the dense model writes; say with --teacher which model that is")
        wanted = min(job.self_tokens, consumed // 2 if others else consumed)
        with nullcontext() if isinstance(dense.model, FSDPModule) else together(processes):
            parts.append(self_generated_tokens(dense, max(wanted, sequence_length), job.seed, processes, show))
    ids = _equal_shares(parts, block_size)
    return BlockSampler(ids, sequence_length, job.seed, first)


def _equal_shares(parts: list[torch.Tensor], block_size: int) -> torch.Tensor:
    """All parts one behind the other, in whole blocks; a shorter one is repeated until it is as long as the longest."""
    if len(parts) == 1:
        return parts[0]
    lengths = [len(part) // block_size * block_size for part in parts]
    longest = max(lengths)
    return torch.cat(
        [part[:length].repeat(-(-longest // length))[:longest] for part, length in zip(parts, lengths, strict=True)]
    )


def num_positions(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for; None if its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def evaluation_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Any, show_progress: bool = True
) -> torch.Tensor:
    """Token ids [N] of the --eval-data of `job`, in the blocks that `perplexity` scores; see `training_blocks`.

    Raises InputError if nothing could be scored.
    """
    if SOURCE in job.eval_data:
        raise InputError("--eval-data self: perplexity is measured on text that others wrote; name files or data sets")
    ids = _read(model, tokenizer, job.eval_data, job, 0, show_progress)
    if len(ids) < EVAL_BLOCK_SIZE:
        raise InputError(f"--eval-data has {len(ids)} tokens; at least {EVAL_BLOCK_SIZE} are scored")
    return blocks_of_text(ids, EVAL_BLOCK_SIZE, beginning(tokenizer)).flatten()


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sources: list[str],
    job: Any,
    consumed: int,
    show_progress: bool,
) -> torch.Tensor:
    ids = read_tokens(
        tokenizer,
        sources,
        limit=max(consumed, MAX_TOKENS),
        column=job.text_column,
        split=job.split,
        seed=job.seed,
        show_progress=show_progress,
    )
    largest, known = ids.max().item(), model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise InputError(
            f"the tokenizer of {job.model} makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of the "
            f"text, but the model has embeddings for 0 to {known - 1}; give it the tokenizer that it was trained with"
        )
    return ids

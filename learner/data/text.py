"""The text of a run as token ids, and whether the model can read it."""

from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from learner.data.reading import BlockSampler, beginning, blocks_of_text, read_tokens
from learner.model.perplexity import EVAL_BLOCK_SIZE
from pruned_vllm.common.errors import InputError

MAX_TOKENS = 2**25  # that are read, unless the run needs more


def training_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    job: Any,
    sequence_length: int,
    sequences: int,
    show_progress: bool = True,
) -> BlockSampler:
    """What `job` learns from: blocks from all over its --data, where there is more of it than is consumed.

    Args:
        job: has model, data, text_column, split and seed.
        sequences: that the run takes.

    Raises:
        InputError: the text cannot be read or is too short, or the model cannot read it.
    """
    positions = num_positions(model)
    if positions and sequence_length > positions:  # most models would go on, but their outputs would mean nothing
        raise InputError(
            f"--sequence-length {sequence_length} is more than the {positions} positions that {job.model} was made for "
            f"(max_position_embeddings in its config.json); use --sequence-length {positions} or less"
        )
    ids = _read(model, tokenizer, job.data, job, sequences * sequence_length, show_progress)
    return BlockSampler(ids, sequence_length, job.seed, beginning(tokenizer))


def num_positions(model: PreTrainedModel) -> int | None:
    """Positions that the model was made for; None if its config does not say."""
    return getattr(model.config, "max_position_embeddings", None)


def evaluation_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, job: Any, show_progress: bool = True
) -> torch.Tensor:
    """Token ids [N] of the --eval-data of `job`, in the blocks that `perplexity` scores; see `training_blocks`.

    Raises InputError if nothing could be scored.
    """
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

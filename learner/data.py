"""Text files to batches of token blocks."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from pruned_vllm.errors import InputError


def tokenize_files(tokenizer: PreTrainedTokenizerBase, files: list[Path]) -> torch.Tensor:
    """Token ids [N] of UTF-8 text files, one after the other, an end-of-text token between them.

    Raises:
        InputError: with every file that cannot be read.
    """
    texts, problems = [], []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"{file}: {error}")
    if problems:
        raise InputError("These text files cannot be read:", problems)
    ids: list[int] = []
    for text in texts:
        if ids and tokenizer.eos_token_id is not None:
            ids.append(tokenizer.eos_token_id)
        ids += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids)


class BlockSampler:
    """Cuts token ids into blocks [sequence_length] (the remainder is dropped) and deals them in random order.

    Each block is dealt once before any is dealt again; the order depends on the seed alone.
    """

    def __init__(self, token_ids: torch.Tensor, sequence_length: int, seed: int):
        count = len(token_ids) // sequence_length
        if count == 0:
            raise InputError(
                f"The text has {len(token_ids)} tokens, fewer than one block of {sequence_length}; "
                "give more text (--data) or shorter blocks (--sequence-length)"
            )
        self.blocks = token_ids[: count * sequence_length].view(count, sequence_length)
        self._generator = torch.Generator().manual_seed(seed)
        self._order = torch.empty(0, dtype=torch.long)

    def next_batch(self, batch_size: int) -> torch.Tensor:
        """Token ids [batch_size, sequence_length]."""
        while len(self._order) < batch_size:
            self._order = torch.cat([self._order, torch.randperm(len(self.blocks), generator=self._generator)])
        batch, self._order = self._order[:batch_size], self._order[batch_size:]
        return self.blocks[batch]

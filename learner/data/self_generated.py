"""Text that the dense model writes itself, to learn from: `--data self`.

The model answers prompts (learner/data/prompts.py) through its chat template, or goes on with them where it has none;
answers are drawn at TEMPERATURE. A document is a prompt as the model sees it and the answer, so what is learned from
looks as what the model will be asked and will say.

Writing is slow, so every batch of documents is kept in `<cache>/self/<digest>/`, where `<cache>` is
`cache_directory()`, and the digest is of what it is asked for: the model's fingerprint, its template, the prompts,
the settings below and the seed. A batch depends on nothing but its number. So an interrupted run goes on behind its
last batch, a run that needs more text adds to what is there, and several processes write several batches at once. In
another dtype, on another device or with another version of PyTorch the model may draw other words; it reads those that
are there. A GPU writes several batches in the time of one, as many as its free memory takes: there they are drawn
together, so that words depend on that, too, and what is interrupted is written again together.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from learner.data.prompts import GENERATION_PROMPTS, prompt_tokens, shuffled_prompts
from learner.model.dense import DenseModel
from learner.model.generation import end_tokens, generate
from learner.run.processes import of_first
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import cache_directory, read_json
from pruned_vllm.common.progress import progress_bar

SOURCE = "self"  # among the sources of --data
TEMPERATURE = 0.8
ANSWER_TOKENS = 256  # at most
BATCH_SIZE = 32  # documents
BATCHES_ON_GPU = 16  # that it writes together, if they take no more than half of its free memory
LOGITS_COPIES = 4  # of those of the next token in float32, while it is drawn


def self_generated_tokens(
    dense: DenseModel, count: int, seed: int, processes: Any, show_progress: bool = True
) -> torch.Tensor:
    """Token ids int64 [count] of documents of the dense model, an end token between them.

    Args:
        seed: of the order of prompts and of the draw.
        processes: an Accelerator or PartialState. All may call this at once; none waits for another, unless the
            weights are sharded: then all must, and write every batch together.

    Raises:
        InputError: the model cannot be asked, a file of the cache is damaged, or the cache cannot be written.
    """
    writer = _Writer(dense, seed, processes)
    rank, number_of = processes.process_index, processes.num_processes
    if number_of > 1 and not writer.is_sharded:  # first a share of what all need
        tokens, index = 0, rank
        while tokens * number_of < count:
            tokens += sum(map(len, writer.turn(index)))
            index += number_of
    title = "text of the dense model"
    found: list[int] = []
    with progress_bar(total=count, desc=title, unit="token", disable=not show_progress) as progress:
        for document in writer.documents():
            if found and writer.end and found[-1] not in writer.end:
                found.append(writer.end[0])
            found += document
            progress.update(min(len(found), count) - progress.n)
            if len(found) >= count:
                break
    return torch.tensor(found[:count], dtype=torch.int64)


class _Writer:
    """Batches of documents by number, from the cache or written now, as many in a turn as the device writes together.

    Attributes:
        batches: in a turn.
    """

    def __init__(self, dense: DenseModel, seed: int, processes: Any) -> None:
        self.dense, self.seed, self.processes = dense, seed, processes
        self.is_sharded = isinstance(dense.model, FSDPModule)
        self.known = dense.model.get_input_embeddings().num_embeddings
        self.end = tuple(token for token in end_tokens(dense.directory, dense.tokenizer) if token < self.known)
        self.prompts = shuffled_prompts(seed)
        self.batches = of_first(processes, self._batches) if self.is_sharded else self._batches()
        settings = {
            "model": str(dense.fingerprint),
            "prompts": GENERATION_PROMPTS,
            "tokens": dense.tokenizer(list(GENERATION_PROMPTS))["input_ids"],
            "chat_template": dense.tokenizer.chat_template,
            "end": self.end,
            "settings": [TEMPERATURE, ANSWER_TOKENS, BATCH_SIZE],
            "seed": seed,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        self.directory = cache_directory() / "self" / digest

    def documents(self) -> Iterator[list[int]]:
        """All documents in their order, without end."""
        index = 0
        while True:
            yield from self.turn(index)
            index += 1

    def turn(self, index: int) -> list[list[int]]:
        """Token ids of the documents of a turn."""
        first = index * self.batches
        paths = [self.directory / f"{first + place:06}.json" for place in range(self.batches)]
        if not self.is_sharded:
            return self._kept(paths) or self._publish(paths, self._write(first))
        # The first process says what is there: others may see another cache, or see it later.
        kept = of_first(self.processes, lambda: self._kept(paths))
        if kept is None:
            documents = self._write(first)
            kept = of_first(self.processes, lambda: self._publish(paths, documents))
        return kept

    def _batches(self) -> int:
        if self.dense.device.type != "cuda":
            return 1
        free, _ = torch.cuda.mem_get_info(self.dense.device)
        positions = max(map(len, prompt_tokens(self.dense.tokenizer, self.prompts))) + ANSWER_TOKENS
        geometry, element_bytes = self.dense.geometry, self.dense.model.dtype.itemsize
        of_document = positions * geometry.kv_cache_bytes_per_token(element_bytes)
        of_document += geometry.state_bytes_per_sequence(element_bytes) + LOGITS_COPIES * 4 * self.known
        return max(1, min(BATCHES_ON_GPU, free // 2 // (BATCH_SIZE * of_document)))

    def _kept(self, paths: Sequence[Path]) -> list[list[int]] | None:
        if not all(path.exists() for path in paths):
            return None
        return [document for path in paths for document in self._read(path)]

    def _read(self, path: Path) -> list[list[int]]:
        try:
            documents = read_json(path).get("documents")
            if not _are_documents(documents, self.known):
                raise InputError(f"{path} does not hold token ids that the model has")
        except InputError as error:
            raise InputError(f"{error}; delete {self.directory}, and it is written anew") from None
        return documents

    def _write(self, first: int) -> list[list[int]]:
        """The documents of the batches from number `first` on."""
        places = range(first * BATCH_SIZE, (first + self.batches) * BATCH_SIZE)
        prompts = prompt_tokens(self.dense.tokenizer, [self.prompts[place % len(self.prompts)] for place in places])
        largest = max(map(max, prompts))
        if largest >= self.known:
            raise InputError(
                f"the tokenizer makes token {largest} of a prompt, but the model has {self.known} embeddings"
            )
        seed = self.seed * 1_000_003 + first
        model, device = self.dense.model, self.dense.device
        answers = generate(model, prompts, ANSWER_TOKENS, self.end, temperature=TEMPERATURE, seed=seed, device=device)
        return [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]

    def _publish(self, paths: Sequence[Path], documents: list[list[int]]) -> list[list[int]]:
        """Puts the batches at `paths`, but for those where another process was faster: then all go on with that one's.
        Returns the documents that are there."""
        for place, path in enumerate(paths):
            self._publish_batch(path, documents[place * BATCH_SIZE : (place + 1) * BATCH_SIZE])
        return [document for path in paths for document in self._read(path)]

    def _publish_batch(self, path: Path, documents: list[list[int]]) -> None:
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"documents": documents}), encoding="utf-8")
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                temporary.replace(path)
        except OSError as error:
            raise InputError(
                f"text of the dense model cannot be kept in {path.parent}: {error.strerror}; XDG_CACHE_HOME says where "
                "the cache is"
            ) from error
        finally:
            with suppress(OSError):
                temporary.unlink()


def _are_documents(found: Any, known: int) -> bool:
    """Whether `found` is a list of lists of token ids below `known`, none of them empty."""
    return (
        isinstance(found, list)
        and found != []
        and all(
            isinstance(document, list)
            and document
            and all(type(token) is int and 0 <= token < known for token in document)
            for document in found
        )
    )

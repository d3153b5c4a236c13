"""Whether a pruned model still answers as the dense one does.

    reference = Reference.of(dense, num_prompts=50, tell=print)
    ...
    reference.agreement(pruned)     # {"agreement_kl": 0.31, "agreement_tokens": 9.4, "answer_tokens": 41.2}

Perplexity on foreign text does not tell what a user of a chat model sees. So the dense model answers fixed prompts
(learner/data/prompts.py), through its chat template where it has one, always with the likeliest token. The pruned model
reads these answers:

- agreement_kl      KL(dense || pruned) of the next token, in nats, mean over all tokens of all answers
- agreement_tokens  for how many tokens the pruned model would have said the same: those before the first place where
                    another token is likeliest, mean over the answers. Up to there it reads what it would have written,
                    so that is what generating would give.
- answer_tokens     length of the dense model's answers, mean: no agreement_tokens is larger
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from learner.data.prompts import AGREEMENT_PROMPTS, prompt_tokens
from learner.model.dense import DenseModel
from learner.model.generation import end_tokens, generate
from learner.model.loss import logits_of, run_without_head
from pruned_vllm.common.errors import InputError
from pruned_vllm.common.progress import progress_bar

ANSWER_TOKENS = 48  # at most
WRITTEN_AT_ONCE = 25  # answers
BATCH_SIZE = 10  # answers that are read at once
CHUNK = 256  # tokens whose logits are compared at once


@dataclass(frozen=True)
class Answer:
    """Attributes:
    tokens: ids [length] of the prompt and the dense model's answer.
    start: place of the answer's first token.
    hidden: what the dense model's head reads where it predicts the answer's tokens, [answer tokens, hidden_size].
    """

    tokens: torch.Tensor
    start: int
    hidden: torch.Tensor


@dataclass(frozen=True)
class Reference:
    """What the dense model answers.

    Attributes:
        model: has the head of the dense model, whatever becomes of its other weights.
        device: where models compute.
        answers: on the CPU.
    """

    model: Any
    device: torch.device
    answers: list[Answer]

    @classmethod
    def of(
        cls,
        dense: DenseModel,
        num_prompts: int,
        tell: Callable[[str], None],
        show_progress: bool = True,
    ) -> "Reference | None":
        """Lets the dense model answer the first `num_prompts` of AGREEMENT_PROMPTS.

        None without prompts, and, after a word to `tell`, where its tokenizer or its positions do not allow it.
        """
        if not num_prompts:
            return None
        try:
            prompts = prompt_tokens(dense.tokenizer, AGREEMENT_PROMPTS[:num_prompts])
            largest = max(map(max, prompts))
            if largest >= (known := dense.model.get_input_embeddings().num_embeddings):
                raise InputError(f"the tokenizer makes token {largest}, and the model has {known} embeddings")
            bar = progress_bar(total=len(prompts), desc="dense answers", unit="answer", disable=not show_progress)
            end, texts = end_tokens(dense.directory, dense.tokenizer), []
            with bar:
                for first in range(0, len(prompts), WRITTEN_AT_ONCE):
                    part = prompts[first : first + WRITTEN_AT_ONCE]
                    texts += generate(dense.model, part, ANSWER_TOKENS, end, device=dense.device)
                    bar.update(len(texts) - bar.n)
        except InputError as error:
            tell(f"Agreement with the dense model is not measured: {error}")
            return None
        whole = [torch.tensor([*prompt, *answer]) for prompt, answer in zip(prompts, texts, strict=True)]
        starts = [len(prompt) for prompt in prompts]
        hidden = _hidden_where_predicted(dense.model, dense.device, whole, starts)
        return cls(dense.model, dense.device, [Answer(*parts) for parts in zip(whole, starts, hidden, strict=True)])

    @torch.no_grad()
    def agreement(self, model: Any) -> dict[str, float]:
        """Figures of a pruned model with the same tokens; see the top of this file. It may be `self.model`, masked."""
        tokens, starts = [answer.tokens for answer in self.answers], [answer.start for answer in self.answers]
        found = _hidden_where_predicted(model, self.device, tokens, starts)
        divergence, same, length = 0.0, 0, 0
        for answer, hidden in zip(self.answers, found, strict=True):
            agrees = []
            for ours, theirs in zip(hidden.split(CHUNK), answer.hidden.split(CHUNK), strict=True):
                dense = logits_of(self.model, theirs.to(self.device)).log_softmax(-1)
                pruned = logits_of(model, ours.to(self.device)).log_softmax(-1)
                divergence += F.kl_div(pruned, dense, reduction="sum", log_target=True).item()
                agrees.append(pruned.argmax(-1) == dense.argmax(-1))
            same += int(torch.cat(agrees).long().cumprod(0).sum())
            length += len(answer.hidden)
        return {
            "agreement_kl": divergence / length,
            "agreement_tokens": same / len(self.answers),
            "answer_tokens": length / len(self.answers),
        }


@torch.no_grad()
def _hidden_where_predicted(
    model: Any, device: torch.device, tokens: list[torch.Tensor], starts: list[int]
) -> list[torch.Tensor]:
    """What the head reads where the tokens from `start` on are predicted, [tokens of the answer, hidden_size] each."""
    found = []
    for first in range(0, len(tokens), BATCH_SIZE):
        part = tokens[first : first + BATCH_SIZE]
        # Padded on the right, where a causal model does not look from before; what stands there is not read.
        batch = torch.nn.utils.rnn.pad_sequence(part, batch_first=True).to(device)
        read = run_without_head(model, batch).last_hidden_state
        for hidden, ids, start in zip(read, part, starts[first:], strict=False):
            found.append(hidden[start - 1 : len(ids) - 1].cpu())
    return found

"""What a server is asked through the OpenAI client to learn how well it predicts text."""

import math

from learner.model.perplexity import EVAL_BLOCK_SIZE


def served_perplexity(client, name: str, token_ids: list[int]) -> float:
    """Perplexity by the server's prompt log-probabilities, over the blocks that `learn-masks --eval-data` scores.

    Args:
        client: an `openai.OpenAI`.
        name: of the served model.
        token_ids: the text.
    """
    starts = range(0, len(token_ids) - EVAL_BLOCK_SIZE + 1, EVAL_BLOCK_SIZE)
    blocks = [token_ids[start : start + EVAL_BLOCK_SIZE] for start in starts]
    total = count = 0
    for start in range(0, len(blocks), 16):
        answer = client.completions.create(
            model=name, prompt=blocks[start : start + 16], max_tokens=1, extra_body={"prompt_logprobs": 0}
        )
        for choice, block in zip(answer.choices, blocks[start : start + 16], strict=True):
            scores = choice.prompt_logprobs[1:]
            total -= sum(score[str(token)]["logprob"] for score, token in zip(scores, block[1:], strict=True))
            count += len(scores)
    return math.exp(total / count)

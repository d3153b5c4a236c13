"""A pruned reranker: the recipe that the refusal of Qwen3ForSequenceClassification names gives exact scores."""

import pytest
from helpers.serving import GEOMETRIES, engine
from helpers.tiny import byte_tokenizer, converted, oracle, prompts

NO, YES = "n", "y"


@pytest.mark.slow
def test_scores_are_those_of_the_masked_model(tmp_path):
    """A score is the probability of "yes" among the two answers after the prompt."""
    geometry = GEOMETRIES["qwen3 uneven groups"]
    model, masks = geometry.model_and_masks()
    directory = converted(tmp_path, model, masks, geometry.site)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(directory)
    answers = tokenizer.convert_tokens_to_ids([NO, YES])
    overrides = {"method": "from_2_way_softmax", "classifier_from_token": [NO, YES]}
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts()]
    with engine(directory, convert="classify", hf_overrides=overrides, skip_tokenizer_init=False) as llm:
        scores = [output.outputs.probs for output in llm.classify(inputs, use_tqdm=False)]
    for prompt, (score,) in zip(prompts(), scores, strict=True):
        log_probabilities = oracle(model, masks, geometry.site, prompt, [0])[1][-1, answers]
        assert abs(score - log_probabilities.softmax(-1)[1].item()) < 1e-4

"""A chat template for tokenizers of tests."""

from transformers import PreTrainedTokenizerBase

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}~{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def with_template(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = TEMPLATE
    return tokenizer

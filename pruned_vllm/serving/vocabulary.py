"""A vocabulary that any number of tensor-parallel ranks can share.

vLLM pads the vocabulary to a multiple of 64 and gives every rank an equal part; three ranks cannot share 64. Its layers
take another padding as an argument, but the classes that build them do not pass one on. So the layers are built anew.
"""

import math

from vllm.config import VllmConfig
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    VocabParallelEmbedding,
    pad_vocab_size,
)
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import maybe_prefix


def is_shared_evenly(vocab_size: int, tensor_parallel_size: int) -> bool:
    """Whether vLLM's own padding makes the vocabulary divisible by the ranks."""
    return pad_vocab_size(vocab_size) % tensor_parallel_size == 0


def padding_size(tensor_parallel_size: int) -> int:
    """What the vocabulary is padded to a multiple of where vLLM's own padding does not do."""
    return math.lcm(DEFAULT_VOCAB_PADDING_SIZE, tensor_parallel_size)


def build_vocabulary(model: LlamaForCausalLM, vllm_config: VllmConfig, prefix: str) -> None:
    """Gives `model` an embedding, an lm_head and a logits processor for all its tokens.

    Rows of padding are zeros, and both ways of sampling leave them out: the gathered logits are cut to the real
    vocabulary, the local argmax masks them.
    """
    config, quant_config = model.config, vllm_config.quant_config
    sizes = (config.vocab_size, config.hidden_size)
    multiple = padding_size(vllm_config.parallel_config.tensor_parallel_size)
    model.model.vocab_size = config.vocab_size
    if isinstance(model.model.embed_tokens, VocabParallelEmbedding):  # not on another pipeline stage
        model.model.embed_tokens = VocabParallelEmbedding(*sizes, padding_size=multiple, quant_config=quant_config)
    if isinstance(model.lm_head, ParallelLMHead):
        lm_head_prefix = maybe_prefix(prefix, "lm_head")
        model.lm_head = ParallelLMHead(*sizes, padding_size=multiple, quant_config=quant_config, prefix=lm_head_prefix)
        if config.tie_word_embeddings:
            model.lm_head = model.lm_head.tie_weights(model.model.embed_tokens)
        stock = model.logits_processor
        model.logits_processor = LogitsProcessor(config.vocab_size, scale=stock.scale, soft_cap=stock.soft_cap)

"""Served classes of which one tensor-parallel rank fails, and an engine of two ranks with one of them.

python tests/helpers/failing.py MODEL CLASS     # exits with code 0 only if nothing failed
"""

import sys

from vllm import LLM, SamplingParams
from vllm.distributed import get_tensor_model_parallel_rank

from pruned_vllm.serving.models import PrunedLlamaForCausalLM

ERROR = "no memory left on rank 1"


def fail_on_rank_1(*args, **kwargs) -> None:
    if get_tensor_model_parallel_rank() == 1:
        raise MemoryError(ERROR)


class FailsToBeBuilt(PrunedLlamaForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        fail_on_rank_1()
        super().__init__(vllm_config=vllm_config, prefix=prefix)


class FailsToLoad(PrunedLlamaForCausalLM):
    def load_weights(self, weights):
        fail_on_rank_1()
        return super().load_weights(weights)


class FailsToRun(PrunedLlamaForCausalLM):
    """As it would in the run that measures how much memory is left, between two collectives."""

    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.model.layers[1].mlp.register_forward_pre_hook(fail_on_rank_1)


class FailsToComputeLogits(PrunedLlamaForCausalLM):
    def __init__(self, *, vllm_config, prefix=""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.logits_processor.register_forward_pre_hook(fail_on_rank_1)


def main(model: str, class_name: str) -> None:
    classes = {"PrunedLlamaForCausalLM": f"helpers.failing:{class_name}"}
    options = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True, "max_model_len": 128}
    llm = LLM(model, tensor_parallel_size=2, model_class_overrides=classes, **options)
    llm.generate({"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=2, detokenize=False))


if __name__ == "__main__":
    main(*sys.argv[1:])

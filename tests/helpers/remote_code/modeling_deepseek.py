"""The model class that a checkpoint of DeepSeekMoE-16B brings: tests/helpers/deepseek.py, called as for Transformers 4.

Like the published code it imports what Transformers 5 lacks, takes any `rope_scaling` for scaled, and makes a cache of
a kind that is gone, unless told not to.
"""

from transformers import DynamicCache
from transformers.utils.import_utils import is_torch_fx_available

from .configuration_deepseek import DeepseekConfig
from .deepseek import DeepseekForCausalLM as Reference
from .deepseek import DeepseekModel as ReferenceModel

assert is_torch_fx_available()


class DeepseekModel(ReferenceModel):
    def __init__(self, geometry, config):
        super().__init__(geometry, config)
        self.config = config

    def forward(self, input_ids, use_cache=None, **options):
        if self.config.use_cache if use_cache is None else use_cache:
            DynamicCache.from_legacy_cache(None)
        return super().forward(input_ids, **options)


class DeepseekForCausalLM(Reference):
    config_class = DeepseekConfig
    decoder_class = DeepseekModel

    def __init__(self, config):
        super().__init__(config)
        if config.rope_scaling is not None:
            raise NotImplementedError(f"scaling of type {config.rope_scaling['type']}")

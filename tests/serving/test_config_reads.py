"""Which keys of config.json the installed Transformers and vLLM read, against the rows of `agreement.py`.

A key that one of them begins to read, or reads with another default, fails these tests until it has a row.
"""

import functools
import importlib
from dataclasses import fields

import pytest
import transformers
from helpers import deepseek
from helpers.config_reads import REQUIRED, Reads, reads
from helpers.tiny import MOE_CONFIGS, tiny_model
from huggingface_hub.errors import StrictDataclassError
from transformers import cache_utils, masking_utils, modeling_rope_utils
from vllm.config import model as model_config
from vllm.engine import arg_utils
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.models.qwen3_next import Qwen3NextForCausalLM
from vllm.model_executor.models.registry import ModelRegistry
from vllm.transformers_utils import config as config_reading
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.v1.worker import gpu_model_runner

from pruned_vllm.formats.agreement import ROPE, ROWS, rows_of
from pruned_vllm.formats.families import FAMILIES
from pruned_vllm.formats.family import Family
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.serving import models
from pruned_vllm.serving.ragged_moe import MoEBlock

ENGINE = (
    "config.vllm",
    "model_executor.layers.attention.attention",
    "model_executor.layers.fused_moe.config",
    "model_executor.layers.logits_processor",
    "model_executor.model_loader.utils",
    "model_executor.model_loader.weight_utils",
    "platforms.cpu",
    "v1.attention.backends.cpu_attn",
    "v1.attention.backends.fa_utils",
    "v1.attention.backends.flash_attn",
    "v1.attention.selector",
    "v1.core.kv_cache_utils",
    "v1.worker.gpu.attn_utils",
    "v1.worker.gpu.model_runner",
)
VLLM_MODELS = (
    "vllm.model_executor.models",
    "vllm.model_executor.layers.mamba.gdn",
    "vllm.model_executor.layers.rotary_embedding",
)


def merged(*parts: Reads) -> Reads:
    return {key: set().union(*(part.get(key, ()) for part in parts)) for part in parts for key in part}


@functools.cache
def engine_reads() -> Reads:
    """What vLLM reads whatever the model's class is."""
    about_the_model = [model_config, config_reading, arg_utils, gpu_model_runner, ModelArchConfigConvertorBase]
    modules = [importlib.import_module(f"vllm.{name}") for name in ENGINE]
    return merged(
        reads([*about_the_model, rotary_embedding.get_rope]),
        reads(modules, configs={"hf_config", "hf_text_config"}),  # `config` is vLLM's own configuration there
    )


@functools.cache
def served_reads(family: Family) -> Reads:
    """What the plugin's class of a family reads, and vLLM's classes that it is built of."""
    return merged(
        reads([getattr(models, family.pruned_architecture)], ("pruned_vllm.serving", *VLLM_MODELS)),
        layer_reads(family),
        engine_reads(),
    )


def layer_reads(family: Family) -> Reads:
    """A stock decoder layer reads most of what its attention is built with."""
    _, layer = models.served(family.model_type)
    return reads([layer], ("pruned_vllm.serving", *VLLM_MODELS), follow_defaults=isinstance(layer, type))


@functools.cache
def stock_reads(family: Family) -> Reads:
    if family.architecture.startswith("Qwen3_5"):  # what its own file, which imports torchvision, is made of
        stock_class = Qwen3NextForCausalLM
    else:
        stock_class = ModelRegistry._try_load_model_cls(family.architecture)
    return merged(reads([stock_class], VLLM_MODELS, follow_defaults=True), engine_reads())


@functools.cache
def hugging_face_reads(family: Family) -> Reads:
    """What the model of a family reads, without what it shares with other families."""
    if family.model_type == "deepseek":  # the published code reads what the published config class has
        published = {key: {REQUIRED} for key in deepseek.DeepseekConfig.__annotations__}
        return merged(published, reads([deepseek], ("helpers",)))
    model = getattr(transformers, family.architecture)
    angles = [modeling_rope_utils.RotaryEmbeddingConfigMixin, *modeling_rope_utils.ROPE_INIT_FUNCTIONS.values()]
    return merged(reads([model], (model.__module__,)), reads([model.config_class, *angles]))


def declared(family: Family) -> set[str]:
    """Keys whose default both sides take from the config class."""
    return {field.name for field in fields(config_class(family))}


def config_class(family: Family) -> type:
    if family.model_type == "deepseek":
        return deepseek.DeepseekConfig
    return getattr(transformers, family.architecture).config_class


def one_sided(family: Family, hugging_face: Reads, vllm: Reads) -> dict[str, str]:
    """Keys that one side reads alone or with another default; what was found about each."""
    found = {}
    for key in sorted(hugging_face.keys() | vllm.keys()):
        if key not in vllm:
            found[key] = f"only Transformers reads it, default {sorted(hugging_face[key])}"
        elif key not in hugging_face:
            found[key] = f"only vLLM reads it, default {sorted(vllm[key])}"
        elif key not in declared(family) and hugging_face[key] != vllm[key]:
            found[key] = f"defaults: Transformers {sorted(hugging_face[key])}, vLLM {sorted(vllm[key])}"
    return found


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("vllm_reads", [served_reads, stock_reads])
def test_every_key_that_is_not_read_alike_has_a_row(family, vllm_reads):
    found = one_sided(family, hugging_face_reads(family), vllm_reads(family))
    missing = [f"{key}: {what}" for key, what in found.items() if key not in rows_of(family)]
    assert not missing, "\n".join([f"{family.model_type}: decide in pruned_vllm/formats/agreement.py", *missing])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_key_that_hugging_face_reads_for_all_models_has_a_row(family):
    """Masks and KV caches are the same code for all models."""
    shared = reads([masking_utils, cache_utils])
    assert shared.keys() - hugging_face_reads(family).keys() <= rows_of(family).keys()


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_key_of_a_part_of_hugging_faces_model_has_a_row(family):
    """One part may have a fixed number or function where other parts of the model read the key."""
    if family.model_type == "deepseek":
        module, prefix, experts = deepseek, "", "MoE"
    else:
        module = importlib.import_module(getattr(transformers, family.architecture).__module__)
        prefix = family.architecture.removesuffix("ForCausalLM")
        blocks = ("SparseMoeBlock", "MoE", "Moe")
        experts = next((name for name in blocks if hasattr(module, prefix + name)), "")
    parts = [(reads([getattr(module, f"{prefix}Attention")]), layer_reads(family))]
    if family.experts is not None:
        served = reads([MoEBlock], ("pruned_vllm.serving", *VLLM_MODELS))
        block = getattr(module, prefix + experts, None) or getattr(module, f"{prefix}MLP")
        parts.append((reads([block], (module.__name__,)), served))
    for hugging_face, vllm in parts:
        assert hugging_face.keys() - vllm.keys() <= rows_of(family).keys()


@pytest.mark.parametrize(
    ("model_type", "vllm_reads", "key"),
    [
        ("llama", served_reads, "sliding_window"),
        ("llama", stock_reads, "sliding_window"),
        ("llama", served_reads, "logit_scale"),
        ("mistral", served_reads, "llama_4_scaling"),
        ("mixtral", stock_reads, "hidden_act"),
        ("olmoe", stock_reads, "rms_norm_eps"),
        ("olmoe", served_reads, "clip_qkv"),
        ("deepseek", served_reads, "scoring_func"),
        ("qwen2", served_reads, f"{ROPE}rope_dim"),
    ],
)
def test_the_keys_that_are_known_to_be_read_on_one_side_are_found(model_type, vllm_reads, key):
    family = FAMILIES[model_type]
    assert key in one_sided(family, hugging_face_reads(family), vllm_reads(family))


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_what_is_dropped_is_nothing_to_hugging_face(family):
    dropped = {key for key, row in rows_of(family).items() if row.action == "dropped"}
    assert not dropped & hugging_face_reads(family).keys()


def test_every_row_is_about_a_key_that_somebody_reads():
    for row in ROWS:
        families = [family for family in FAMILIES.values() if row.holds_for(family)]
        known = reads([masking_utils, cache_utils]).keys() | set().union(
            *(side(family) for family in families for side in (hugging_face_reads, served_reads, stock_reads)),
            *(declared(family) for family in families),
        )
        assert set(row.keys.split()) <= known, f"nobody reads {set(row.keys.split()) - known}"
    for family in FAMILIES.values():
        keys = [key for row in ROWS if row.holds_for(family) for key in row.keys.split()]
        assert len(keys) == len(set(keys)), f"{family.model_type}: two rows for a key"


def example(config, rope_parameters, self):
    names = ["a", "b"]
    first = getattr(config, "layer_types", None) or self.hf_config.sliding_window
    second = {k: v for k, v in rope_parameters.items() if k in ("mscale", "truncate")}
    config.written = rope_parameters.get("rope_dim", 1.0) + rope_parameters["factor"]
    return first, second, "alpha" in rope_parameters, config.to_dict(), hasattr(config, names)


def test_the_walk_sees_how_code_reads_a_config():
    assert reads([example]) == {
        "layer_types": {"None"},
        "sliding_window": {REQUIRED},
        "a": {"absent"},
        "b": {"absent"},
        f"{ROPE}mscale": {"absent"},
        f"{ROPE}truncate": {"absent"},
        f"{ROPE}rope_dim": {"1.0"},
        f"{ROPE}factor": {REQUIRED},
        f"{ROPE}alpha": {"absent"},
    }


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_geometry_has_the_defaults_of_the_config_class(family):
    """Without any one key, ModelGeometry reads what the config class fills in, or asks for the key."""
    model_type = family.model_type
    full = tiny_model(model_type, 6, 6 if model_type == "olmoe" else 3, 40, **MOE_CONFIGS.get(model_type, {})).config
    full = full.to_dict() | {"architectures": [family.architecture]}
    for key in full.keys() - {"model_type", "architectures"}:
        config = {name: value for name, value in full.items() if name != key}
        try:
            expected = ModelGeometry.from_config(config_class(family)(**config).to_dict())
            geometry = ModelGeometry.from_config(config)
        except (ValueError, StrictDataclassError):  # either asks for it
            continue
        assert geometry == expected, key

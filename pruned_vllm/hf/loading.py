"""Loads a converted model into Transformers, e.g. to fine-tune it: the stock class with every layer at its real size.

    model = load_pruned("out/", dtype="bfloat16", device_map="auto")
    ...                                 # train it, or peft.get_peft_model(model, ...)
    model.save_pretrained("tuned/")     # again a converted model: `vllm serve tuned/` and load_pruned("tuned/") read it

A model that quantize-pruned or llm-compressor quantized is loaded by Transformers' integration of compressed-tensors:
weights are widened in the first forward pass, or at once with
`quantization_config=CompressedTensorsConfig(dequantize=True)` of Transformers, which training needs.

Needs torch and transformers, not vllm.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from pruned_vllm.common.errors import InputError
from pruned_vllm.common.files import read_json
from pruned_vllm.formats.config import read_config
from pruned_vllm.formats.family import PRUNED_PREFIX
from pruned_vllm.formats.geometry import ModelGeometry
from pruned_vllm.formats.headers import StoredTensor, count_problems, read_headers
from pruned_vllm.formats.quantization import COMPRESSED_TENSORS, Quantization, WeightScheme
from pruned_vllm.formats.quantized_tensors import linear_scheme
from pruned_vllm.formats.tensor_check import TensorCheck
from pruned_vllm.hf.classes import pruned_class


def load_pruned(directory: str | Path, **from_pretrained_kwargs) -> PreTrainedModel:
    """Loads the model in `directory`, which convert-pruned or `save_pretrained` wrote.

    Args:
        from_pretrained_kwargs: dtype, device_map, attn_implementation ..., as for `from_pretrained`.

    Returns:
        a subclass of the stock class (`PrunedLlamaForCausalLM` of `LlamaForCausalLM`); a conversion that came out as a
        stock model is what `AutoModelForCausalLM` makes of it.

    Raises:
        InputError: config.json is missing or describes no pruned model, Transformers lacks its architecture, the
            weights are not in safetensors files that all readers agree on, or tensors do not fit config.json; every one
            is listed. The weights are quantized in a way that Transformers does not read.
    """
    config = read_config(Path(directory))
    geometry = ModelGeometry.from_config(config)
    tensors = read_headers(Path(directory))  # what this accepts, Transformers reads in the same way
    if problems := count_problems(tensors, geometry):
        raise InputError(f"The tensors in {directory} do not fit its config.json:", problems)
    _check_quantized(directory, config, geometry, tensors)
    names = config.get("architectures", ())
    if "per_layer_config" in config or any(name.startswith(PRUNED_PREFIX) for name in names):
        model_class = pruned_class(geometry.family)
    else:
        model_class = transformers.AutoModelForCausalLM
    # Mismatches are "ignored" only to learn of all of them: otherwise the first stage that finds one raises.
    options = {**from_pretrained_kwargs, "use_safetensors": True}
    if config != read_json(Path(directory) / "config.json"):  # Transformers refuses some keys that are null
        options.setdefault("config", transformers.CONFIG_MAPPING[geometry.family.model_type].from_dict(config))
    model, info = model_class.from_pretrained(
        directory, **options, output_loading_info=True, ignore_mismatched_sizes=True
    )
    if problems := _loading_problems(info):
        raise InputError(
            f"The tensors in {directory} do not fit its config.json; nothing was loaded. Convert the model again with "
            "convert-pruned, or restore the config.json that belongs to them:",
            problems,
        )
    if "quantization_config" in config:
        _unify_dtypes(model)
    return model


def _unify_dtypes(model: PreTrainedModel) -> None:
    """Gives all weights of 16 bits and more one dtype.

    In a quantized model Transformers leaves those that it renames (Mixtral's) in the dtype of the file.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype.itemsize > 1:
            parameter.data = parameter.data.to(model.dtype)


def _check_quantized(
    directory: str | Path, config: Mapping[str, Any], geometry: ModelGeometry, tensors: Mapping[str, StoredTensor]
) -> None:
    """Refuses quantized tensors that Transformers would leave out, or take for others."""
    quantization = Quantization.from_config(config)
    if quantization is None:
        return
    if quantization.method != COMPRESSED_TENSORS:
        raise InputError(
            f"{directory} is quantized by {quantization.method}; load_pruned reads the format of compressed-tensors "
            "alone: load the pruned model before it was quantized, or serve this one with vLLM"
        )
    check = TensorCheck(geometry, quantization)
    for name, tensor in tensors.items():
        check.accepts(name, tensor.shape, tensor.dtype)
    check.finish(str(directory))
    if modules := check.unjudged:
        scheme = linear_scheme(geometry, quantization, modules[0])
        raise InputError(
            f"{directory}: {len(modules)} linear layers, {modules[0]} first, are quantized as {scheme}, which "
            "load_pruned does not know; load the pruned model before it was quantized, or serve this one with vLLM"
        )
    if problems := list(_parted_groups(geometry, quantization)):
        raise InputError(
            f"{directory} has groups that end inside of a layer, which compressed-tensors cannot widen; load the "
            "pruned model before it was quantized, or serve this one with vLLM (quantize-pruned pads to whole groups):",
            problems,
        )


def _parted_groups(geometry: ModelGeometry, quantization: Quantization) -> Iterator[str]:
    """A sentence for each linear layer whose inputs its groups do not divide."""
    for name, shape in geometry.tensor_shapes().items():
        module, _, part = name.rpartition(".")
        if part != "weight" or len(shape) != 2:
            continue
        scheme = linear_scheme(geometry, quantization, module)
        if isinstance(scheme, WeightScheme) and scheme.group_size and shape[1] % scheme.group_size:
            yield f"{module}: {shape[1]} inputs in groups of {scheme.group_size}"


def _loading_problems(info: Mapping[str, Any]) -> list[str]:
    """What Transformers only warns of, and fills with random numbers."""
    return [
        *(f"{name}: missing" for name in sorted(info["missing_keys"])),
        *(f"{name}: not a tensor of this model" for name in sorted(info["unexpected_keys"])),
        *(
            f"{name}: the file has {list(found)}, config.json says {list(expected)}"
            for name, found, expected in sorted(info["mismatched_keys"])
        ),
    ]

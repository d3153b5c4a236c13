"""Pruned models with quantized weights: each scheme on each kind of model is served, or refused with a sentence.

Served ones are held to a float32 model of Hugging Face with the same rounded weights, and with rounded inputs where the
scheme asks for that. `pruned_vllm/serving/QUANTIZATION.md` shows the same table to users.
"""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.compressed import SCHEMES, Scheme, to_bfloat16, write_quantized
from helpers.emulation import differences, emulated_differences, log_probabilities
from helpers.serving import MHA, ODD, UNEVEN, Geometry, engine, generate
from helpers.tiny import converted, expert_masks, masks_for, tiny_model
from vllm.engine.arg_utils import EngineArgs

from pruned_vllm.hf import load_pruned
from pruned_vllm.serving import quantization

HAS_AVX512 = torch.cpu._is_avx512_supported()
HAS_VNNI = torch.cpu._is_vnni_supported()
EXPERTS = [[17, 9, 24, 5], [1, 0, 3, 4], [24, 23, 1, 12]]
HEADS = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]
MODELS = {
    "dense Llama": Geometry(((2, 2, 2),) * 3, (96,) * 3, group=2),
    "uneven GQA": Geometry(UNEVEN, (64, 32, 96), group=4),
    "odd widths": Geometry(MHA, ODD),
    "ragged MoE": None,
}
SERVED = "served"
OF_32 = "supported sizes are multiples of 32"
NO_EXPERTS = "change experts alone, and this model has none"
NOT_ON_CPU = "vLLM's CPU build cannot compute layers that are quantized so"
NOT_REACHED = "does not reach experts of different widths"
EIGHT_BITS = "Quant type (uint8b128) not supported"
NO_AVX512 = "its kernel for 4 bits needs AVX-512, which this machine has not"
ALL = dict.fromkeys(MODELS, SERVED)
EXPERTS_ALONE = dict.fromkeys(MODELS, NO_EXPERTS) | {"ragged MoE": SERVED}
PACKED = ALL | {"odd widths": OF_32}

# What becomes of a model: SERVED, or what the refusal says. Schemes of checkpoints, then of `--quantization`.
FROM_DISK = {
    "fp8-dynamic": ALL,
    "w8a8-int8": ALL,
    "w8a16": dict.fromkeys(MODELS, EIGHT_BITS),
    "w4a16": PACKED,
    "w4a16 in groups of 32": PACKED,
    "w8a8-int8 with stored scales of inputs": ALL | {"ragged MoE": NOT_REACHED},
    "w4a16 with zero points": PACKED | {"ragged MoE": NOT_REACHED},
    "gptq": PACKED | {"ragged MoE": NOT_REACHED},
    "awq": PACKED | {"ragged MoE": NOT_REACHED},
}
ONLINE = {
    "fp8_per_channel": ALL,
    "int8_per_channel_weight_only": EXPERTS_ALONE,
    "experts_int8": EXPERTS_ALONE,
    **{
        name: dict.fromkeys(MODELS, NOT_ON_CPU) | {"ragged MoE": NOT_REACHED}
        for name in ("fp8_per_tensor", "fp8_per_block", "mxfp8", "mxfp4")
    },
}
# What the schemes of `--quantization` round weights to, and which layers.
OTHERS = (r"re:.*self_attn\.",)
AS_ON_DISK = {
    "fp8_per_channel": SCHEMES["fp8-dynamic"],
    "int8_per_channel_weight_only": replace(SCHEMES["w8a8-int8"], ignore=OTHERS),
    "experts_int8": replace(SCHEMES["w8a8-int8"], ignore=OTHERS),
}
# What one model shows for another.
SLOW = [("dense Llama", scheme) for scheme in (*FROM_DISK, *ONLINE)] + [
    ("uneven GQA", "w8a8-int8"),
    ("uneven GQA", "w8a8-int8 with stored scales of inputs"),
    ("uneven GQA", "gptq"),
    ("uneven GQA", "fp8_per_channel"),
    ("odd widths", "fp8-dynamic"),
    ("odd widths", "fp8_per_channel"),
    ("uneven GQA", "w4a16"),
    ("ragged MoE", "w4a16"),
    ("odd widths", "w8a8-int8 with stored scales of inputs"),
    ("ragged MoE", "experts_int8"),
]

# Median and mean |difference of log-probabilities|, by the dtype of the engine. In float32 both sides add up the same
# products: to some 1e-6. Where inputs are rounded, one that lies between two numbers may fall to the other side, and
# what comes after differs by that: seldom, but then by a hundredth or a tenth. float16 has 10 bits, float32 has 23.
TOLERANCES = {"float32": (1e-4, 0.01), "float16": (0.01, 0.02)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Converted models in bfloat16, by name; all under the plugin's classes."""
    directories = {}
    for name, geometry in MODELS.items():
        root = tmp_path_factory.mktemp("models")
        if geometry is None:
            model = tiny_model("qwen3_moe", 6, 3, 24)
            masks = expert_masks(model, EXPERTS) | masks_for(HEADS, [])
            directory = converted(root, model, masks, drop_empty_experts=True)  # one, so that a layer has three
        else:
            directory = converted(root, *geometry.model_and_masks())
        config = json.loads((directory / "config.json").read_text())
        if not config["architectures"][0].startswith("Pruned"):
            config["architectures"] = ["Pruned" + config["architectures"][0]]
            (directory / "config.json").write_text(json.dumps(config))
        directories[name] = to_bfloat16(directory)
    return directories


@pytest.fixture(scope="module")
def quantized(models, tmp_path_factory):
    """Writes the checkpoint of a scheme, once."""
    written = {}

    def write(name: str, scheme: str):
        if (name, scheme) not in written:
            target = tmp_path_factory.mktemp("quantized")
            written[name, scheme] = write_quantized(models[name], target, SCHEMES[scheme], 127 if HAS_VNNI else 63)
        return written[name, scheme]

    return write


def refusal(directory: Path, **options) -> str:
    with pytest.raises(ValueError) as error:
        EngineArgs(str(directory), max_model_len=128, skip_tokenizer_init=True, **options).create_engine_config()
    return str(error.value)


def cells(table: dict[str, dict[str, str]], served: bool) -> list:
    return [
        pytest.param(scheme, model, verdict, id=f"{scheme}, {model}",
                     marks=[pytest.mark.slow] * (served and (model, scheme) in SLOW))
        for scheme, row in table.items()
        for model, verdict in row.items()
        if (verdict == SERVED) == served
    ]  # fmt: skip


def assert_serves_the_emulation(directory: Path, widened: Path, plain: Path, scheme: Scheme, **options) -> None:
    """The served model is the one with rounded weights and inputs, far closer than to the plain one."""
    with engine(directory, **options) as llm:
        outputs = generate(llm)
    found = emulated_differences(outputs, load_pruned(widened, dtype=torch.float32), scheme)
    model = load_pruned(plain, dtype=torch.float32)
    rounding = differences(outputs, lambda tokens: log_probabilities(model, tokens))
    median, mean = TOLERANCES[options["dtype"]]
    assert found.median() < median and found.mean() < mean, f"median {found.median():.6f}, mean {found.mean():.5f}"
    assert found.mean() < rounding.mean() / 3, (
        f"{found.mean():.4f} to the emulation, {rounding.mean():.4f} to the plain model"
    )


@pytest.mark.parametrize(("scheme", "model", "verdict"), cells(FROM_DISK, served=False))
def test_refused_from_disk(quantized, scheme, model, verdict):
    sentence = NO_AVX512 if verdict == OF_32 and not HAS_AVX512 else verdict
    assert sentence in refusal(quantized(model, scheme).directory)


@pytest.mark.parametrize(("scheme", "model", "verdict"), cells(ONLINE, served=False))
def test_refused_online(models, scheme, model, verdict):
    assert verdict in refusal(models[model], quantization=scheme)


@pytest.mark.parametrize(("scheme", "model", "verdict"), cells(FROM_DISK, served=True))
def test_served_from_disk(models, quantized, scheme, model, verdict):
    has_4_bits = SCHEMES[scheme].num_bits == 4
    written, dtype = quantized(model, scheme), "float16" if has_4_bits else "float32"
    if has_4_bits and not HAS_AVX512:
        assert NO_AVX512 in refusal(written.directory)
        return
    assert_serves_the_emulation(written.directory, written.widened, models[model], SCHEMES[scheme], dtype=dtype)


@pytest.mark.parametrize(("scheme", "model", "verdict"), cells(ONLINE, served=True))
def test_served_online(models, tmp_path, scheme, model, verdict):
    """What is rounded while it is loaded is what a checkpoint with the same rounded weights has."""
    stored = write_quantized(models[model], tmp_path, AS_ON_DISK[scheme])
    outputs = []
    for directory, options in ((models[model], {"quantization": scheme}), (stored.directory, {})):
        with engine(directory, dtype="bfloat16", **options) as llm:
            outputs.append(generate(llm))
    found = []
    for online, from_disk in zip(*outputs, strict=True):
        assert online.outputs[0].token_ids == from_disk.outputs[0].token_ids
        for here, there in zip(logprobs_of(online), logprobs_of(from_disk), strict=True):
            found += [abs(entry.logprob - there[token].logprob) for token, entry in here.items() if token in there]
    # Nothing but the order in which products are added up, should an engine put requests together differently.
    assert len(found) > 100 and sorted(found)[len(found) // 2] < 1e-5 and sum(found) / len(found) < 1e-3


def test_experts_with_biases_served_from_disk(tmp_path):
    """gpt-oss: biases are added to products of quantized weights, and stay as they are."""
    model = tiny_model("gpt_oss", 6, 3, 24)
    directory = to_bfloat16(converted(tmp_path, model, expert_masks(model, EXPERTS) | masks_for(HEADS, [])))
    scheme = SCHEMES["fp8-dynamic"]
    written = write_quantized(directory, tmp_path, scheme)
    assert_serves_the_emulation(written.directory, written.widened, directory, scheme, dtype="float32")


def logprobs_of(output) -> list:
    return [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]


# The document.

DOCUMENT = Path(quantization.__file__).with_name("QUANTIZATION.md").read_text()


def rows() -> dict[str, dict[str, str]]:
    """The cells of the document's tables, by what is in backticks in the first column, and model."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", DOCUMENT, flags=re.MULTILINE):
        header, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
        if set(MODELS) <= set(header):
            for name, *cells in lines:
                for scheme in re.findall(r"`([^`]+)`", name):
                    found[scheme] = dict(zip(header[1:], cells, strict=True))
    return found


def test_the_document_has_this_table():
    expected = {scheme: {name: verdict == SERVED for name, verdict in row.items()}
                for scheme, row in (FROM_DISK | ONLINE).items()}  # fmt: skip
    found = {scheme: {name: cells[name].startswith("served") for name in MODELS} for scheme, cells in rows().items()}
    assert found == expected
    for scheme, cells in rows().items():
        for cell in cells.values():
            assert cell.startswith(("served", "refused")), f"{scheme}: {cell}"

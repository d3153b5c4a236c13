"""The sizes of layers in `block_configs` of config.json, as NVIDIA's Puzzletron and Nemotron-NAS write them.

    "block_configs": [{"attention": {"n_heads_in_group": 8}, "ffn": {"ffn_mult": 2.625}},                 # DeciLM
                      {"attention": {"n_heads_in_group": 8}, "ffn": {"intermediate_size": 14336}},       # newer
                      {"attention": {"num_key_value_heads": 4}, "ffn": {"intermediate_size": 14336}},     # AnyModel
                      {"attention": {"no_op": true}, "ffn": {"no_op": true}}]

The number of query heads and head_dim are the same in all layers. `ffn_mult` m stands for the multiple of 256 from
2 m hidden_size / 3 on. (Model-Optimizer, puzzletron/block_config.py; modeling_decilm.py of the Nemotron models.)
"""

from collections.abc import Mapping
from typing import Any

from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.config_values import LARGEST_COUNT, LARGEST_SIZE, positive, shown
from pruned_vllm.formats.families import find_family
from pruned_vllm.formats.layer import LayerGeometry

# Keys of a block that say sizes, or nothing that changes what is computed. Any other must be absent, null or false.
_KNOWN = {
    "attention": {"no_op", "num_key_value_heads", "n_heads_in_group", "weights_precision"},
    "ffn": {"no_op", "intermediate_size", "ffn_mult", "weights_precision", "hidden_act", "gated"},
}
_ALLOWED = {"hidden_act": ("silu", "swish"), "gated": (True,)}
_WIDTH_STEP = 256  # what `ffn_mult` is rounded up to


def sizes_from_blocks(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[LayerGeometry, ...]]:
    """config.json without `block_configs`, its top level completed, and the layers that they describe.

    Raises:
        InputError: with every block that has no sizes, or asks for what cannot be expressed.
    """
    plain = {key: value for key, value in config.items() if key != "block_configs"}
    blocks, family = config["block_configs"], find_family(config)
    if family.experts is not None:
        raise InputError(f"block_configs of {family.architecture}: experts chosen by block cannot be expressed")
    if not isinstance(blocks, list) or not all(isinstance(block, Mapping) for block in blocks):
        raise InputError(f"block_configs is {shown(blocks)}; it must be a list with an object for each layer")
    if len(blocks) != config.get("num_hidden_layers"):
        count = shown(config.get("num_hidden_layers"))
        raise InputError(f"config.json: block_configs has {len(blocks)} layers, num_hidden_layers is {count}")
    reader = _Blocks(plain)
    sizes = [reader.read(index, block) for index, block in enumerate(blocks)]
    if reader.problems:
        raise InputError("config.json has blocks that cannot be converted:", reader.problems)
    heads = plain["num_attention_heads"]
    kv_heads, widths = [kv_heads for kv_heads, _ in sizes], [width for _, width in sizes]
    if plain.get("num_key_value_heads") is None:  # DeciLM says it nowhere else
        plain["num_key_value_heads"] = max(kv_heads) or heads
    if plain.get("intermediate_size") is None:
        plain["intermediate_size"] = max(widths) or plain["hidden_size"]
    layers = [LayerGeometry((heads // count,) * count if count else (), width) for count, width in sizes]
    return plain, tuple(layers)


class _Blocks:
    """Reads one block after the other; what is wrong goes to `problems`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config
        self.problems: list[str] = []
        self._heads = self._checked("config.json", config, "num_attention_heads", LARGEST_COUNT)
        self._hidden_size = self._checked("config.json", config, "hidden_size", LARGEST_SIZE)

    def read(self, index: int, block: Mapping[str, Any]) -> tuple[int, int]:
        """KV heads and FFN channels of a layer, 0 for a sublayer that does nothing."""
        where = f"block_configs[{index}]"
        self.problems += [
            f"{where}: {key} is {shown(value)}, which cannot be expressed"
            for key, value in block.items()
            if key not in _KNOWN and value
        ]
        attention, ffn = self._part(where, block, "attention"), self._part(where, block, "ffn")
        kv_heads = 0 if attention.get("no_op") else self._kv_heads(f"{where}.attention", attention)
        return kv_heads, 0 if ffn.get("no_op") else self._width(f"{where}.ffn", ffn)

    def _part(self, where: str, block: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        part = block.get(name) or {}
        if not isinstance(part, Mapping):
            self.problems.append(f"{where}.{name} is {shown(part)}; it must be an object")
            return {"no_op": True}
        for key, value in part.items():
            allowed = _ALLOWED.get(key)
            if value and (key not in _KNOWN[name] or (allowed is not None and value not in allowed)):
                self.problems.append(f"{where}.{name}: {key} is {shown(value)}, which cannot be expressed")
        return part

    def _kv_heads(self, where: str, attention: Mapping[str, Any]) -> int:
        if attention.get("num_key_value_heads") is None and attention.get("n_heads_in_group") is not None:
            group = self._checked(where, attention, "n_heads_in_group", LARGEST_COUNT)
            if self._heads % group:
                self.problems.append(f"{where}: n_heads_in_group {group} does not divide {self._heads} query heads")
            return self._heads // group
        kv_heads = self._stated(where, attention, "num_key_value_heads", LARGEST_COUNT)
        if self._heads % kv_heads:
            self.problems.append(f"{where}: {self._heads} query heads are no multiple of {kv_heads} KV heads")
        return kv_heads

    def _width(self, where: str, ffn: Mapping[str, Any]) -> int:
        multiple = ffn.get("ffn_mult")
        if ffn.get("intermediate_size") is not None or multiple is None:
            return self._stated(where, ffn, "intermediate_size", LARGEST_SIZE)
        if not isinstance(multiple, int | float) or isinstance(multiple, bool) or not 0 < multiple < LARGEST_COUNT:
            self.problems.append(f"{where}: ffn_mult is {shown(multiple)}; it must be a number above 0")
            return 1
        return -(-int(2 * multiple * self._hidden_size / 3) // _WIDTH_STEP) * _WIDTH_STEP

    def _stated(self, where: str, part: Mapping[str, Any], key: str, most: int) -> int:
        """A size of a block, else that of config.json."""
        return self._checked(where, part if part.get(key) is not None else self._config, key, most)

    def _checked(self, where: str, values: Mapping[str, Any], key: str, most: int) -> int:
        try:
            return positive(values, key, most=most)
        except ValueError as error:
            self.problems.append(f"{where}: {error}")
            return 1

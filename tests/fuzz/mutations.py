"""Changes to the bytes of a valid file: of any kind, of JSON, of safetensors, of what torch.save wrote.

    mutate = MUTATORS["json"]
    mutate(content, random.Random(7))     # the same for the same seed

Every mutator makes one change; a case makes a few.
"""

import io
import json
import pickletools
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

Mutator = Callable[[bytes, Random], bytes]

NUMBERS = (0, 1, -1, 2, 7, 255, 256, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**12, 10**40, 0.5, -0.0, 1e308, 1e-320)
VALUES = (None, True, False, "", "x", "../x", "/etc/passwd", "\x00", "\ud800", "x" * 10_000, [], {}, [[]], [None], [0])
# Keys that some reader knows, to be put anywhere.
KEYS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "vocab_size"),
    *("intermediate_size", "moe_intermediate_size", "num_experts", "num_local_experts", "num_experts_per_tok"),
    *("per_layer_config", "query_heads_per_kv_head", "expert_intermediate_sizes", "skip", "pruning", "architectures"),
    *("model_type", "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_scaling", "rope_parameters"),
    *("layer_types", "sliding_window", "quantization_config", "transformers_weights", "auto_map", "torch_dtype"),
    *("mlp_only_layers", "decoder_sparse_step", "shared_expert_intermediate_size", "hidden_act", "rms_norm_eps"),
    *("weight_map", "metadata", "__metadata__", "dtype", "shape", "data_offsets", "block_configs"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "bias", "target_modules"),
    *("base_model", "base_fingerprint", "lora_adapter", "channel_mask_site", "method", "format_version", "0", "1"),
)
# Parts of pickle programs: calls, memo entries and sizes without measure.
OPCODES = (
    *(b".", b"0", b"1", b"2", b"(", b")", b"]", b"}", b"N", b"K\x01", b"J\xff\xff\xff\xff", b"\x85", b"\x86", b"\x87"),
    *(b"R", b"b", b"s", b"u", b"a", b"e", b"t", b"l", b"d", b"o", b"\x81", b"\x92", b"\x93", b"Q", b"Pid\n"),
    *(b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch.storage\n_load_from_bytes\n", b"ccollections\nOrderedDict\n"),
    *(b"cos\nsystem\n(X\x0f\x00\x00\x00touch fuzz-eviltR", b"ctorch._utils\n_rebuild_tensor_v2\n", b"\x8fh\x00"),
    *(b"r\xff\xff\xff\x7f", b"p99999999999\n", b"q\xff", b"h\x00", b"j\xff\xff\xff\x7f", b"g0\n", b"\x94"),
    *(b"X\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 8, b"\x96" + b"\xff" * 8, b"\x8d" + b"\xff" * 8),
    *(
        b"\x8b\xff\xff\xff\x7f",
        b"\x8a\xff" + b"\x7f" * 255,
        b"\x95" + b"\xff" * 8,
        b"\x80\x05",
        b"\x80\xff",
        b"\x82\x01",
    ),
    *(b"I99999999999999999999\n", b"L1L\n", b"F1e999\n", b"S'x'\n", b"Vx\n", b"\x97", b"\x98", b"i__main__\nX\n"),
)


def of_bytes(content: bytes, random: Random) -> bytes:
    """Bits, bytes and slices, at any place."""
    if not content:
        return random.randbytes(8)
    at = random.randrange(len(content))
    length = min(len(content) - at, random.choice((1, 2, 4, 8, 16, random.randrange(1, 1 + len(content)))))
    before, piece, after = content[:at], content[at : at + length], content[at + length :]
    elsewhere = random.randrange(len(content))
    return random.choice(
        (
            lambda: before + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :],
            lambda: before + random.randbytes(length) + after,
            lambda: before + bytes([random.choice((0, 0x7F, 0x80, 0xFF))]) * length + after,
            lambda: before + after,
            lambda: before + piece * random.choice((2, 3, 100)) + after,
            lambda: content[:elsewhere] + piece + content[elsewhere:],
            lambda: before,
        )
    )()


def of_json(content: bytes, random: Random) -> bytes:
    """Values, keys and whole branches; sometimes bytes, which make it no JSON at all."""
    try:
        root = json.loads(content)
    except (ValueError, RecursionError):
        return of_bytes(content, random)
    if random.random() < 0.1:
        return of_bytes(content, random)
    return _dumped(changed_json(root, random), random)


def changed_json(root: Any, random: Random) -> Any:
    """`root` with one change, made in place where it can be."""
    places = list(_places(root))
    if not places:
        return _value(random)
    holder, key = random.choice(places)
    kind = random.randrange(8)
    if kind == 0 and isinstance(holder, dict):
        holder[random.choice(KEYS)] = holder.pop(key)
    elif kind == 1:
        del holder[key]
    elif kind == 2 and isinstance(holder, dict):
        holder[random.choice(KEYS)] = _value(random)
    elif kind == 3:
        other, name = random.choice(places)
        holder[key] = json.loads(json.dumps(other[name]))
    elif kind == 4 and type(holder[key]) is int:
        holder[key] += random.choice((-1, 1, -holder[key], holder[key], 63 * holder[key]))
    elif kind == 5:
        holder[key] = [holder[key]] * random.choice((0, 1, 2, 1000))
    elif kind == 6:
        holder[key] = {random.choice(KEYS): holder[key]}
    else:
        holder[key] = _value(random)
    return root


def _places(root: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or index in it."""
    found, pending = [], [root]
    while pending:
        holder = pending.pop()
        if isinstance(holder, dict | list):
            keys = list(holder) if isinstance(holder, dict) else range(len(holder))
            found += [(holder, key) for key in keys]
            pending += [holder[key] for key in keys]
    return found


def _value(random: Random) -> Any:
    """A new object, so that no two places share one."""
    value = random.choice((random.choice(NUMBERS), random.choice(VALUES), random.choice(KEYS)))
    return json.loads(json.dumps(value))


def _dumped(root: Any, random: Random) -> bytes:
    """With nesting beyond any parser's patience now and then."""
    text = json.dumps(root)
    if random.random() < 0.02:
        text = '{"x": ' + "[" * 100_000 + "]" * 100_000 + "," + text[1:]
    return text.encode("utf-8", "surrogatepass")


def of_safetensors(content: bytes, random: Random) -> bytes:
    """The header, its length, or the numbers behind it."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = random.randrange(16)
    if kind == 0 or len(header) < size:
        return of_bytes(content, random)
    if kind > 7:
        return _with_other_tensors(content, header, data, random)
    if kind == 1:
        length = random.choice((0, 1, size - 1, size + 1, 2**31, 2**63, 2**64 - 1)) % 2**64
        return length.to_bytes(8, "little") + header + data
    if kind == 2:
        return content[: 8 + size] + of_bytes(data, random)
    if kind == 3:  # NaN, infinity, numbers without measure
        at = 4 * random.randrange(max(1, len(data) // 4))
        word = random.choice((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x01\x00\x00\x00"))
        return content[: 8 + size] + data[:at] + word + data[at + 4 :]
    header = of_json(header, random)
    return len(header).to_bytes(8, "little") + header + data


def _with_other_tensors(content: bytes, header: bytes, data: bytes, random: Random) -> bytes:
    """A file that is valid, but for what it holds: tensors of other names, shapes, dtypes, or that are not there."""
    try:
        entries = json.loads(header)
        tensors = [
            (name, entry["dtype"], list(entry["shape"]), data[slice(*entry["data_offsets"])])
            for name, entry in entries.items()
            if name != "__metadata__"
        ]
        index = random.randrange(len(tensors))
        name, dtype, shape, values = tensors[index]
        sizes = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "I64": 8}
        other = random.choice(list(sizes))
        count = len(values) // sizes[dtype]
        tensors[index : index + 1] = random.choice(
            (
                [],
                [(name, dtype, shape[::-1], values)],
                [(name, dtype, [count], values)],
                [(name, dtype, [1, *shape], values)],
                [(name, dtype, [0, *shape[1:]], b"")],
                [(name, dtype, [2 * shape[0], *shape[1:]], values * 2)],
                [(name, dtype, [], values[: sizes[dtype]])],
                [(name, other, shape, (values * 8)[: count * sizes[other]])],
                [(random.choice(tensors)[0].replace("0", "1"), dtype, shape, values), tensors[index]],
                [(name.replace("weight", random.choice(("bias", "qweight", "lora_A.weight"))), dtype, shape, values)],
            )
        )
        written, body = {}, b""
        for name, dtype, shape, values in tensors:
            written[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(values)]}
            body += values
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):  # changed too much already
        return of_bytes(content, random)
    text = json.dumps(written).encode()
    return len(text).to_bytes(8, "little") + text + body


def of_pickle(content: bytes, random: Random) -> bytes:
    """The program of a pickle: instructions that go, come, change places; or bytes."""
    places = _instructions(content)
    if random.random() < 0.2 or len(places) < 2:
        return of_bytes(content, random)
    index = random.randrange(len(places) - 1)
    start, end = places[index], places[index + 1]
    other = random.randrange(len(places) - 1)
    instruction, elsewhere = content[start:end], places[other]
    return random.choice(
        (
            lambda: content[: start + 1] + random.randbytes(1) + content[start + 2 :],
            lambda: content[: start + 1] + bytes([random.choice((0, 1, 2, 255))]) + content[start + 2 :],
            lambda: content[:start] + content[end:],
            lambda: content[:end] + instruction + content[end:],
            lambda: content[:elsewhere] + instruction + content[elsewhere:],
            lambda: content[:start] + random.choice(OPCODES) + content[start:],
            lambda: content[:start] + random.choice(OPCODES) + content[end:],
            lambda: content[:start] + b"".join(random.choices(OPCODES, k=random.randrange(1, 9))) + content[start:],
            lambda: (
                content[:end] + random.choice((b"0(2", b"2\x86", b"]2a")) * random.choice((3, 1000)) + content[end:]
            ),
        )
    )()


def _instructions(content: bytes) -> list[int]:
    """Where each instruction of the first pickle begins, as far as it can be read."""
    places = []
    try:
        for _, _, place in pickletools.genops(content):
            places.append(place)
    except Exception:  # whatever a damaged program does to pickletools
        pass
    return places


def of_torch_archive(content: bytes, random: Random) -> bytes:
    """The pickle within the archive, one of its other entries, or the archive's own bytes."""
    if random.random() < 0.2:
        return of_bytes(content, random)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    except Exception:  # changed beyond what zipfile reads
        return of_bytes(content, random)
    if not entries:
        return of_bytes(content, random)
    index = next((index for index, (name, _) in enumerate(entries) if name.endswith("data.pkl")), None)
    if index is None or random.random() < 0.15:
        index = random.randrange(len(entries))
        name, data = entries[index]
        entries[index] = random.choice(((name, of_bytes(data, random)), (name + "x", data), ("x/" + name, data)))
    else:
        entries[index] = entries[index][0], of_pickle(entries[index][1], random)
    written = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if random.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(written, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return written.getvalue()


MUTATORS: dict[str, Mutator] = {
    "bytes": of_bytes,
    "json": of_json,
    "safetensors": of_safetensors,
    "pickle": of_pickle,
    "torch archive": of_torch_archive,
}

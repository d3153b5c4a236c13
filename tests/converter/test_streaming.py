"""What is written: the same bytes whoever writes them, nothing where an input fails, in little memory."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.lora import adapted_checkpoint
from helpers.masked import RAGGED, convert_pruned, edit_json, edit_weights, ragged_checkpoint
from helpers.tiny import expert_masks, tiny_model, write_masked
from helpers.torch_files import FORMATS
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converter import blocks
from converter.convert import convert
from converter.plan import make_plan
from converter.writer import ShardFile
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats import headers, weights
from pruned_vllm.formats.fingerprint import Fingerprint


def moe_checkpoint(directory: Path) -> Path:
    model = tiny_model("qwen3_moe", 6, 3, 24).to(torch.bfloat16)
    write_masked(directory, model, expert_masks(model, [[17, 0, 24, 5], [0, 0, 0, 0], [1, 2, 3, 4]]))
    norm = "model.layers.1.input_layernorm.weight"  # an odd one out, which must be aligned
    edit_weights(directory, {norm: load_file(directory / "model.safetensors")[norm].float()})
    return directory


def fused_checkpoint(directory: Path) -> Path:
    """A Phi-3: q, k and v of a layer are one tensor, of which each has some rows."""
    return write_masked(directory, tiny_model("phi3", 6, 6, 40).to(torch.bfloat16), RAGGED)


CHECKPOINTS = {
    "ragged": ragged_checkpoint,
    "experts, two dtypes": moe_checkpoint,
    "adapter": adapted_checkpoint,
    "fused": fused_checkpoint,
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors*")}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_same_bytes_whatever_the_threads_and_the_blocks(tmp_path, monkeypatch, name):
    ckpt = CHECKPOINTS[name](tmp_path / "ckpt")
    written = []
    for number, (threads, block_bytes) in enumerate([(1, 1 << 22), (5, 1000), (2, 1)]):
        monkeypatch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        out = tmp_path / f"out{number}"
        convert(make_plan(ckpt, alignment=16), out, max_shard_bytes=200_000, threads=threads)
        written.append(contents(out))
    assert len(written[0]) > 2 and written[0] == written[1] == written[2]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_files_are_those_that_the_library_writes(tmp_path, name):
    plan = make_plan(CHECKPOINTS[name](tmp_path / "ckpt"))
    convert(plan, tmp_path / "one")
    convert(plan, tmp_path / "many", max_shard_bytes=100_000)
    for directory in (tmp_path / "one", tmp_path / "many"):
        for path in directory.glob("*.safetensors"):
            save_file(load_file(path), tmp_path / "again", metadata={"format": "pt"})
            assert path.read_bytes() == (tmp_path / "again").read_bytes(), path.name
            with safe_open(path, "pt") as file:
                assert file.metadata() == {"format": "pt"}
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys() == plan.pruned.tensor_shapes().keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    assert all(path.stat().st_size < 110_000 or len(load_file(path)) == 1 for path in (tmp_path / "many").glob("*.s*s"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


FAULTS = {
    "truncated": (truncate, "was truncated while it was read: it ends at byte"),
    "gone": (Path.unlink, "is gone; it was there when the command began"),
    "not readable": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS)
def test_an_input_that_fails_after_it_was_checked(ckpt, tmp_path, fault, message):
    plan = make_plan(ckpt)
    fault(ckpt / "model.safetensors")
    with pytest.raises(InputError, match=message):
        convert(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def pickle_weights(ckpt: Path, **options) -> Path:
    """Makes a masked checkpoint a model whose weights are pickled; returns their file."""
    tensors, file = load_file(ckpt / "model.safetensors"), ckpt / "pytorch_model.bin"
    for name in ("model.safetensors", "pruning.json", "pruning_masks.safetensors"):
        (ckpt / name).unlink()
    torch.save(tensors, file, **options)
    return file


@pytest.mark.parametrize("container", FORMATS)
def test_a_pickled_input_that_is_truncated_after_it_was_checked(ckpt, tmp_path, container):
    """Who looks for it in mapped memory dies."""
    file = pickle_weights(ckpt, **FORMATS[container])
    plan = make_plan(ckpt)
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(InputError, match=r"pytorch_model\.bin was truncated while it was read"):
        convert(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize("threads", [1, 4])
def test_a_disk_that_fails_is_told(ckpt, tmp_path, capsys, monkeypatch, threads):
    def fails(descriptor, buffers, place):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fails)
    plan = make_plan(ckpt)
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read: Input/output error"):
        convert(plan, tmp_path / "out", threads=threads)
    assert convert_pruned(ckpt, tmp_path / "out") == 2
    assert "model.safetensors cannot be read: Input/output error" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_an_input_that_is_written_to_meanwhile_is_noticed(ckpt, tmp_path, monkeypatch):
    write = ShardFile.write

    def touched(self, content, place):
        (ckpt / "model.safetensors").touch()
        write(self, content, place)

    monkeypatch.setattr(ShardFile, "write", touched)
    with pytest.raises(InputError, match="Files were changed while they were read"):
        convert(make_plan(ckpt), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize("pickled", [False, True])
def test_an_input_that_is_replaced_after_it_was_checked_is_noticed(ckpt, tmp_path, pickled):
    """Where each tensor lies was told by a header that is gone; a shard may be opened minutes later."""
    file = pickle_weights(ckpt) if pickled else ckpt / "model.safetensors"
    plan = make_plan(ckpt)
    other = file.with_name("other")
    other.write_bytes(file.read_bytes())
    other.rename(file)
    with pytest.raises(InputError, match=f"Files were changed while they were read.*\n.*{file.name}"):
        convert(plan, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_the_first_of_several_tensors_that_are_not_finite_is_named(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1000)
    names = [f"model.layers.{index}.self_attn.q_proj.weight" for index in (0, 2)]
    edit_weights(ckpt, {name: torch.full((192, 96), torch.nan) for name in names})
    messages = set()
    for threads in (1, 5, 5):
        with pytest.raises(InputError) as raised:
            convert(make_plan(ckpt), tmp_path / "out", threads=threads)
        messages.add(str(raised.value))
    (message,) = messages
    assert message.startswith(f"{names[0]}: {4 * 32 * 96} values are NaN or infinite in F32 after the masks were")


MEASURED = """
import json, os, sys, threading, time
from pathlib import Path
from converter.convert import convert
from converter.plan import make_plan
from converter.quantize.schemes import SCHEMES, Wanted

def anonymous():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

directory, scheme = Path(sys.argv[1]), sys.argv[2]
quantize = Wanted(SCHEMES[scheme]) if scheme in SCHEMES else None
convert(make_plan(directory / "small", quantize=quantize), directory / "small-out", threads=2)  # what is imported late
plan = make_plan(directory / "ckpt", quantize=quantize)
before, most, done = anonymous(), [0], threading.Event()

def sample():
    while not done.wait(0.002):
        most.append(anonymous())

sampler = threading.Thread(target=sample)
sampler.start()
convert(plan, directory / "out", threads=2)
done.set()
sampler.join()
print(max(most) - before)
"""


@pytest.mark.parametrize("scheme", ["floats", "w4a16"])
def test_memory_is_bounded_whatever_the_size_of_tensors(tmp_path, scheme):
    """Weights of 370 MB, each tensor 245 MB in float32; their file is all zeros and takes no disk."""
    ragged_checkpoint(tmp_path / "small")
    model = tiny_model("llama", 4, 2, 1, hidden_size=512, num_hidden_layers=1, vocab_size=40)
    write_masked(tmp_path / "ckpt", model, {})
    width = 120_000
    config = json.loads((tmp_path / "ckpt" / "config.json").read_text()) | {"intermediate_size": width}
    (tmp_path / "ckpt" / "config.json").write_text(json.dumps(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "ckpt" / "model.safetensors").items()}
    shapes = {name: tuple(width if size == 1 else size for size in shape) for name, shape in shapes.items()}
    write_zeros(tmp_path / "ckpt" / "model.safetensors", shapes)
    mask = torch.rand(width).mul(3) * (torch.rand(width) < 0.5)
    save_file({"model.layers.0.mlp.channel_mask": mask}, tmp_path / "ckpt" / "pruning_masks.safetensors")
    done = subprocess.run([sys.executable, "-c", MEASURED, tmp_path, scheme], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[-1]) < 80e6


def write_zeros(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def test_every_header_is_read_once(ckpt, tmp_path, monkeypatch):
    edit_json(ckpt / "pruning.json", base_fingerprint=str(Fingerprint.from_directory(ckpt)))
    (ckpt / "model.safetensors").touch()  # else what was read for the fingerprint is known
    opened = []
    for module, name in ((headers, "read_header"), (weights, "safe_open")):
        read = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda path, read=read, **options: opened.append(path) or read(path, **options)
        )
    convert(make_plan(ckpt), tmp_path / "out")
    assert opened.count(ckpt / "model.safetensors") == 2, (
        "once by the library, which is the judge, and once for the offsets"
    )

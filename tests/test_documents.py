"""What the documents name exists: files, links, modules, make targets, options of the commands."""

import importlib.util
import re
import subprocess
from pathlib import Path

import pytest

import bench.breakdown
import bench.e2e_speedup
import bench.online_speedup
import bench.sweep.__main__
from bench.report.__main__ import main as report
from converter.cli import SUBCOMMANDS
from converter.cli import main as convert_pruned
from converter.quantize.command import main as quantize_pruned
from learner.cli import main as learn_masks
from learner.finetune.cli import main as finetune_pruned

ROOT = Path(__file__).parents[1]
TRACKED = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.md") if ".venv" not in path.parts)
DOCUMENTS = [name for name in DOCUMENTS if not TRACKED or name in TRACKED]
FOLDERS = ("pruned_vllm", "converter", "learner", "bench", "tests", "requirements")


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)\)", text_of(name))
    missing = [link for link in links if "://" not in link and not (ROOT / name).parent.joinpath(link).exists()]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_files_and_folders_exist(name):
    """In backticks: from the root, or from the folder of the document."""
    named = re.findall(r"`((?:[\w.*-]+/)+[\w.*-]*|[\w-]+\.(?:py|md|toml))`", text_of(name))
    ours = [path for path in named if path.split("/")[0] in FOLDERS or path.endswith((".py", ".md", ".toml"))]
    folders = ROOT, (ROOT / name).parent
    ours = [path for path in ours if path != "report.md"]  # what benchmarks write
    missing = [path for path in ours if not any(list(folder.glob(path.rstrip("/"))) for folder in folders)]
    assert not missing


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_and_make_targets_exist(name):
    text = re.sub(r"\s+", " ", text_of(name))
    modules = set(re.findall(r"python -m ((?:bench|learner|converter|pruned_vllm)[\w.]*\w)", text))
    assert not [module for module in modules if importlib.util.find_spec(module) is None]
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), flags=re.MULTILINE))
    named = re.findall(r"(?:`|^ {4})make ([\w-]+)", text_of(name), flags=re.MULTILINE)
    assert set(named) <= targets


@pytest.mark.parametrize("name", [name for name in DOCUMENTS if not name.startswith("pruned_vllm/serving/")])
def test_options_exist(name, capsys):
    """`--option` in backticks, and every option in an example line of one of the commands. Not where it is vLLM's."""
    known = set()
    for command in (convert_pruned, quantize_pruned, learn_masks, finetune_pruned, report):
        with pytest.raises(SystemExit):
            command(["--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for subcommand in SUBCOMMANDS:
        with pytest.raises(SystemExit):
            convert_pruned([subcommand, "--help"])
        known |= set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    for benchmark in (bench.breakdown, bench.e2e_speedup, bench.online_speedup, bench.sweep.__main__):
        known |= set(re.findall(r"--[\w-]+", benchmark.build_parser().format_help()))
    text, ours = text_of(name), r"(?:(?:convert|quantize|finetune)-pruned|learn-masks) "
    lines = re.findall(rf"^ {{4}}{ours}.*", text, flags=re.MULTILINE)
    named = {option for line in lines for option in re.findall(r"--[\w-]+", line.split("#")[0])}
    named |= set(re.findall(rf"`(?:{ours})?(--[\w-]+)", text))
    elsewhere = {
        "--enable-lora",
        "--enable-expert-parallel",
        "--hf-overrides",
        "--kv-cache-dtype",
        "--nnodes",
        "--quantization",
        "--data-parallel-size",
    }  # vLLM's
    assert named - known - elsewhere == set()


def test_check_runs_tests_that_exist():
    (paths,) = re.findall(r"^QUICK_TESTS := (.*)$", text_of("Makefile"), flags=re.MULTILINE)
    assert not [path for path in paths.split() if not (ROOT / path).exists()]

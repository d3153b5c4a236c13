"""Tokenizers of the kinds that models bring, built here, and what they make of text that tells them apart."""

import io
import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEXTS = (
    "",
    "hello world",
    " hello",
    "   three spaces",
    "two  spaces, trailing ",
    "line\nbreak\n\n  and indentation\t tab",
    "<s>hello</s> world",
    "<s> hello</s>world <s>",
    "a<tool>b <tool> c",
    "a <mask> b<mask>c",
    "Größe, naïve, 東京 🙂 \u200bzero width",
    "1234567 + 89 = ?",
    "x" * 200,
)
CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " hello\n"},
    {"role": "assistant", "content": "hello</s>"},
    {"role": "user", "content": "again <tool>"},
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
SPECIAL = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
_LEARNED = ["hello world again and again", "three spaces", "line break", "naïve Größe 東京", "1234567"] * 20


def tokens_of(tokenizer) -> dict[str, object]:
    """All that a model sees of TEXTS and CHAT, and what is shown of its answers."""
    seen: dict[str, object] = {}
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, add_special_tokens=special)
            seen[f"{text!r}, {special}"] = ids
            seen[f"{text!r}, {special}, decoded"] = (
                tokenizer.decode(ids),
                tokenizer.decode(ids, skip_special_tokens=True),
            )
    if tokenizer.chat_template is not None:
        names = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else [None]
        for name in names:
            for prompt in (True, False):
                options = {"chat_template": name, "add_generation_prompt": prompt, "return_dict": False}
                seen[f"chat {name} {prompt}"] = tokenizer.apply_chat_template(CHAT, **options)
    return seen


def _trained(tokenizer: Tokenizer, alphabet=(), size: int = 400) -> Tokenizer:
    from tokenizers import trainers

    kind = trainers.UnigramTrainer if isinstance(tokenizer.model, models.Unigram) else trainers.BpeTrainer
    unknown = {"unk_token": "<unk>"} if kind is trainers.UnigramTrainer else {}
    trainer = kind(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=list(alphabet),
        show_progress=False,
        **unknown,
    )
    tokenizer.train_from_iterator(_LEARNED, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama-2's is written today: spaces become ▁ before the pre-tokenizer, and one is put in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    tokenizer = _trained(tokenizer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def legacy_metaspace() -> Tokenizer:
    """As Llama-2's was converted at first: by a normalizer, which acts anew after every special token."""
    tokenizer = metaspace()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return tokenizer


def byte_level() -> Tokenizer:
    """As Llama-3's and Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, pre_tokenizers.ByteLevel.alphabet())


def unigram() -> Tokenizer:
    """As T5's, which some Japanese models have."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _trained(tokenizer, size=60)


def write_tokenizer(directory: Path, tokenizer: Tokenizer, **config) -> None:
    """tokenizer.json and tokenizer_config.json by hand: save_pretrained would write what this version prefers."""
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"chat_template": TEMPLATE} | config))


def write_sentencepiece(directory: Path, **config) -> None:
    """tokenizer.model alone, as the first Llamas."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_LEARNED),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL | {"chat_template": TEMPLATE} | config))


def write_vocabulary(directory: Path, **config) -> None:
    """vocab.json and merges.txt, as GPT-2 and the first Qwens."""
    model = json.loads(byte_level().to_str())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (directory / "tokenizer_config.json").write_text(json.dumps(SPECIAL | config))


def with_added_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken("<mask>", lstrip=True), AddedToken("<tool>", rstrip=True)])
    tokenizer.add_tokens([AddedToken("naïve", single_word=True), AddedToken("  ", normalized=False)])
    return tokenizer


def _templates(directory: Path, tokenizer: Tokenizer, main: str, others: bool) -> None:
    write_tokenizer(directory, tokenizer, tokenizer_class="PreTrainedTokenizerFast", chat_template=None)
    (directory / "chat_template.jinja").write_text(main)
    if others:
        (directory / "additional_chat_templates").mkdir()
        (directory / "additional_chat_templates" / "tools.jinja").write_text("tools " + TEMPLATE)


LLAMA, FAST = {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "PreTrainedTokenizerFast"}
TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "metaspace": lambda path: write_tokenizer(path, metaspace(), **FAST),
    "metaspace, LlamaTokenizer": lambda path: write_tokenizer(path, metaspace(), **LLAMA),
    "metaspace, LlamaTokenizer, legacy": lambda path: write_tokenizer(path, metaspace(), **LLAMA, legacy=True),
    "metaspace, LlamaTokenizerFast, not legacy": lambda path: write_tokenizer(
        path, metaspace(), tokenizer_class="LlamaTokenizerFast", legacy=False, add_eos_token=True
    ),
    "normalizer, LlamaTokenizer": lambda path: write_tokenizer(path, legacy_metaspace(), **LLAMA),
    "normalizer, LlamaTokenizerFast, legacy": lambda path: write_tokenizer(
        path, legacy_metaspace(), tokenizer_class="LlamaTokenizerFast", legacy=True, add_prefix_space=False
    ),
    "normalizer, class not named": lambda path: write_tokenizer(path, legacy_metaspace()),
    "added tokens": lambda path: write_tokenizer(path, with_added_tokens(metaspace()), **LLAMA),
    "added tokens, byte-level": lambda path: write_tokenizer(path, with_added_tokens(byte_level()), **FAST),
    "byte-level, LlamaTokenizerFast": lambda path: write_tokenizer(
        path, byte_level(), tokenizer_class="LlamaTokenizerFast"
    ),
    "byte-level, Qwen2Tokenizer": lambda path: write_tokenizer(path, byte_level(), tokenizer_class="Qwen2Tokenizer"),
    "unigram": lambda path: write_tokenizer(path, unigram(), **FAST),
    "sentencepiece": lambda path: write_sentencepiece(path, **LLAMA),
    "sentencepiece, legacy": lambda path: write_sentencepiece(path, **LLAMA, legacy=True),
    "vocabulary and merges": lambda path: write_vocabulary(path, tokenizer_class="GPT2Tokenizer"),
    "named templates": lambda path: write_tokenizer(
        path,
        byte_level(),
        **FAST,
        chat_template=[{"name": name, "template": f"{name} {TEMPLATE}"} for name in ("default", "tool_use")],
    ),
    "template file": lambda path: _templates(path, byte_level(), TEMPLATE, others=False),
    "several template files": lambda path: _templates(path, metaspace(), TEMPLATE, others=True),
}

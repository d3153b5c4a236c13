"""Decides everything about a conversion before anything is written, and refuses what cannot be done."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from converter.checkpoint import DTYPES, Checkpoint
from converter.dropped_experts import DroppedExperts, without_empty_experts
from converter.fold import Cut, cut_layer, kept_layer
from converter.hidden import EMBEDDING, LM_HEAD, HiddenCut, make_hidden_cut
from converter.importers import AUTO, read_source
from converter.quantize.quantization import Quantization, Written, plan_quantization
from converter.quantize.schemes import Wanted
from converter.shapes import with_aligned_width, with_even_groups, with_few_shapes
from converter.source import HiddenMask, Request, Source
from pruned_vllm.common.errors import InputError
from pruned_vllm.formats.agreed_config import refusals
from pruned_vllm.formats.companions import find_companions
from pruned_vllm.formats.config import converted_config
from pruned_vllm.formats.geometry import ModelGeometry, skip_problems
from pruned_vllm.formats.headers import ELEMENT_BYTES, dense_problems, has_draft_layers, num_draft_layers
from pruned_vllm.formats.hub import local_input
from pruned_vllm.formats.layer import LayerGeometry
from pruned_vllm.formats.masked import FORMAT_VERSION, site_problems
from pruned_vllm.formats.tensors import Shapes
from pruned_vllm.formats.weights import has_weight_files
from pruned_vllm.formats.wrappers import wrapped_architecture


@dataclass(frozen=True)
class Plan:
    """A conversion that can be done.

    Attributes:
        source: what an importer found, less experts that are dropped.
        exact, pruned: geometries as the masks leave it, and as it is written: `exact` plus padding.
        alignment: of the FFN widths and of the hidden size, where that is cut.
        cuts: by full tensor name; a tensor that is not named is copied.
        rms_norm_eps: the new one, where hidden dimensions were cut.
        dtype: of the tensors that are written; None is the one that each has.
        quantization: how weights are rounded, after all else; None: they are not.
        dropped: the experts that are dropped, and what the importer found; None: none is.
    """

    source: Source
    exact: ModelGeometry
    pruned: ModelGeometry
    alignment: int
    cuts: dict[str, Cut]
    rms_norm_eps: float | None
    dtype: torch.dtype | None
    quantization: Quantization | None = None
    dropped: DroppedExperts | None = None

    @property
    def dense(self) -> ModelGeometry:
        """The geometry that the weights would have if nothing were cut or masked in a layer."""
        return self.source.dense

    @property
    def before(self) -> ModelGeometry:
        """The geometry before pruning, as far as it is known."""
        return self.source.before or self.source.dense

    @property
    def checkpoint(self) -> Checkpoint:
        """The weights that are read."""
        return self.source.weights

    @property
    def cuts_nothing(self) -> bool:
        """Whether what is written has the sizes of the dense model."""
        return self.exact.layers == self.before.layers and self.exact.hidden_size == self.before.hidden_size

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is written; a router's correction bias stays as exact as it is."""
        experts = self.pruned.family.experts
        if experts is not None and experts.correction_bias and name.endswith(f".{experts.correction_bias}"):
            return self.checkpoint.dtype_of(name)
        return self.dtype or self.checkpoint.dtype_of(name)

    def bytes_of(self, geometry: ModelGeometry) -> int:
        """Bytes of the tensors of `geometry`, as they are written."""
        return self.bytes_of_shapes(geometry.tensor_shapes())

    def bytes_of_shapes(self, shapes: Shapes) -> int:
        """Bytes of tensors of these shapes, as they are written."""
        if self.dtype is None:
            return self.checkpoint.bytes_of(shapes)
        return ELEMENT_BYTES[DTYPES[self.dtype]] * sum(map(math.prod, shapes.values()))

    @cached_property
    def written(self) -> Written:
        """The tensors of the files."""
        shapes = self.pruned.tensor_shapes()
        dtypes = {name: DTYPES[self.dtype_of(name)] for name in shapes}
        if self.quantization is None:
            return Written(shapes, dtypes, {name: name for name in shapes})
        return self.quantization.written(shapes, dtypes)

    def config(self) -> dict[str, Any]:
        """The converted config.json."""
        config = dict(self.checkpoint.config)
        config.pop("auto_map", None)  # code shipped with the dense model does not know the new shapes
        config.pop("_name_or_path", None)  # where the dense model was on the machine of whoever saved it
        if self.rms_norm_eps is not None:
            config["rms_norm_eps"] = self.rms_norm_eps
        if self.dtype is not None:
            config.pop("torch_dtype", None)  # the name of the key before Transformers 5
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        config = converted_config(self.pruned, config)
        if pruning := self._pruning():
            config["pruning"] = pruning
        if self.quantization is not None:
            from converter.quantize.library import library_config  # an import of seconds

            config["quantization_config"] = library_config(self.quantization)
        return config

    def _pruning(self) -> dict[str, Any]:
        """The key `pruning`; empty for a model that was not pruned."""
        if self.source.pruning is not None:
            return dict(self.source.pruning)
        after = self.pruned if self.quantization is None else self.quantization.unpadded
        pruning = {
            "format_version": FORMAT_VERSION,
            "method": self.source.method,
            "source": self.source.hub_id,
            "alignment": self.alignment,
            "sizes": {
                "parameters": [self.before.num_parameters, after.num_parameters],
                "num_key_value_heads": [self.before.num_key_value_heads, after.num_key_value_heads],
            },
        }
        if self.dropped is not None:
            pruning |= {"exact": False, "dropped_experts": self.dropped.by_layer}
        return pruning


def make_plan(
    path: Path,
    base_model: str | None = None,
    *,
    importer: str = AUTO,
    revision: str | None = None,
    settings: Mapping[str, float | None] | None = None,
    dtype: torch.dtype | None = None,
    gqa_layout: Literal["compact", "padded"] = "compact",
    alignment: int = 1,
    max_distinct_shapes: int | None = None,
    drop_empty_experts: bool = False,
    quantize: Wanted | None = None,
) -> Plan:
    """Reads the pruned model in `path` and checks all of it.

    Args:
        path: directory, file or hub id: a masked checkpoint, or what another project wrote.
        base_model: directory or hub id of the dense model; takes the place of any other weights.
        importer: the format of `path`, one of `importer_names()`; "auto" finds out.
        revision: commit, branch or tag of `path` where that is on the hub, else of the dense model; None is the one
            that the masks were learned on, if pruning.json says so, else the main branch.
        settings: other options that an importer needs.
        dtype: of the weights that are written; None keeps that of every tensor.
        gqa_layout: "compact" writes the heads that are left; "padded" pads every query group to its layer's widest.
        alignment: pads FFN widths to multiples of this, at most to the dense width. Experts of different widths stay
            as they are: their kernels take any number of rows.
        max_distinct_shapes: pads layers until there are at most so many different ones, at the least possible bytes.
        drop_empty_experts: whether experts without channels go with their rows of the router, see
            converter/dropped_experts.py. The result then is not the masked model.
        quantize: how weights are to be rounded, if they are.

    Raises:
        InputError: with every problem of the first stage that has any (files, config, tensors and masks, geometry).
    """
    directory, hub_id, revision = local_input(path, revision)
    source = read_source(Request(directory, base_model, revision, settings or {}), importer)
    if source.weights.directory == directory:
        source = replace(source, hub_id=source.hub_id or hub_id)
    if wrapper := wrapped_architecture(source.weights.directory):
        note = f"Of {wrapper}, the language model alone was read; OUT is a model of text, without what reads images."
        source = replace(source, notes=(*source.notes, note))
    if has_weight_files(source.weights.directory) and has_draft_layers(source.weights.directory):
        note = "Layers for multi-token prediction (mtp.*) were left out: the pruned model drafts no tokens with them."
        source = replace(source, notes=(*source.notes, note))
    if drafts := num_draft_layers(source.weights.config):
        note = f"OUT has no layers for multi-token prediction; config.json counted {drafts}."
        source = replace(source, notes=(*source.notes, note))
    dense = source.dense
    if dense.experts is not None and max_distinct_shapes is not None:
        raise InputError(
            f"--max-distinct-shapes is for models without experts, and {dense.family.architecture} has some; "
            "their layers are served at any width without padding"
        )
    check_source(f"{path} cannot be converted:", source)
    source, dropped = without_empty_experts(source) if drop_empty_experts else (source, None)
    hidden = make_hidden_cut(source.hidden or HiddenMask(), dense, source.weights.config, alignment)
    model = dense if hidden is None else replace(dense, hidden_size=hidden.hidden_size)
    if dense.tie_word_embeddings and hidden is not None and hidden.embedding is not None:
        source, model = _with_lm_head(source), replace(model, tie_word_embeddings=False)
    exact = [kept_layer(layer, masks) for layer, masks in zip(source.layers, source.masks, strict=True)]
    if problems := skip_problems(dense.family, exact, dense.o_bias, dense.mlp_bias):
        raise InputError(f"{path} cannot be converted:", problems)
    layers = exact if gqa_layout == "compact" else [with_even_groups(layer) for layer in exact]
    layers = [
        with_aligned_width(layer, alignment, _widest(before, given))
        for layer, before, given in zip(layers, dense.layers, source.layers, strict=True)
    ]
    if max_distinct_shapes is not None:

        def layer_bytes(layer: LayerGeometry) -> int:
            return source.weights.bytes_of(dense.with_layers((layer,)).layer_tensor_shapes(0))

        layers = with_few_shapes(layers, layer_bytes, max_distinct_shapes)
    quantization, pruned = None, model.with_layers(tuple(layers))
    if quantize is not None:
        quantization, pruned = plan_quantization(quantize, pruned)
    return Plan(
        source=source,
        exact=replace(model, layers=tuple(exact), hidden_size=hidden.exact_size if hidden else dense.hidden_size),
        pruned=pruned,
        alignment=alignment,
        cuts=make_cuts(source, pruned, hidden, dropped),
        rms_norm_eps=hidden.rms_norm_eps if hidden else None,
        dtype=dtype,
        quantization=quantization,
        dropped=dropped,
    )


def check_source(what: str, source: Source) -> None:
    """Raises InputError, which begins with `what`, where the weights cannot be read or a key cannot be honoured."""
    weights = source.weights
    problems = [f"config.json: {problem}" for problem in refusals(source.dense.family, weights.config)]
    if any(masks.expert is not None for masks in source.masks):
        problems += site_problems(source.dense.family, source.channel_mask_site)
    if source.dense.head_dim % 2:
        name = "head_dim" if source.dense.latent is None else "qk_rope_head_dim"
        problems.append(f"config.json: {name} is {source.dense.head_dim}; it must be even, as RoPE turns pairs")
    problems += dense_problems(weights.tensors, source.dense.with_layers(source.layers))
    problems += source.problems
    try:
        if source.companions is not None:
            find_companions(source.companions)
    except InputError as error:
        problems.append(str(error))
    if problems:
        raise InputError(what, problems)


def _with_lm_head(source: Source) -> Source:
    """`source` with an lm_head that no longer shares the weights of the embedding, which a mask goes into."""
    note = "lm_head shared the weights of the embedding. The hidden mask multiplies that alone, so OUT has both."
    weights = source.weights.with_copy(LM_HEAD, EMBEDDING)
    return replace(source, weights=weights, notes=(*source.notes, note))


def _widest(dense: LayerGeometry, given: LayerGeometry) -> LayerGeometry:
    """What the widths of padding must not exceed."""
    expert = max(dense.expert_width, given.expert_width)
    width = max(dense.intermediate_size, given.intermediate_size)
    return replace(dense, intermediate_size=width, expert_intermediate_sizes=(expert,) if expert else ())


def make_cuts(
    source: Source, target: ModelGeometry, hidden: HiddenCut | None, dropped: DroppedExperts | None = None
) -> dict[str, Cut]:
    """The cut of every tensor that changes, by full name, that makes `source` into a model of this geometry.

    Args:
        dropped: experts that `source` has no more, but its routers do.
    """
    dense = source.dense
    cuts: dict[str, Cut] = {}
    for index, (masks, layer) in enumerate(zip(source.masks, target.layers, strict=True)):
        layer_cuts = cut_layer(dense, source.layers[index], masks, source.channel_mask_site, layer)
        if layer.expert_intermediate_sizes and dropped is not None:
            rows = torch.tensor(dropped.kept[index])
            layer_cuts |= {name: Cut(rows=rows) for name in dense.family.experts_format.router_tensors}
        cuts |= {f"model.layers.{index}.{name}": cut for name, cut in layer_cuts.items()}
    if hidden is not None:
        untied = hidden.embedding is not None
        given = replace(dense, layers=source.layers, tie_word_embeddings=dense.tie_word_embeddings and not untied)
        changed = {name: hidden.cut(name, shape, cuts.get(name)) for name, shape in given.tensor_shapes().items()}
        cuts = {name: cut for name, cut in changed.items() if cut is not None}
    return cuts

"""Tensor parallelism for any layer: which heads and channels each rank holds, as a pure function. Pure Python.

Stock layers give every rank equally many heads and channels. A pruned layer seldom divides so, and its query groups may
differ. `shard_layer` therefore lays the layer out anew: KV heads go to ranks with all their query heads, the largest
groups first to the rank with the fewest query heads; a KV head is repeated where there are more ranks than KV heads,
and its query heads are shared out; FFN channels go in equal runs. What a rank lacks against the fullest one is padding,
zeros made while the weights are loaded. Each rank holds at most one KV head and one channel more than an even share.

    layout = shard_layer(layer, tensor_parallel_size=2)
    layout.query_index    # [2 * layout.query_heads]: the layer's query heads in rank order, PAD where there is none
"""

from dataclasses import dataclass

from pruned_vllm.common.padding import PAD
from pruned_vllm.formats.layer import LayerGeometry


@dataclass(frozen=True)
class Shard:
    """What one rank holds of one layer, as indices of the layer's units.

    Attributes:
        kv_heads: KV heads.
        query_heads: for each of kv_heads the query heads that read it.
        channels: FFN channels.
    """

    kv_heads: tuple[int, ...]
    query_heads: tuple[tuple[int, ...], ...]
    channels: range

    @property
    def num_query_heads(self) -> int:
        return sum(map(len, self.query_heads))


@dataclass(frozen=True)
class LayerLayout:
    """One layer on all ranks. Counts are per rank and the same on each; 0 where the sublayer is skipped.

    Attributes:
        shards: what each rank holds.
        kv_heads: KV heads.
        query_heads: query heads in the projections.
        group_size: query heads of each KV head in the attention op, which knows no uneven groups.
        channels: FFN channels.
    """

    shards: tuple[Shard, ...]
    kv_heads: int
    query_heads: int
    group_size: int
    channels: int

    @property
    def op_heads(self) -> int:
        """Query heads of the attention op."""
        return self.kv_heads * self.group_size

    @property
    def total_op_heads(self) -> int:
        """Query heads of the attention ops of all ranks together."""
        return self.op_heads * len(self.shards)

    @property
    def total_kv_heads(self) -> int:
        """KV heads of all ranks together, one that stock layers repeat on several ranks counted once."""
        return self.kv_heads * len(self.shards) // self.kv_replicas

    @property
    def is_compact(self) -> bool:
        """Whether the projections hold fewer query heads than the attention op takes."""
        return self.query_heads < self.op_heads

    @property
    def kv_index(self) -> list[int]:
        """The layer's KV heads in rank order [ranks * kv_heads], PAD where there is none."""
        return [head for shard in self.shards for head in _padded(shard.kv_heads, self.kv_heads)]

    @property
    def kv_replicas(self) -> int:
        """Ranks that stock layers let share each KV head; more than 1 only where that is what this layout does."""
        kv_heads = sorted(set(self.kv_index) - {PAD})
        replicas = len(self.shards) // max(1, len(kv_heads))
        return replicas if self.kv_index == [head for head in kv_heads for _ in range(replicas)] else 1

    @property
    def query_index(self) -> list[int]:
        """The layer's query heads in rank order [ranks * query_heads], PAD where there is none."""
        return [head for rank in range(len(self.shards)) for head in self._rank_query_heads(rank)]

    @property
    def channel_index(self) -> list[int]:
        """The layer's FFN channels in rank order [ranks * channels], PAD where there is none."""
        return [channel for shard in self.shards for channel in _padded(shard.channels, self.channels)]

    def op_source(self, rank: int) -> list[int]:
        """For each head of the attention op [op_heads], which of the rank's projected query heads it takes.

        A head of padding takes the first one: nothing reads what it computes.
        """
        positions = {head: position for position, head in enumerate(self._rank_query_heads(rank)) if head != PAD}
        return [positions.get(head, 0) for head in self.op_slots(rank)]

    def op_target(self, rank: int) -> list[int]:
        """For each of the rank's projected query heads [query_heads], which head of the attention op computed it.

        Padding reads the first one: its columns of o_proj are zero.
        """
        slots = {head: slot for slot, head in enumerate(self.op_slots(rank)) if head != PAD}
        return [slots.get(head, 0) for head in self._rank_query_heads(rank)]

    def _rank_query_heads(self, rank: int) -> list[int]:
        if not self.is_compact:
            return self.op_slots(rank)
        return _padded([head for group in self.shards[rank].query_heads for head in group], self.query_heads)

    def op_slots(self, rank: int) -> list[int]:
        """The layer's query heads that the rank's attention op computes [op_heads], PAD where there is none."""
        slots = [head for group in self.shards[rank].query_heads for head in _padded(group, self.group_size)]
        return _padded(slots, self.op_heads)


def shard_layer(layer: LayerGeometry, tensor_parallel_size: int, channel_quantum: int = 1) -> LayerLayout:
    """How `layer` is spread over the ranks. With one rank everything is in the layer's own order.

    Args:
        channel_quantum: every rank holds a multiple of so many FFN channels, padding included.
    """
    if layer.num_key_value_heads >= tensor_parallel_size:
        assigned = _spread_kv_heads(layer.query_heads_per_kv_head, tensor_parallel_size)
    else:
        assigned = _repeat_kv_heads(layer.query_heads_per_kv_head, tensor_parallel_size)
    width = share_of(layer.intermediate_size, tensor_parallel_size, channel_quantum)
    shards = tuple(
        Shard(
            tuple(head for head, _ in heads),
            tuple(tuple(queries) for _, queries in heads),
            range(layer.intermediate_size)[rank * width : (rank + 1) * width],
        )
        for rank, heads in enumerate(assigned)
    )
    return LayerLayout(
        shards=shards,
        kv_heads=max(len(shard.kv_heads) for shard in shards),
        query_heads=max(shard.num_query_heads for shard in shards),
        group_size=max((len(group) for shard in shards for group in shard.query_heads), default=0),
        channels=width,
    )


def share_of(width: int, tensor_parallel_size: int, quantum: int = 1) -> int:
    """Channels of each rank, padding included: the least multiple of `quantum` that does. One rank has no padding."""
    return width if tensor_parallel_size == 1 else -(-width // (tensor_parallel_size * quantum)) * quantum


def has_ragged_experts(layer: LayerGeometry, tensor_parallel_size: int) -> bool:
    """Whether the layer has experts that vLLM's own expert layer cannot hold: of different widths, of none, or of one
    that the ranks do not divide."""
    return bool(layer.expert_intermediate_sizes) and (
        not layer.expert_width or layer.expert_width % tensor_parallel_size != 0
    )


def shard_experts(widths: tuple[int, ...], tensor_parallel_size: int, quantum: int = 1) -> list[list[range]]:
    """For each rank the channels that it holds of each expert, of which `widths` are the channels in all.

    Every expert is shared out as evenly as it goes, and what is left over goes round the ranks, so that two ranks
    differ by one channel at most, of an expert and of all experts together. Nothing is padded.

    Args:
        quantum: an expert is cut at multiples of so many channels only; "one channel" is then one such run.
    """
    held: list[list[range]] = [[] for _ in range(tensor_parallel_size)]
    turn = 0  # the rank whose turn it is to take one more
    for width in widths:
        share, rest = divmod(-(-width // quantum), tensor_parallel_size)
        start = 0
        for rank, channels in enumerate(held):
            stop = start + quantum * (share + ((rank - turn) % tensor_parallel_size < rest))
            channels.append(range(min(start, width), min(stop, width)))
            start = stop
        turn = (turn + rest) % tensor_parallel_size
    return held


Assignment = list[list[tuple[int, range]]]  # for each rank: KV heads, each with query heads that read it there


def _spread_kv_heads(groups: tuple[int, ...], ranks: int) -> Assignment:
    """At least as many KV heads as ranks: each KV head on one rank."""
    most = -(-len(groups) // ranks)
    assigned: list[list[int]] = [[] for _ in range(ranks)]
    if len(set(groups)) == 1:  # as stock layers do it
        for head in range(len(groups)):
            assigned[head // most].append(head)
    else:
        for head in sorted(range(len(groups)), key=lambda head: -groups[head]):
            free = [heads for heads in assigned if len(heads) < most]
            min(free, key=lambda heads: sum(groups[other] for other in heads)).append(head)
    queries = _query_heads(groups)
    return [[(head, queries[head]) for head in sorted(heads)] for heads in assigned]


def _repeat_kv_heads(groups: tuple[int, ...], ranks: int) -> Assignment:
    """Fewer KV heads than ranks: each KV head on several ranks, more for larger groups, which share its query heads."""
    if not groups:
        return [[] for _ in range(ranks)]
    copies = [1] * len(groups)
    for _ in range(ranks - len(groups)):
        copies[max(range(len(groups)), key=lambda head: -(-groups[head] // copies[head]))] += 1
    assigned = []
    for head, queries in enumerate(_query_heads(groups)):
        share = -(-len(queries) // copies[head])
        assigned += [[(head, queries[copy * share : (copy + 1) * share])] for copy in range(copies[head])]
    return assigned


def _query_heads(groups: tuple[int, ...]) -> list[range]:
    """The query heads of each KV head; a layer's query heads are numbered group by group."""
    ends = [sum(groups[: head + 1]) for head in range(len(groups))]
    return [range(end - size, end) for end, size in zip(ends, groups, strict=True)]


def _padded(heads, length: int) -> list[int]:
    return [*heads, *[PAD] * (length - len(heads))]

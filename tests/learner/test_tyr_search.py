"""Tyr's search: its mutations, its stages, and the text that they read; see test_tyr.py for whole runs."""

from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.methods.tyr.search import Space, draw, next_parent

TOKENS = torch.randint(256, (8, 32), generator=torch.Generator().manual_seed(3))


@given(st.data())
def test_mutations_never_leave_the_budget(data):
    kinds = data.draw(st.lists(st.sampled_from(["head", "channel"]), min_size=1, max_size=8))
    intervals = {"head": data.draw(st.integers(1, 3)), "channel": data.draw(st.integers(1, 50))}
    centre = tuple(data.draw(st.integers(0, 8 if kind == "head" else 400)) for kind in kinds)
    limit = [8 if kind == "head" else 400 for kind in kinds]
    levels = [
        [count + step * intervals[kind] for step in range(-4, 5) if 0 <= count + step * intervals[kind] <= most]
        for count, kind, most in zip(centre, kinds, limit, strict=True)
    ]
    space, random = Space(kinds, [intervals[kind] for kind in kinds], levels), Random(data.draw(st.integers()))
    genome = centre
    for _ in range(20):
        genome = space.mutate(genome, random)
        for kind in set(kinds):
            assert sum(n for n, kind_of_gene in zip(genome, kinds, strict=True) if kind_of_gene == kind) == sum(
                n for n, kind_of_gene in zip(centre, kinds, strict=True) if kind_of_gene == kind
            )
        assert all(count in level for count, level in zip(genome, levels, strict=True))
    children = space.offspring(genome, 10, random)
    assert len(set(children)) == len(children) <= 10 and genome not in children


def test_the_search_finds_what_scores_best():
    """The score wants units of the first sublayers kept; noise that falls with the text read must not mislead it."""
    space = Space(["channel"] * 6, [1] * 6, [range(10)] * 6)
    parent, noise, read = (5,) * 6, Random(1), []

    def score(genomes, tokens):
        read.append((len(genomes), tokens))
        return [sum(n * (6 - i) for i, n in enumerate(genome)) + noise.gauss(0, 64 / tokens) for genome in genomes]

    for generation in range(40):
        parent, _ = next_parent(parent, space.offspring(parent, 40, Random(generation)), 640, score)
    assert read[:3] == [(40, 10), (16, 80), (5, 640)]
    assert parent == (0, 0, 3, 9, 9, 9) and sum(parent) == 30


def test_the_parent_stays_where_no_child_is_better_and_nan_is_worst():
    assert next_parent((1, 1), [(0, 2), (2, 0)], 64, lambda genomes, _: [g[0] % 2 == 0 for g in genomes])[0] == (1, 1)
    assert next_parent((1, 1), [(0, 2)], 64, lambda genomes, _: [float("nan"), 5.0])[0] == (1, 1)
    assert next_parent((1, 1), [], 64, lambda genomes, _: [3.0])[0] == (1, 1), "no children in a space of one"


def test_text_of_a_stage():
    assert draw(TOKENS, 100, Random(0)).shape == (3, 32)
    assert torch.equal(draw(TOKENS, 10**6, Random(0)), TOKENS), "no more than there is, none twice"
    assert draw(TOKENS, 10, Random(0)).shape == (1, 10)

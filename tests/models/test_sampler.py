"""Multi-scale batches: the published sizes, every picture once, ranks in step, epochs interrupted."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from mvmodels import MultiScaleBatchSampler, Resized, multi_scale_sizes

BASE_256 = [(160, 160, 327), (192, 192, 227), (256, 256, 128), (288, 288, 101), (320, 320, 81)]
BASE_224 = [(160, 160, 250), (192, 192, 174), (224, 224, 128), (256, 256, 98), (288, 288, 77), (320, 320, 62)]


def test_sizes_of_the_published_recipe():
    assert multi_scale_sizes(128) == BASE_256
    assert multi_scale_sizes(128, base=224) == BASE_224


def test_fixed_batches():
    assert multi_scale_sizes(128, variable=False) == [(h, w, 128) for h, w, _ in BASE_256]


def test_heights_go_with_widths():
    """Pairs, not the product; of lists that differ in length the shorter decides."""
    sizes = multi_scale_sizes(64, base=(256, 320), minimum=(160, 200), maximum=(320, 400))
    assert [(h, w) for h, w, _ in sizes] == [(160, 192), (192, 256), (256, 288), (256, 320), (288, 352), (320, 416)]
    assert all(b == int(round(64 * 256 * 320 / (h * w), 2)) for h, w, b in sizes)
    uneven = multi_scale_sizes(64, base=(256, 240))
    assert [(h, w) for h, w, _ in uneven] == [(160, 160), (192, 192), (256, 256), (256, 288), (288, 320)]


def test_one_size():
    assert multi_scale_sizes(10, base=64, minimum=64, maximum=64) == [(64, 64, 10)]
    assert multi_scale_sizes(1, base=32, minimum=512, maximum=512, scales=1)[-1] == (512, 512, 1)  # never empty


def test_a_tenth_at_most_is_lost():
    assert multi_scale_sizes(8, base=47, minimum=47, maximum=47, divisor=32)[0][:2] == (64, 64)
    assert multi_scale_sizes(8, base=8, minimum=8, maximum=8, divisor=32)[0][:2] == (32, 32)


runs = st.fixed_dictionaries(
    {
        "data": st.integers(1, 300),
        "batch_size": st.integers(1, 40),
        "ranks": st.integers(1, 5),
        "seed": st.integers(0, 9),
    }
)


def ranks_of(run: dict, **options) -> list[MultiScaleBatchSampler]:
    return [
        MultiScaleBatchSampler(**run, rank=rank, base=64, minimum=32, maximum=96, **options)
        for rank in range(run["ranks"])
    ]


@settings(max_examples=30, deadline=None)
@given(run=runs, epoch=st.integers(0, 5), variable=st.booleans())
def test_ranks_are_in_step(run, epoch, variable):
    """At each step every rank has as many pictures, of one size; together they see all of them."""
    samplers = ranks_of(run, variable=variable)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    epochs = [list(sampler) for sampler in samplers]
    assert len({len(batches) for batches in epochs}) == 1 and len(epochs[0]) == len(samplers[0])
    shapes = {(h, w): batch for h, w, batch in samplers[0].sizes}
    for step in zip(*epochs):
        (size,) = {(h, w) for batch in step for _, h, w in batch}
        assert [len(batch) for batch in step] == [shapes[size]] * run["ranks"]
    seen = [index for batches in epochs for batch in batches for index, _, _ in batch]
    assert set(seen) == set(range(run["data"]))
    # Nothing repeats but what fills the last step, and evens out the ranks.
    share = math.ceil(run["data"] / run["ranks"])
    shares = [[i for batch in batches for i, _, _ in batch][:share] for batches in epochs]
    assert max(Counter(i for part in shares for i in part).values()) <= math.ceil(share * run["ranks"] / run["data"])


def test_the_last_batch_is_filled_from_the_front():
    sampler = MultiScaleBatchSampler(10, sizes=[(32, 32, 4)])
    batches = list(sampler)
    first = [index for batch in batches for index, _, _ in batch]
    assert len(batches) == 3 and first[10:] == first[:2]
    unshuffled = MultiScaleBatchSampler(3, sizes=[(32, 32, 8)], shuffle=False)
    assert [i for i, _, _ in next(iter(unshuffled))] == [0, 1, 2, 0, 1, 2, 0, 1]


def test_epochs_differ_and_repeat():
    def epoch(number: int, seed: int = 0) -> list:
        sampler = MultiScaleBatchSampler(100, 8, seed=seed)
        sampler.set_epoch(number)
        return list(sampler)

    assert epoch(1) == epoch(1)
    assert epoch(1) != epoch(2) and epoch(1) != epoch(1, seed=1)
    drawn = {size for number in range(20) for batch in epoch(number) for size in {(h, w) for _, h, w in batch}}
    assert drawn == {(h, w) for h, w, _ in BASE_256}


@settings(max_examples=20, deadline=None)
@given(run=runs, data=st.data())
def test_an_interrupted_epoch_goes_on(run, data):
    sampler = ranks_of(run)[0]
    sampler.set_epoch(3)
    whole = list(sampler)
    done = data.draw(st.integers(0, len(whole)))
    sampler.set_epoch(3)
    batches = iter(sampler)
    for _ in range(done):
        next(batches)
    state = sampler.state_dict()
    assert state == sampler.state_dict(done) == {"epoch": 3, "start": done, "seed": run["seed"]}
    other = ranks_of(run)[0]
    other.load_state_dict(state)
    assert len(other) == len(whole) - done
    assert list(other) == whole[done:]
    assert list(other) == whole  # a second pass is a whole one


def test_a_state_of_another_seed():
    with pytest.raises(ValueError, match="the state has seed 1, the sampler 0"):
        MultiScaleBatchSampler(4).load_state_dict({"epoch": 0, "start": 0, "seed": 1})


def test_in_a_loader():
    """Each batch of any data set comes out at its own size, with the right labels."""
    pictures = torch.arange(20.0)[:, None, None, None].expand(20, 3, 8, 8)
    data = Resized(TensorDataset(pictures, torch.arange(20)))
    sampler = MultiScaleBatchSampler(data, 4, base=16, minimum=8, maximum=24, divisor=8)
    shapes = set()
    for x, y in DataLoader(data, batch_sampler=sampler, num_workers=0):
        assert torch.equal(x, y.float()[:, None, None, None].expand_as(x))
        shapes.add((*x.shape[2:], len(x)))
    assert shapes <= set(sampler.sizes) and len(shapes) > 1
    assert len(data) == 20 and torch.equal(data[3][0], pictures[3])


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"data": 0}, "data is empty"),
        ({"data": 4, "batch_size": 0}, "batch_size is 0"),
        ({"data": 4, "minimum": 320, "maximum": 160}, "minimum is 320, above the maximum of 160"),
        ({"data": 4, "base": (0, 32)}, "base is"),
        ({"data": 4, "rank": 2, "ranks": 2}, "rank is 2, want 0 <= rank < ranks = 2"),
        ({"data": 4, "sizes": []}, "sizes is"),
        ({"data": 4, "sizes": [(32, 32, 0)]}, "sizes is"),
    ],
    ids=str,
)
def test_bad_arguments(arguments, match):
    with pytest.raises(ValueError, match=match):
        MultiScaleBatchSampler(**arguments)

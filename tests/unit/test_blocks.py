"""Blocks: whatever the parameters and bucket size, the plan partitions them exactly and means the same on all ranks."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bucketmoo_ds
from bucketmoo_ds import ops
from bucketmoo_ds.errors import ConfigError
from bucketmoo_ds.plan import blocks
from bucketmoo_ds.plan.blocks import BlockPlan, Parameter, granularity, layer_block, plan_blocks

KNOWN = ("bucket", "parameter", "layer", "model")

parameter_lists = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from("abc"), st.integers(1, 40)), min_size=1, max_size=14
).map(
    lambda found: [
        Parameter(f"model.layers.{layer}.{module}.p{number}" if layer else f"model.{module}.p{number}", numel)
        for number, (layer, module, numel) in enumerate(found)
    ]
)
plans = st.builds(plan_blocks, parameter_lists, st.integers(1, 120), st.sampled_from(KNOWN))


def shards_of(numel: int, world_size: int) -> list[tuple[int, int]]:
    """Shards as the exchange cuts them: equal, at multiples of 8, the last ones partly or wholly padding."""
    size = math.ceil(numel / world_size / 8) * 8
    return [(rank * size, (rank + 1) * size) for rank in range(world_size)]


@settings(deadline=None)
@given(plan=plans)
def test_every_parameter_is_in_one_bucket_in_order(plan: BlockPlan) -> None:
    members = [index for bucket in reversed(plan.buckets) for index in bucket.parameters]
    assert members == list(range(len(plan.parameters)))
    for bucket in plan.buckets:
        position = 0
        for index, offset in zip(bucket.parameters, bucket.offsets, strict=True):
            assert offset == position
            position += plan.parameters[index].numel
        assert bucket.numel == position


@settings(deadline=None)
@given(parameters=parameter_lists, size=st.integers(1, 120))
def test_buckets_are_filled_greedily(parameters: list[Parameter], size: int) -> None:
    plan = plan_blocks(parameters, size, "bucket")
    for bucket in plan.buckets:
        assert bucket.numel <= size or len(bucket.parameters) == 1
    for earlier, later in zip(plan.buckets, plan.buckets[1:], strict=False):
        next_one = parameters[later.parameters[-1]].numel
        assert earlier.numel + next_one > size, "the next parameter would have fitted"


@settings(deadline=None)
@given(plan=plans, world_size=st.integers(1, 5))
def test_segments_partition_every_bucket_and_block(plan: BlockPlan, world_size: int) -> None:
    in_blocks = [0] * len(plan.blocks)
    for number, bucket in enumerate(plan.buckets):
        cells = plan.cells_of(number)
        found = torch.full((bucket.numel,), -1)
        for start, stop in shards_of(bucket.numel, world_size):
            segments = plan.segments(number, start, stop)
            assert segments.num_cells == len(cells)
            assert segments.spans.shape == (len(segments.cells), 2)
            end = 0
            for (begin, length), cell in zip(segments.spans.tolist(), segments.cells.tolist(), strict=True):
                assert length > 0
                assert begin >= end, "ascending, without overlap"
                end = begin + length
                assert end <= stop - start
                assert (found[start + begin : start + end] == -1).all()
                found[start + begin : start + end] = plan.cell_block[cells[cell]]
        expected = torch.cat([
            torch.full((plan.parameters[index].numel,), plan.block_of[index]) for index in bucket.parameters
        ])
        assert torch.equal(found, expected)
        for block in found.tolist():
            in_blocks[block] += 1
    sizes = [0] * len(plan.blocks)
    for parameter, block in zip(plan.parameters, plan.block_of, strict=True):
        sizes[block] += parameter.numel
    assert in_blocks == sizes
    assert min(sizes) > 0, "a block without an element"


@settings(deadline=None)
@given(plan=plans)
def test_cells(plan: BlockPlan) -> None:
    """A cell for every (block, bucket) that meet, those of a bucket side by side, buckets in order."""
    expected = {
        (plan.block_of[index], number) for number, bucket in enumerate(plan.buckets) for index in bucket.parameters
    }
    cells = list(zip(plan.cell_block, plan.cell_bucket, strict=True))
    assert len(cells) == len(set(cells))
    assert set(cells) == expected
    assert list(plan.cell_bucket) == sorted(plan.cell_bucket)
    assert plan.spans_buckets == any(
        len({bucket for block, bucket in cells if block == wanted}) > 1 for wanted in range(len(plan.blocks))
    )


@settings(deadline=None)
@given(parameters=parameter_lists, size=st.integers(1, 120))
def test_granularities(parameters: list[Parameter], size: int) -> None:
    plan = {granularity: plan_blocks(parameters, size, granularity) for granularity in KNOWN}
    assert len({tuple(one.buckets) for one in plan.values()}) == 1, "buckets do not depend on the granularity"
    names = [parameter.name for parameter in parameters]
    assert plan["model"].blocks == ("model",)
    assert plan["model"].block_of == (0,) * len(names)
    assert plan["parameter"].blocks == tuple(names)
    assert plan["parameter"].block_of == tuple(range(len(names)))
    layers = [layer_block(name, "") for name in names]
    assert [plan["layer"].blocks[block] for block in plan["layer"].block_of] == layers
    assert list(plan["bucket"].blocks) == [bucket.name for bucket in reversed(plan["bucket"].buckets)]
    for bucket in plan["bucket"].buckets:
        own = {plan["bucket"].block_of[index] for index in bucket.parameters}
        assert own == {plan["bucket"].blocks.index(bucket.name)}
    assert not plan["bucket"].spans_buckets
    assert not plan["parameter"].spans_buckets


@settings(deadline=None, max_examples=50)
@given(plan=plans, world_size=st.integers(1, 5), count=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_grams_of_shards_add_up_to_the_grams_of_blocks(plan: BlockPlan, world_size: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = [torch.randn(count, one.numel, generator=generator, dtype=torch.float64) for one in plan.parameters]
    total = torch.zeros(len(plan.blocks), count, count, dtype=torch.float64)
    for number, bucket in enumerate(plan.buckets):
        flat = torch.cat([gradients[index] for index in bucket.parameters], dim=1)
        for start, stop in shards_of(bucket.numel, world_size):
            shard = torch.full((count, stop - start), float("nan"), dtype=torch.float64)  # padding must not be read
            inside = flat[:, start : min(stop, bucket.numel)]
            shard[:, : inside.shape[1]] = inside
            segments = plan.segments(number, start, stop)
            grams = ops.gram(list(shard), segments.spans, segments.cells, segments.num_cells)
            for cell, gram in zip(plan.cells_of(number), grams, strict=True):
                total[plan.cell_block[cell]] += gram
    for block in range(len(plan.blocks)):
        rows = torch.cat([g for g, of in zip(gradients, plan.block_of, strict=True) if of == block], dim=1)
        # float64 sums of at most 560 products in another order: 560 * 2^-53 of the sum of their sizes.
        torch.testing.assert_close(total[block], rows @ rows.T, rtol=0, atol=1e-13 * float(rows.abs().sum()) ** 2)


@settings(deadline=None)
@given(parameters=parameter_lists, size=st.integers(1, 120), granularity=st.sampled_from(KNOWN))
def test_fingerprint(parameters: list[Parameter], size: int, granularity: str) -> None:
    plan = plan_blocks(parameters, size, granularity)
    again = plan_blocks([Parameter(p.name, p.numel) for p in parameters], size, granularity)
    assert again == plan
    assert again.fingerprint() == plan.fingerprint()
    renamed = [dataclasses.replace(parameters[0], name=parameters[0].name + "x"), *parameters[1:]]
    grown = [*parameters[:-1], dataclasses.replace(parameters[-1], numel=parameters[-1].numel + 1)]
    others = [
        plan_blocks(renamed, size, granularity),
        plan_blocks(grown, size, granularity),
        plan_blocks(parameters, size, KNOWN[KNOWN.index(granularity) - 1]),
    ]
    if len(plan.buckets) > 1:
        others.append(plan_blocks(parameters, 10**6, granularity))
    assert plan.fingerprint() not in {other.fingerprint() for other in others}
    assert len({other.fingerprint() for other in others}) == len(others)


def test_fingerprint_is_the_same_on_every_machine() -> None:
    """It is kept in checkpoints, so a change of this value makes old ones unreadable: raise checkpoint.FORMAT then."""
    plan = plan_blocks([Parameter("embed.weight", 12), Parameter("layers.0.weight", 30)], 32, "layer")
    assert plan.fingerprint() == "6c275df261a56d9f"


@settings(deadline=None)
@given(plan=plans)
def test_plan_is_plain_json(plan: BlockPlan) -> None:
    written = plan.to_json()
    assert json.loads(json.dumps(written)) == written
    assert sum(bucket["numel"] for bucket in written["buckets"]) == sum(one.numel for one in plan.parameters)
    assert sum(bucket["parameters"] for bucket in written["buckets"]) == len(plan.parameters)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.31.self_attn.q_proj.weight", "model.layers.31"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3"),
        ("model.embed_tokens.weight", "model.embed_tokens"),
        ("model.norm.weight", "model.norm"),
        ("lm_head.weight", "lm_head"),
        ("transformer.h.3.attn.c_attn.weight", "transformer.h.3"),
        ("transformer.wte.weight", "transformer.wte"),
        ("transformer.ln_f.bias", "transformer.ln_f"),
        ("bert.encoder.layer.11.attention.self.query.bias", "bert.encoder.layer.11"),
        ("bert.embeddings.word_embeddings.weight", "bert.embeddings.word_embeddings"),
        ("encoder.block.0.layer.1.DenseReluDense.wi.weight", "encoder.block.0"),
        ("decoder.block.5.layer.0.SelfAttention.q.weight", "decoder.block.5"),
        ("shared.weight", "shared"),
        ("base_model.model.model.layers.7.self_attn.v_proj.lora_A.default.weight", "base_model.model.model.layers.7"),
        ("0.weight", "0"),
        ("logit_scale", "logit_scale"),
    ],
)
def test_layer_block(name: str, layer: str) -> None:
    assert layer_block(name, "bucket 0") == layer


def test_tied_names_of_two_layers_do_not_meet() -> None:
    names = ["layers.1.w", "layers.11.w", "layers.1.v"]
    plan = plan_blocks([Parameter(name, 3) for name in names], 100, "layer")
    assert plan.block_of == (0, 1, 0)


def test_layers_split_by_another_layer_keep_their_segments_apart() -> None:
    plan = plan_blocks([Parameter("a.0.w", 3), Parameter("b.0.w", 4), Parameter("a.0.v", 5)], 100, "layer")
    segments = plan.segments(0, 0, 16)
    assert segments.spans.tolist() == [[0, 3], [3, 4], [7, 5]]
    assert segments.cells.tolist() == [0, 1, 0]


def test_a_shard_of_padding_only_has_no_segment() -> None:
    plan = plan_blocks([Parameter("w", 5)], 100, "model")
    segments = plan.segments(0, 8, 16)
    assert segments.spans.shape == (0, 2)
    assert segments.cells.shape == (0,)
    assert segments.num_cells == 1


@settings(deadline=None)
@given(parameters=parameter_lists, size=st.integers(1, 120), data=st.data())
def test_any_function_of_the_names_is_a_granularity(
    parameters: list[Parameter], size: int, data: st.DataObject
) -> None:
    """Blocks are its labels, in the model's order, and a parameter lies in the block of its own."""
    buckets = plan_blocks(parameters, size, "bucket").blocks
    labels = {(each.name, bucket): data.draw(st.sampled_from("xyz")) for each in parameters for bucket in buckets}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(blocks.GRANULARITIES, "drawn", lambda parameter, bucket: labels[parameter, bucket])
        plan = plan_blocks(parameters, size, "drawn")
    bucket_of = {index: bucket.name for bucket in plan.buckets for index in bucket.parameters}
    expected = [labels[each.name, bucket_of[index]] for index, each in enumerate(parameters)]
    assert [plan.blocks[block] for block in plan.block_of] == expected
    assert list(plan.blocks) == list(dict.fromkeys(expected))


def test_a_granularity_is_known_by_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "GRANULARITIES", dict(blocks.GRANULARITIES))

    @granularity("module")
    def module(parameter: str, bucket: str) -> str:
        return parameter.rpartition(".")[0]

    plan = plan_blocks([Parameter("a.b.w", 3), Parameter("a.b.v", 4), Parameter("a.w", 5)], 100, "module")
    assert (plan.blocks, plan.block_of) == (("a.b", "a"), (0, 0, 1))
    with pytest.raises(ValueError, match=r'granularity\("layer"\): the name already belongs to layer_block'):
        granularity("layer")(module)
    with pytest.raises(ValueError, match=r'granularity\("refined"\): the name is that of'):
        granularity("refined")(module)


def test_an_unknown_granularity_says_what_was_meant() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_blocks([Parameter("w", 5)], 10, "buckets")
    assert str(caught.value) == (
        'bucket_moo.granularity = "buckets": unknown, expected one of "bucket", "parameter", "layer", "model", '
        '"refined"; did you mean "bucket"?'
    )


def test_a_run_with_an_unknown_granularity_does_not_start() -> None:
    config = bucketmoo_ds.BucketMOOConfig(languages=["de", "fr"], granularity="layers")
    with pytest.raises(ConfigError, match='granularity = "layers": unknown'):
        bucketmoo_ds.single.register(torch.nn.Linear(2, 2), config, micro_steps=2)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        plan_blocks([], 10, "bucket")
    with pytest.raises(ConfigError, match=r"zero_optimization.reduce_bucket_size = 0: expected at least 1"):
        plan_blocks([Parameter("w", 5)], 0, "bucket")

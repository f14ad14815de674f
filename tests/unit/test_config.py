"""The `bucket_moo` section: strict, with errors that say what to write instead."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import string
from typing import Any

import deepspeed.runtime.constants as deepspeed_constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bucketmoo_ds.config import AUTOMATIC, CHOICES, SECTION, BucketMOOConfig, check_section_name
from bucketmoo_ds.errors import BucketMOOError, ConfigError

GOOD: dict[str, Any] = {"languages": ["de", "fr"]}

# Top-level keys of DeepSpeed's documentation and of config.py that have no constant of their own.
TOP_LEVEL = [
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "bfloat16", "checkpoint", "comms_logger",
    "communication_data_type", "compile", "compression_training", "csv_monitor", "curriculum_learning",
    "data_efficiency", "data_types", "dataloader_drop_last", "disable_allgather", "dump_state", "eigenvalue",
    "elasticity", "flops_profiler", "fp16", "fp32_allreduce", "gradient_accumulation_steps", "gradient_allreduce_op",
    "gradient_clipping", "gradient_predivide_factor", "hybrid_engine", "load_universal_checkpoint",
    "managed_gradient_accumulation", "memory_breakdown", "monitor_config", "nebula", "optimizer", "pipeline",
    "prescale_gradients", "progressive_layer_drop", "quantize_training", "scheduler",
    "seq_parallel_communication_data_type", "sequence_parallel_size", "sparse_attention", "sparse_gradients",
    "steps_per_print", "tensor_parallel", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "use_data_before_expert_parallelism", "use_node_local_storage",
    "vocabulary_size", "wall_clock_breakdown", "wandb", "weight_quantization", "zenflow",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "zero_optimization", "moe", "bucket_size",
    "buckets", "comet",
]


def section(**changes: Any) -> dict[str, Any]:
    return GOOD | changes


def error_of(value: object) -> str:
    with pytest.raises(ConfigError) as caught:
        BucketMOOConfig.from_section(value)
    return str(caught.value)


def test_defaults() -> None:
    config = BucketMOOConfig.from_section(GOOD)
    assert config is not None
    assert config.languages == ("de", "fr")
    assert (config.aggregator, config.granularity, config.mode) == ("upgrad", "bucket", "auto")
    assert (config.weighting, config.normalize, config.rescale) == ("language", "none", "none")


def test_absent_section_is_none() -> None:
    assert BucketMOOConfig.from_section(None) is None


def test_disabled_is_none_but_checked() -> None:
    assert BucketMOOConfig.from_section(section(enabled=False)) is None
    assert "bucket_moo.weighting" in error_of(section(enabled=False, weighting="languages"))
    assert "bucket_moo.languages: missing" in error_of({"enabled": False})


@pytest.mark.parametrize("value", [True, "de", ["de"], 3])
def test_section_that_is_no_object(value: object) -> None:
    message = error_of(value)
    assert message.startswith(f"bucket_moo = {value!r}: expected an object")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("agregator", "aggregator"), ("langauges", "languages"), ("Granularity", "granularity"), ("seeds", "seed")],
)
def test_unknown_key_says_what_was_meant(wrong: str, meant: str) -> None:
    message = error_of(section(**{wrong: 1}))
    assert message.startswith(f'bucket_moo.{wrong}: unknown setting; did you mean "{meant}"?')
    assert "known: languages, enabled, aggregator" in message


def test_unknown_key_far_from_all_has_no_guess() -> None:
    message = error_of(section(zzz=1))
    assert "bucket_moo.zzz: unknown setting" in message
    assert "did you mean" not in message


@pytest.mark.parametrize("setting", sorted(CHOICES))
def test_choices(setting: str) -> None:
    for value in CHOICES[setting]:
        config = BucketMOOConfig.from_section(section(**{setting: value}))
        assert config is not None
        assert getattr(config, setting) == value
    last = CHOICES[setting][-1]
    message = error_of(section(**{setting: last + "x"}))
    assert f'bucket_moo.{setting} = "{last}x": unknown, expected one of' in message
    assert f'did you mean "{last}"?' in message


@pytest.mark.parametrize(
    ("setting", "value", "expected"),
    [
        ("enabled", "true", "expected true or false, got str"),
        ("enabled", 1, "expected true or false, got int"),
        ("shift_labels", 0, 'expected true, false or "auto", got int'),
        ("aggregator", None, "expected a name in quotes, got NoneType"),
        ("granularity", 3, "expected a name in quotes, got int"),
        ("mode", True, "expected a name in quotes, got bool"),
        ("backend", ["reference"], "expected a name in quotes, got list"),
        ("aggregator_options", [1], "expected an object of option names and values, got list"),
        ("language_key", 5, "expected the name of an entry of a batch, got int"),
        ("language_key", "", "expected the name of an entry of a batch"),
        ("seed", 1.0, "expected a whole number, got float"),
        ("seed", "1", "expected a whole number, got str"),
        ("seed", True, "expected a whole number from 0"),
        ("seed", -1, "expected a whole number from 0"),
        ("seed", 2**63, "expected a whole number from 0"),
    ],
)
def test_wrong_types_and_ranges(setting: str, value: object, expected: str) -> None:
    message = error_of(section(**{setting: value}))
    assert message.startswith(f"bucket_moo.{setting} = ")
    assert expected in message


@pytest.mark.parametrize("setting", ["aggregator", "granularity", "weighting", "normalize", "rescale", "seed"])
def test_auto_is_refused_where_it_means_nothing(setting: str) -> None:
    assert f'bucket_moo.{setting} = "auto": has no automatic value' in error_of(section(**{setting: "auto"}))
    with pytest.raises(ConfigError, match=rf'bucket_moo\.{setting} = "auto": has no automatic value'):
        BucketMOOConfig(**section(**{setting: "auto"}))


def test_auto_languages_are_refused() -> None:
    assert 'bucket_moo.languages = "auto"' in error_of({"languages": "auto"})


@pytest.mark.parametrize("setting", AUTOMATIC)
def test_auto_is_a_value_of(setting: str) -> None:
    assert BucketMOOConfig.from_section(section(**{setting: "auto"})) is not None


@pytest.mark.parametrize(
    ("languages", "expected"),
    [
        ([], "bucket_moo.languages = []: expected at least one language"),
        ([f"l{index}" for index in range(513)], "513 names; expected at most 512"),
        ("de", "expected a list of names"),
        ({"de": 1}, "expected a list of names"),
        (3, "expected a list of names"),
        (["de", ""], "'' is not a name"),
        (["de", 3], "3 is not a name"),
        (["de", None], "None is not a name"),
        ([["de"]], "['de'] is not a name"),
        (["de", "fr", "de"], '"de" stands there 2 times; name it once'),
    ],
)
def test_bad_languages(languages: object, expected: str) -> None:
    assert expected in error_of({"languages": languages})


def test_as_many_languages_as_are_allowed() -> None:
    assert len(BucketMOOConfig(languages=tuple(f"l{index}" for index in range(512))).languages) == 512


def test_missing_languages() -> None:
    assert error_of({"aggregator": "mgda"}).startswith("bucket_moo.languages: missing")


def test_an_error_is_both_ours_and_a_value_error() -> None:
    assert issubclass(ConfigError, BucketMOOError)
    assert issubclass(ConfigError, ValueError)


def test_keyword_arguments_are_checked_alike() -> None:
    with pytest.raises(ConfigError, match=r'bucket_moo\.weighting = "tokens": unknown'):
        BucketMOOConfig(languages=("de",), weighting="tokens")
    with pytest.raises(ConfigError, match=r'bucket_moo\.langauges: unknown setting; did you mean "languages"\?'):
        BucketMOOConfig(langauges=("de",))
    with pytest.raises(ConfigError, match=r"bucket_moo\.languages: missing"):
        BucketMOOConfig(aggregator="mean")
    with pytest.raises(ConfigError, match=r'bucket_moo\.sede: unknown setting; did you mean "seed"\?'):
        dataclasses.replace(BucketMOOConfig(languages=("de",)), sede=1)


@pytest.mark.parametrize("setting", [field.name for field in dataclasses.fields(BucketMOOConfig)])
def test_null_is_no_value_but_of_shift_labels(setting: str) -> None:
    if setting == "shift_labels":  # asks the model
        assert BucketMOOConfig(**GOOD | {setting: None}) == BucketMOOConfig(**GOOD | {setting: "auto"})
    else:
        assert error_of(GOOD | {setting: None}).startswith(f"bucket_moo.{setting} = None: expected ")


def test_copies_are_equal() -> None:
    config = BucketMOOConfig(languages=("de", "fr"), seed=3)
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config) == config


names = st.text(min_size=1, max_size=8)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
configs = st.builds(
    BucketMOOConfig,
    languages=st.lists(names, min_size=1, max_size=12, unique=True),
    aggregator=names.filter(lambda name: name != "auto"),
    aggregator_options=st.dictionaries(names, json_values, max_size=3),
    granularity=names.filter(lambda name: name != "auto"),
    backend=names,
    language_key=names.filter(lambda name: name != "auto"),
    shift_labels=st.sampled_from([True, False, None]),
    seed=st.integers(0, 2**63 - 1),
    **{setting: st.sampled_from(values) for setting, values in CHOICES.items()},
)


@settings(deadline=None)
@given(config=configs)
def test_json_round_trip(config: BucketMOOConfig) -> None:
    assert BucketMOOConfig.from_section(json.loads(json.dumps(config.to_json()))) == config


@settings(deadline=None)
@given(config=configs)
def test_to_json_shares_nothing_with_the_config(config: BucketMOOConfig) -> None:
    before = json.dumps(config.to_json(), sort_keys=True)
    written = config.to_json()
    written["languages"].append("new")
    written["aggregator_options"]["new option"] = 1
    assert json.dumps(config.to_json(), sort_keys=True) == before


@pytest.mark.parametrize(
    "name",
    [
        "bucketmoo",
        "bucket-moo",
        "BucketMOO",
        "bucketMoo",
        "BUCKET_MOO",
        "Bucket_Moo",
        "bucket_mo",
        "bucket_mooo",
        "bucket_noo",
        "buckt_moo",
        "buket_moo",
        "bukcet_moo",
        "bucket_omo",
        "buckets_moo",
        "bucket.moo",
        "bucket moo",
        " bucket_moo",
        "_bucket_moo_",
        "bucketmoo_ds",
        "bucketmoo-ds",
        "moo_bucket",
        "moo",
        "MOO",
        "moo_config",
        "mooConfig",
        "ds_moo",
        "bucketed_moo",
        "bucket_level_moo",
        "bucketwise-moo",
        "bucket_moo_config",
        "bucketMOOSettings",
        "bucket_mo_config",
        "deepspeed_bucket_moo",
        "moo_weights",
        "bucket_level_multi_objective_optimization",
    ],
)
def test_misspelt_section_names_are_caught(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_section_name({"train_batch_size": 8, name: GOOD})
    assert str(caught.value) == f'"{name}": not a DeepSpeed setting; did you mean "bucket_moo"?'


def test_misspelt_next_to_the_right_name_is_caught() -> None:
    with pytest.raises(ConfigError, match='"bucket-moo"'):
        check_section_name({SECTION: GOOD, "bucket-moo": GOOD})


@st.composite
def one_slip(draw: st.DrawFn) -> str:
    """`bucket_moo` with one letter dropped, added, replaced or swapped, in any case and with any separators."""
    word = "bucketmoo"
    where = draw(st.integers(0, len(word) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase + string.digits))
    word = draw(
        st.sampled_from(
            [
                word[:where] + word[where + 1 :],
                word[:where] + letter + word[where:],
                word[:where] + letter + word[where + 1 :],
                word[:where] + word[where : where + 2][::-1] + word[where + 2 :],
                word,
            ]
        )
    )
    size = len(word)
    separators = draw(st.lists(st.sampled_from(["", "", "", "_", "-", " ", "."]), min_size=size, max_size=size))
    upper = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    parts = zip(word, separators, upper, strict=True)
    return "".join((ch.upper() if big else ch) + between for ch, between, big in parts)


@settings(deadline=None, max_examples=300)
@given(name=one_slip())
def test_any_single_slip_is_caught(name: str) -> None:
    if name == SECTION:
        check_section_name({name: GOOD})
        return
    with pytest.raises(ConfigError, match="did you mean"):
        check_section_name({name: GOOD})


def test_real_deepspeed_keys_are_never_caught() -> None:
    constants = {
        value
        for name, value in vars(deepspeed_constants).items()
        if name.isupper() and isinstance(value, str) and re.fullmatch("[a-z0-9_]+", value)
    }
    assert len(constants) > 50, "DeepSpeed's constants are no longer where this test looks"
    foreign = ["moe", "mood", "moon", "smooth_buckets", "bucket_smoothing", "bucket_moments", "mode", "bucket_mode"]
    foreign += ["multi_objective", "moderation", "comments", "_comment", "mup", "momentum", "moo2x", "bucketing"]
    for key in [SECTION, *constants, *TOP_LEVEL, *foreign]:
        check_section_name({key: {}})

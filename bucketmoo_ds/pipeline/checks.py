"""What cannot be resolved together in a window, and the words that say so. Every rank sees the same slots, so all of
them raise, or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bucketmoo_ds.config import SECTION, BucketMOOConfig
from bucketmoo_ds.data.batch import Slot
from bucketmoo_ds.errors import ConfigError, LanguageError
from bucketmoo_ds.pipeline.window import Window
from bucketmoo_ds.plan import refined
from bucketmoo_ds.plan.blocks import BlockPlan


def check_languages(window: Window, slots: Sequence[Slot], languages: Sequence[str]) -> None:
    """Raises `LanguageError` where a rank adds up micro-steps of several languages."""
    changed = window.changed_language(slots)
    if changed is not None:
        rank, before = changed
        raise LanguageError(
            f'rank {rank} went from language "{languages[before]}" to "{languages[slots[rank].language]}" within a '
            "window, but gradients are exchanged only at the boundary and would be mixed: keep one language a rank and "
            'window (LanguageBatchSampler(affinity="window")), or exchange them in every micro-step (without '
            "once_a_window, no_sync)"
        )


def check_present(window: Window, config: BucketMOOConfig) -> None:
    """Raises `LanguageError` at the boundary of a window without a target token to train on."""
    if not window.trained:
        alone = f" beside the probe, {config.languages[config.probe]}" if config.probe in window.present else ""
        raise LanguageError(f"no language fed a target token to this window{alone}: there is nothing to resolve")


def check_steers(follows: bool, config: BucketMOOConfig) -> None:
    """Raises `ConfigError` where sampling is to move, and no sampler follows."""
    if config.schedule and not follows:
        raise ConfigError(
            f'{SECTION}.schedule.adapt = "{config.schedule["adapt"]}": no LanguageBatchSampler follows this run, so '
            "nothing would move; make one with this config and call sampler.follow(session) (or the DeepSpeed engine) "
            "before training. Batches of a sampler of your own cannot follow: leave schedule out"
        )


def check_parts(window: Window, mode: str) -> None:
    """Raises `LanguageError` where streaming was asked for and a rank has several languages to exchange."""
    if mode == "streaming" and window.parts > 1:
        raise LanguageError(
            f'{SECTION}.mode = "streaming": a rank went from one language to another within a window, or from one half '
            f'of it to the other ({SECTION}.gram = "cross"), whose parts are then exchanged one after the other; keep '
            'one language (LanguageBatchSampler(affinity="window")), on several ranks where Grams are crossed, or use '
            '"auto"'
        )


def check_left_out(gram: Tensor, plan: BlockPlan, languages: Sequence[str]) -> None:
    """Raises `ConfigError` where a language that was left out of a block has a gradient there, which weight 0 drops.

    Args:
        gram: `[B, K, K]` on the host, alike on all ranks, summed over them.
        plan: says who is left out.
        languages: the K names.
    """
    counting = plan.counting(len(languages))
    if counting is None:
        return
    squares = gram.diagonal(dim1=1, dim2=2)
    found = (~counting & (squares > 0) & squares.isfinite()).nonzero().tolist()
    if found:
        block, language = found[0]
        raise ConfigError(
            f'{refined.USED_BY}: language "{languages[language]}" has a gradient on block "{plan.blocks[block]}", '
            f"of norm {float(squares[block, language]) ** 0.5:.1e} ({len(found)} such pairs in all), which it does not "
            "use by these patterns, so that it would be dropped: name it there, or mend the model; "
            "bucketmoo_ds.probe_dependencies finds who uses what"
        )


def flat_advice(ranks_per_node: int, exchange: str) -> str:
    """Returns what to say where the ranks of a node train on several languages.

    Raises:
        LanguageError: two stages were asked for.
    """
    advice = (
        f"ranks of one node trained on different languages, so that about {ranks_per_node} times the bytes go between "
        f"nodes: lay languages out by node (LanguageBatchSampler(ranks_per_node={ranks_per_node}); bucketmoo plan "
        "shows how)"
    )
    if exchange == "two_stage":
        raise LanguageError(f'{SECTION}.exchange = "two_stage": {advice}, or use "auto"')
    return advice

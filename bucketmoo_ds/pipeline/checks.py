"""What cannot be resolved together in a window, and the words that say so. Every rank sees the same slots, so all of
them raise, or none."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bucketmoo_ds.config import SECTION
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


def check_present(window: Window) -> None:
    """Raises `LanguageError` at the boundary of a window without a target token."""
    if not window.present:
        raise LanguageError("no language fed a target token to this window: there is nothing to resolve")


def check_parts(window: Window, mode: str) -> None:
    """Raises `LanguageError` where streaming was asked for and a rank has several languages to exchange."""
    if mode == "streaming" and window.parts > 1:
        raise LanguageError(
            f'{SECTION}.mode = "streaming": a rank went from one language to another within a window, whose parts are '
            'then exchanged one after the other; keep one language (LanguageBatchSampler(affinity="window")), or use '
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

"""SIGTERM: heard until the end of a window, or told what it costs and obeyed, and given back afterwards."""

from __future__ import annotations

import os
import signal

import pytest

from bucketmoo_ds.integrations.termination import TERMINATED_STATUS, TerminationRequest, unsaved


def test_a_run_that_saves_hears_it_and_gives_it_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with TerminationRequest(save=True) as request:
        assert not request.asked
        signal.raise_signal(signal.SIGTERM)
        assert request.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_run_that_does_not_save_says_what_is_lost(capfd: pytest.CaptureFixture[str]) -> None:
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with TerminationRequest(save=False) as request:
            request.say_what_is_lost(lambda: unsaved(7, 4))
            signal.raise_signal(signal.SIGTERM)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == TERMINATED_STATUS == 143
    assert "ended without saving; 3 finished steps are lost: the latest is of step 4" in capfd.readouterr().err


def test_who_listens_already_goes_on_to() -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with TerminationRequest(save=False) as request:
            request.say_what_is_lost(lambda: unsaved(7, None))
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [signal.SIGTERM]


def test_forks_of_a_run_that_saves_end() -> None:
    """Such as a pool of processes, which waits until they have."""
    with TerminationRequest(save=True) as request:
        process = os.fork()
        if process == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == TERMINATED_STATUS
    assert not request.asked


def test_what_is_lost_is_counted_from_the_latest_checkpoint() -> None:
    assert unsaved(5, None) == "5 finished steps are lost: no checkpoint was saved"
    assert "no finished step is lost" in unsaved(5, 5)

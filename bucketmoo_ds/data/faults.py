"""Faults of a batch: those that the host sees are raised at once, those that a device sees once it has answered."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from bucketmoo_ds.errors import LanguageError
from bucketmoo_ds.transfer import ToHost


@dataclasses.dataclass(frozen=True, eq=False)
class Check:
    """What a device has been asked, and not yet answered.

    Args:
        number: of faults.
        text: of the error where there are any.
    """

    number: ToHost
    text: str


class Faults:
    """Raises what is known to be wrong, and keeps what a device has yet to say.

    Attributes:
        open: what it has yet to say.
    """

    def __init__(self) -> None:
        self.open: list[Check] = []

    def expect_none(self, number: Tensor, text: str) -> None:
        """Expects a number of faults, a tensor without dimensions, to be 0.

        Raises:
            LanguageError: it lies on the host and is not.
        """
        if number.device.type != "cpu":
            self.open.append(Check(ToHost(number), text))
        elif number.item():
            raise LanguageError(text)

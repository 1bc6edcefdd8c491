"""What to make of the warnings that file readers give."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from zoo.errors import ZooError

# A warning after which the recording is not what the file says.
_FATAL = {
    "outside data range": "events beyond the end of the recording",
    "Channel names are not unique": "channel names occur more than once",
}

# A BIDS folder need not have events, and its tables may list channels that the file does not hold (a
# trigger left out); those it holds are checked in `zoo.data.bids`. Only electrodes have a position.
_HARMLESS = (
    "Did not find any events.tsv",
    "are missing in the raw data",
    "does not match the number of channels in the raw data file",
    "Not setting position of",
)


@contextlib.contextmanager
def reader_warnings(file: str) -> Iterator[None]:
    """Turns a reader's warnings of lost or changed data into ZooError, and adds the file's name to others."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        message = " ".join(str(warning.message).split())
        for sign, cause in _FATAL.items():
            if sign in message:
                raise ZooError(f"{file}: {cause} ({message})")
        if not any(sign in message for sign in _HARMLESS):
            warnings.warn(f"{file}: {message}", warning.category, stacklevel=3)

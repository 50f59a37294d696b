"""What is done with bytes that are not text: refused, replaced or left out, and counted.

One policy holds for a whole tokenization: `strict` ends it with the place, `replace` puts U+FFFD
where the bytes are, and `skip` leaves the document out.
"""

from __future__ import annotations

from dataclasses import dataclass

from growkit.errors import GrowkitError, UsageError, did_you_mean

POLICIES = ("strict", "replace", "skip")
REPLACEMENT = "\ufffd"
# What helps against any document that is refused, and against characters that are not text.
SKIP = "--errors skip leaves such documents out and counts them"
REPLACE_OR_SKIP = f"--errors replace puts U+FFFD in its place, and {SKIP}"


@dataclass(frozen=True)
class Faults:
    """What a policy did: characters put in the place of bytes, and documents left out."""

    replaced: int = 0
    skipped: int = 0

    def __add__(self, other: Faults) -> Faults:
        return Faults(self.replaced + other.replaced, self.skipped + other.skipped)

    def __bool__(self) -> bool:
        return self != Faults()


class Cleaner:
    """Applies a policy to one document after another. `take` says what it did."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self._faults = Faults()

    @property
    def is_strict(self) -> bool:
        """Whether JSON must be as its standard says, without control characters in strings."""
        return self.policy != "replace"

    def decode(self, data: bytes, path: str, offset: int) -> str | None:
        """Text from bytes that begin at byte `offset` of a file; None where it is left out."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            place = f"byte {offset + error.start} is 0x{data[error.start]:02x}"
        if self.policy != "replace":
            self.refuse(GrowkitError(f"{path} is not UTF-8 text: {place}"), REPLACE_OR_SKIP)
            return None
        text = data.decode(errors="replace")
        # Those that the text has of its own are not counted.
        replaced = text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())
        self._faults += Faults(replaced=replaced)
        return text

    def clean(self, document: str, where: str) -> str | None:
        """A document without halves of surrogate pairs; None where it is left out."""
        try:
            document.encode()
            return document
        except UnicodeEncodeError as error:
            place = f"it has half a surrogate pair at character {error.start}"
        if self.policy != "replace":
            self.refuse(GrowkitError(f"{where} is not text: {place}"), REPLACE_OR_SKIP)
            return None
        whole = "".join(REPLACEMENT if "\ud800" <= each <= "\udfff" else each for each in document)
        self._faults += Faults(replaced=whole.count(REPLACEMENT) - document.count(REPLACEMENT))
        return whole

    def refuse(self, error: GrowkitError, advice: str = SKIP) -> None:
        """Count a document as left out. Raises the error unless that is the policy.

        advice: which policies would go on.
        """
        if self.policy != "skip":
            raise GrowkitError(f"{error}; growkit tokenize {advice}") from error
        self._faults += Faults(skipped=1)

    def take(self) -> Faults:
        """What was done since the last call."""
        faults = self._faults
        self._faults = Faults()
        return faults


def check_policy(policy: str) -> None:
    """Raise UsageError for a word that is not a policy."""
    if policy not in POLICIES:
        listed = ", ".join(POLICIES)
        near = did_you_mean(policy, POLICIES)
        raise UsageError(f"--errors must be one of {listed}, got {policy!r}{near}")

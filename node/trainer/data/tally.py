"""What was read of a source, what was left out and why, what is doubtful: counted, named, and said.

A tally is kept beside the tokens that it describes, so a start that finds them says the same as the one that
made them. Only the first few names of each kind are kept: a million bad rows take no more room than three.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

NAMES_KEPT = 3  # of each kind, to show


@dataclass(slots=True)
class Group:
    """Things of one kind: how many, how many bytes, and the first few by name."""

    count: int = 0
    bytes: int = 0
    names: list[str] = field(default_factory=list)

    def add(self, name: str, size_bytes: int = 0, count: int = 1) -> None:
        self.count += count
        self.bytes += size_bytes
        if len(self.names) < NAMES_KEPT and name not in self.names:
            self.names.append(name)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.names) else ""
        return f"{self.count} ({', '.join(self.names)}{more})"


@dataclass(slots=True)
class Tally:
    """Of one source. Rows are those of tables; a text file is one document."""

    files: int = 0
    file_bytes: int = 0
    documents: int = 0
    chars: int = 0
    rows: int = 0  # all, good and bad
    no_field: Group = field(default_factory=Group)  # rows without text in the field
    malformed: Group = field(default_factory=Group)  # rows that cannot be read
    replaced: Group = field(default_factory=Group)  # characters that could not be decoded, by their file
    damaged: Group = field(default_factory=Group)  # files that break off
    left_out: dict[str, Group] = field(default_factory=dict)  # files, by the reason
    protected: dict[str, Group] = field(
        default_factory=dict
    )  # rows or paragraphs, by the domain; bytes: chars

    def leave_out(self, reason: str, name: str, size_bytes: int) -> None:
        self.left_out.setdefault(reason, Group()).add(name, size_bytes)

    @property
    def left_out_bytes(self) -> int:
        return sum(group.bytes for group in self.left_out.values()) + self.damaged.bytes

    @property
    def left_out_share(self) -> float:
        """Of the bytes that lie there."""
        total = self.file_bytes + self.left_out_bytes - self.damaged.bytes
        return self.left_out_bytes / total if total else 0.0

    @property
    def malformed_share(self) -> float:
        """Of the rows, or of the characters, whichever is worse."""
        of_rows = (self.malformed.count + self.no_field.count) / self.rows if self.rows else 0.0
        return max(of_rows, self.replaced.count / self.chars if self.chars else 0.0)

    def lines(self) -> list[str]:
        """For people: what was taken, then one line for each kind of what was not."""
        taken = f"{numbered(self.files, 'file')}, {size(self.file_bytes)}"
        said = [f"{taken}, {numbered(self.documents, 'document')}" if self.documents else taken]
        for reason, group in sorted(self.left_out.items(), key=lambda item: -item[1].bytes):
            said.append(f"left out, {reason}: {group}, {size(group.bytes)}")
        for what, group in (
            ("rows without text in the field", self.no_field),
            ("malformed rows", self.malformed),
            ("characters that are not of the encoding, replaced", self.replaced),
            ("files that break off", self.damaged),
        ):
            if group.count:
                said.append(f"{what}: {group}")
        for domain, group in sorted(self.protected.items()):
            said.append(f"dropped, of the protected domain {domain}: {group}, {group.bytes} characters")
        return said

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Any) -> Tally:
        """Raises ValueError, TypeError or KeyError for what `to_plain` did not make."""
        groups = ("no_field", "malformed", "replaced", "damaged")
        fields: dict[str, Any] = {
            key: Group(**value) if key in groups else value for key, value in plain.items()
        }
        for key in ("left_out", "protected"):
            fields[key] = {reason: Group(**group) for reason, group in plain.get(key, {}).items()}
        return cls(**fields)


def merged_names(names: Iterable[str]) -> str:
    """The first few, for a message."""
    listed = list(names)
    return ", ".join(listed[:8]) + (", ..." if len(listed) > 8 else "")


def numbered(count: int, noun: str) -> str:
    """`1 file`, `2 files`: for nouns that take an s."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def size(byte_count: int) -> str:
    """Bytes for people."""
    value = float(byte_count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"

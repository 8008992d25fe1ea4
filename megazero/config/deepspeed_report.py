"""What became of each key of a ds_config.json: used as it stands, translated, or ignored, the last two with why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

Lines = tuple[tuple[str, str], ...]
"""(key path, text) for each key."""


@dataclass(frozen=True)
class KeyReport:
    """The report, key by key, in the file's order."""

    label: str = "config"
    """What the configuration is called, e.g. `ds_config.json`."""
    used: Lines = field(default=())
    """(key, the setting that has its value)."""
    translated: Lines = field(default=())
    """(key, what it became): "auto", other names or units, values that the file leaves to us."""
    ignored: Lines = field(default=())
    """(key, why it has no effect here)."""
    assumed: Lines = field(default=())
    """(key that the file leaves out, the value that it has then)."""

    def with_translated(self, lines: Sequence[tuple[str, str]]) -> KeyReport:
        """A copy in which these keys were translated too; what was said of them before gives way."""
        new = {key for key, _ in lines}
        kept = tuple((key, text) for key, text in self.translated if key not in new)
        return replace(self, translated=(*kept, *lines))

    def with_ignored(self, lines: Sequence[tuple[str, str]]) -> KeyReport:
        """A copy in which these keys were ignored, whatever was said of them before."""
        new = {key for key, _ in lines}
        used, translated, ignored = (
            tuple((key, text) for key, text in old if key not in new)
            for old in (self.used, self.translated, self.ignored)
        )
        return replace(self, used=used, translated=translated, ignored=(*ignored, *lines))

    def text(self) -> str:
        """The report in a few lines: counts, then what was translated and ignored; keys of one reason together."""
        counts = f"{len(self.used)} used, {len(self.translated)} translated, {len(self.ignored)} ignored"
        number = len(self.used) + len(self.translated) + len(self.ignored)
        lines = [f"{self.label}: {number} key{'s' if number != 1 else ''}: {counts}"]
        for title, entries in (("translated", self.translated), ("ignored", self.ignored)):
            by_text: dict[str, list[str]] = {}
            for key, text in entries:
                by_text.setdefault(text, []).append(key)
            lines += [f"  {title} {_together(keys)}: {text}" for text, keys in by_text.items()]
        if self.assumed:
            lines.append("  not said " + "; ".join(f"{key} {text}" for key, text in self.assumed))
        return "\n".join(lines)


def _together(keys: list[str]) -> str:
    """`zero_optimization.a, b` for keys of one section."""
    shown: list[str] = []
    before = None
    for key in keys:
        section, _, name = key.rpartition(".")
        shown.append(name if section and section == before else key)
        before = section
    return ", ".join(shown)

"""Escape names from others in Markdown, so that they are text and never markup."""

from __future__ import annotations

import re

# Characters that may be markup in Markdown or in HTML within it. Underscores inside words are not.
MARKUP = re.compile(r"[\\`*\[\]<>&|~#]|(?<!\w)_|_(?!\w)")


def as_text(name: str) -> str:
    """Return `name` as one line of text without markup; character references are never markup."""
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", " ".join(name.split()))


def as_code(name: str) -> str:
    """Return `name` as one line of code within a sentence, without backticks, the only markup there."""
    return f"`{' '.join(name.replace('`', '').split()) or ' '}`"

"""Strangers' names in Markdown: as text, never as markup."""

from __future__ import annotations

import re

# What could be markup in Markdown, or in the HTML that it may hold. Underscores within words are none.
MARKUP = re.compile(r"[\\`*\[\]<>&|~#]|(?<!\w)_|_(?!\w)")


def as_text(name: str) -> str:
    """`name` as one line of text in which nothing is markup; character references never are."""
    return MARKUP.sub(lambda match: f"&#{ord(match[0])};", " ".join(name.split()))


def as_code(name: str) -> str:
    """`name` as one line of code within a sentence; nothing is markup there but the backtick, which it loses."""
    return f"`{' '.join(name.replace('`', '').split()) or ' '}`"

"""What a user can put right: raised with one clear line that says what is wrong and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a bad setting. Command lines print its message without a traceback and exit with 2."""

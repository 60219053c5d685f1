"""python -m srl_utils.evaluation reconstruction | generation | editing | ... --baseline DIR --vae robust=DIR ..."""

from __future__ import annotations

import sys

from srl_utils.command_line import exit_code
from srl_utils.evaluation.cli.main import main

if __name__ == "__main__":
    sys.exit(exit_code(main))

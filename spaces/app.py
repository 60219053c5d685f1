"""Serve `python -m srl_utils.app` to the visitors of a Space."""

import runpy
import sys

sys.argv += ["--host", "0.0.0.0", "--port", "7860"]
runpy.run_module("srl_utils.app", run_name="__main__")

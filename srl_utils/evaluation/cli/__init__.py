"""What can be evaluated: one module for each command of `python -m srl_utils.evaluation`."""

"""A zoo of VAEs, measured by one protocol, and its leaderboard: `python -m srl_utils.zoo`."""

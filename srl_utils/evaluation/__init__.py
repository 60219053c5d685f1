"""Judging VAEs: `reconstruction` measures, `report` writes tables and pictures."""

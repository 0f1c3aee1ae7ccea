"""Figures of the farm, each beside its baseline, measured in the same run: `make bench ROWS=a5,c`."""

"""The figures of docs/benchmarks.md, measured on real nodes. Nothing here passes or fails."""

Row = tuple[str, str, str]  # what, the figure, what it should be

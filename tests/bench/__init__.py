"""The figures of docs/benchmarks.md, measured on real nodes. Nothing here passes or fails."""

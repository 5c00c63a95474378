"""Logs and frames to batches, with numpy and polars; never jax.

In the order in which data passes through: `sources` (bytes of a file), `tables` (columns),
`readers` (columns to actions), `from_frame` (a frame in memory to actions), `prepare` (filters,
order, indices), `dataset` (the result), `split` (what is trained on and what is a target), then
`windows`, `packing` and `epochs` (training batches), or `eval_batches` (rows for evaluation and
serving).
"""

"""Recommendations from trained parameters, in jax and numpy alone: no training code is imported.

Read in this order:
  recommender.py   Recommender: lists for histories, similar items, query vectors
  rows.py          histories as the rows that a model encodes
  topk.py          the best items of a batch of histories, on one device or on a mesh
  frames.py        histories from a data frame, and a data frame of recommendations
  explain.py       heads, experts and past items behind a list
  export.py        one folder that holds model, item vectors and ids: save and load
  onnx_model.py    model.onnx of an export: items in, scores out
  onnx_graph.py    traced programs as ONNX graphs
  histories.py     a file of histories (JSON lines)
  answers.py       files of recommendations and of similar items (JSON lines, CSV, Parquet)
  demo/            a web page on this machine
  service/         an HTTP server of recommendations
"""

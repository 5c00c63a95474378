"""Models: one file a paper, and what they share.

Read `item_model.py` (the base class: item table, query times item vector, the facts that a class
states about itself), then `sasrec.py` with `layers.py`, then `fame.py` with `fame_block.py`.
`objective.py` has the loss of the next item, `options.py` the types of a model's options, and
`registry.py` the table of names. Each of the other papers is a file of its own; they use
`augmentations.py` (views of histories), `experts.py` (sparse experts), `kmeans.py`,
`prefix_rows.py` (where a row is one prefix) and `session_graph.py`. `pooling.py` has two
models without layers. `surgery.py` copies the parameters of a pre-trained model into another model.

A new model is one file and one row of `registry.MODELS`: see docs/adding-a-model.md.
"""

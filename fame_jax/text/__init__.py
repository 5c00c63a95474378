"""FAME+ (arXiv 2601.12301): item texts become the item table that a model starts from.

Read in this order. The text of an item and its labels on each facet: item_files.py (formats),
item_fields.py (fields), facets.py (label sets), items.py (all of a catalogue), synthetic_items.py.
Text vectors: tfidf.py, bert.py and sentence_encoder.py, vectors.py (either of them, cached). Item
vectors: options.py, projection.py (a head for each facet), facet_objective.py (their training).
item_init.py writes the item vectors and fills a model's item table with them.
"""

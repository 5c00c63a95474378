"""Evaluation: the rank of each user's target among all items, and statistics of the ranks.

Read `ranking.py` first (ranks, on one device or a mesh), then `metrics.py` (HR, NDCG, MRR),
`ranker.py` (all users by one model, compiled once), `groups.py` (metrics of groups of users, use of
heads and experts) and `facet_probe.py` (how well heads represent known facets).
"""

"""The page of a run and tables over many runs. Nothing here imports jax.

Read collect.py (the record of a run, from the files in its folder), html.py (the page made of that
record) and figures.py (drawings, matplotlib). terminal.py prints an explanation as text.
compare.py compares runs: comparison.py has the record, comparison_page.py the page and the text,
figures_of_runs.py the drawings, and that of a sweep.
tables.py collects the figures of many runs and markdown.py prints them; published.py has the
results that other authors printed.
"""

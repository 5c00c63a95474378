"""Training one stage: steps, epochs, checkpoints.

Read in this order: step.py (one update, and blocks of updates in one dispatch), optimizer.py,
loop.py (epochs, validation, early stopping, resume), checkpoint.py (Orbax), then log.py,
trackers.py, signals.py, prefetch.py and profile.py.
"""

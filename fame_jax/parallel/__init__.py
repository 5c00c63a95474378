"""The mesh of devices and the processes of a run.

Read `mesh.py` first: it decides where each array lives. `processes.py` joins several processes.
"""

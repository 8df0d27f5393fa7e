"""The crash explorer: what a power cut may leave of an image at every fence and every return, and whether the next mount
makes good of it.

medium.py records what the core does to persistent memory; images.py says which images a crash at a point of that record
can leave; explore.py recovers each and judges it; parallel.py does so on all cores, or on a Dask scheduler; report.py says
what came of it. What is played: calls.py (the alphabet) and sequences.py; what must be seen then: state.py.
"""

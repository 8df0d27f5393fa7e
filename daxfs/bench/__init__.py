"""`daxfs bench`: what a file system does per second, beside its peers, in one run.

    rows.py     what is measured: names, units, goals (data; nothing is run there)
    peers.py    the file systems: how each is started, found and ended; minimal_ll.c and nullfs.py are servers written here
    work.py     how a row is measured on one of them: fio, and namebench.c for calls on names
    pins.py     the rows of pins, which have a mount of their own (bed.py) and somebody who watches (watch.py)
    machine.py  the machine's own noise
    result.py   samples, medians, ratios, verdicts; to JSON and back
    show.py, plot.py, history.py  a table for people, an SVG, and what earlier runs said
    run.py      a run: rounds over rows over peers

Nothing here is imported by the file system or its client. Not here: the command's options (cli/bench.py).
"""

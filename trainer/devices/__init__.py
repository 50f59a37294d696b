"""Which devices a run uses, and which part of each array each device holds.

Read `sharding.py` first: the mesh of devices and the layout of parameters, moments and batches on
it. `hosts.py` is about several processes that train together, `accelerators.py` lists what is known
of TPUs and GPUs (memory, peak FLOP/s), and `programs.py` keeps compiled programs between runs.
"""

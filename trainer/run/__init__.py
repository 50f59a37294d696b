"""How does a run begin, go on, stop, and grow on the way?

Read `stages` first: its `train` is what the command line and a study call. Then `begin`, which
settles everything before the first step, and `loop`, the only place where training has state. What
they are made of: `directory` (RUN and its lock), `checkpoint`, `power` and `state` (what is saved,
what of it a power cut leaves, and how a state is read), `position` (tokens, FLOPs and the place in
the data), `growth` (what growth asks of training), `validation`, `tasks` and `metrics` (what is
measured and kept), `interrupt` and `watch` (signals, and hosts that hang). `anneal` makes the
configuration of a run whose learning rate comes down.
"""

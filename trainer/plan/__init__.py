"""Will a training step fit its devices, and how long will the run take?

Read first `compiler` (what XLA says of a compiled step: memory and FLOPs) with `estimate` (a lower
bound of the memory, before anything is compiled), then `remedies` (which
change of the configuration would make it fit) and `memory` (what the training loop checks before
its first step, and `remat: auto`). `topology` names the devices to compile for, `cost` turns FLOPs
into time and money, and `plan` puts everything together for `growkit plan`.
"""

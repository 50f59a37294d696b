"""How is a model stored on disk, and how is it read and written without holding it in memory?

Read in this order: `tensor` (a model as named tensors, and recipes for new ones), `huggingface` and
`orbax` (the two formats), `hf_trainer` (the first with the optimizer of transformers' Trainer:
`torch_zip` and `torch_pickle` read torch's files, `optimizer` names what they hold), `dcp` and
`dcp_write` (PyTorch's distributed checkpoints: `dcp_metadata` says where what lies, `dcp_layout`
and `dcp_names` what it is called), `universal` (DeepSpeed's files for each parameter), `neox` and
`zero` (gpt-neox's checkpoints, which are read), `olmo` (OLMo's, likewise), `output` (a directory
that appears whole or not at all), `location` (from what a user types to a format).
`files`, `rounding` and `remote` are small: JSON and paths, numbers in another dtype, buckets.
"""

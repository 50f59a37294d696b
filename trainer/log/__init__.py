"""What is kept of a run's progress, and how is it shown?

Read first `history` (the rows of metrics.csv, kept through resumes and growth), then what is made
of them: `curves` (the picture) and `writers` (TensorBoard, Weights & Biases). `report` shows
progress on the terminal, `speed` measures tokens per second and MFU, and `trace` records a profile
of some steps.
"""

"""How good is a model on benchmarks, asked through lm-evaluation-harness?

Read in this order: `catalogue` (the tasks), `items` (local files as the harness's documents),
`harness` (tasks, answers and standard errors), `questions` (which tasks are asked, with which
items), `report` (what is kept), `reference` (published figures), `tables` and `notes` (what is
shown). The models themselves are in `trainer.evaluate.harness` (JAX) and `convert.harness`
(transformers). lm_eval is imported only when something is run.
"""

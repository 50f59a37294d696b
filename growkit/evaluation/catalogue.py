"""The tasks by name: the harness's names, the metrics shown, full sizes, and published figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from growkit.errors import UsageError, did_you_mean

BPB = "bpb"
# The most documents for bits per byte, unless told otherwise; the 760M run used as many.
BPB_LIMIT = 3000
# Seed of the draw of N items from a longer set: it must not depend on how a file is sorted.
SEED = 1234


@dataclass(frozen=True)
class Task:
    """A task of the harness.

    title: the name in tables. folder, harness: its folder and its name in lm_eval. full: items of
    the full set. metrics: those shown.
    """

    name: str
    title: str
    folder: str
    harness: str
    full: int
    metrics: tuple[str, ...]


TASKS = {
    task.name: task
    for task in (
        Task("lambada", "LAMBADA", "lambada", "lambada_openai", 5153, ("acc", "perplexity")),
        Task("piqa", "PIQA", "piqa", "piqa", 1838, ("acc", "acc_norm")),
        Task("hellaswag", "HellaSwag", "hellaswag", "hellaswag", 10042, ("acc", "acc_norm")),
        Task("winogrande", "WinoGrande", "winogrande", "winogrande", 1267, ("acc",)),
        Task("arc_easy", "ARC-Easy", "arc", "arc_easy", 2376, ("acc", "acc_norm")),
        Task("arc_challenge", "ARC-Challenge", "arc", "arc_challenge", 1172, ("acc", "acc_norm")),
    )
}
NAMES = (*TASKS, BPB)

# Parts of the Pile that the 760M run reports: name of a file or folder in bpb/ -> title.
PILE = {
    "pile_cc": "Pile CC",
    "pile_openwebtext2": "OpenWebText2",
    "pile_wikipedia": "Pile Wikipedia",
    "pile_arxiv": "Arxiv",
    "pile_bookcorpus2": "BookCorpus2",
}

# Published figures by (task or part, metric). Sources: bits per byte from the Pile (arXiv
# 2101.00027, table 3), the rest from the table in GPT-Neo's README. Accuracies are fractions.
PUBLISHED = {
    "GPT2-Large": {
        ("lambada", "acc"): 0.476,
        ("lambada", "perplexity"): 12.97,
        ("piqa", "acc"): 0.703,
        ("bpb/pile_cc", "bits_per_byte"): 0.9582,
        ("bpb/pile_openwebtext2", "bits_per_byte"): 0.9539,
        ("bpb/pile_wikipedia", "bits_per_byte"): 0.9795,
        ("bpb/pile_arxiv", "bits_per_byte"): 1.1778,
        ("bpb/pile_bookcorpus2", "bits_per_byte"): 1.0061,
    },
    "GPT2-XL": {
        ("lambada", "acc"): 0.5121,
        ("lambada", "perplexity"): 10.63,
        ("piqa", "acc"): 0.7078,
        ("hellaswag", "acc"): 0.4003,
        ("bpb/pile_cc", "bits_per_byte"): 0.9355,
        ("bpb/pile_openwebtext2", "bits_per_byte"): 0.9171,
        ("bpb/pile_wikipedia", "bits_per_byte"): 0.9655,
        ("bpb/pile_arxiv", "bits_per_byte"): 1.1381,
        ("bpb/pile_bookcorpus2", "bits_per_byte"): 0.9783,
    },
}


def parse_task_names(text: str) -> list[str]:
    """The tasks in a comma-separated list, each once, in its order. Raises UsageError."""
    words = [word.strip() for word in text.split(",")]
    names = list(dict.fromkeys(word for word in words if word))
    known = ", ".join(NAMES)
    if not names:
        raise UsageError(f"there is no task in {text!r}; the tasks are {known}")
    for name in names:
        if name not in NAMES:
            near = did_you_mean(name, NAMES)
            raise UsageError(f"there is no task {name!r}; the tasks are {known}{near}")
    return names


def find_title(name: str) -> str:
    """The name in tables of a task, or of a part of bits per byte (`bpb/NAME`)."""
    if name in TASKS:
        return TASKS[name].title
    part = name.removeprefix(f"{BPB}/")
    return PILE.get(part, part)


def is_full(name: str, documents: int, total: int) -> bool:
    """Whether a result may stand beside published figures.

    That takes the full set of a task, or 3000 documents of a part of the Pile (or all it has).
    """
    if name in TASKS:
        return documents == TASKS[name].full
    return name.removeprefix(f"{BPB}/") in PILE and documents >= min(BPB_LIMIT, total)


def select_published(names: Sequence[str]) -> dict[str, dict[tuple[str, str], float]]:
    """Published figures for the tasks given: model -> (task, metric) -> figure.

    Models without any are left out.
    """
    selected = {}
    for model, figures in PUBLISHED.items():
        known = {key: value for key, value in figures.items() if key[0] in names}
        if known:
            selected[model] = known
    return selected

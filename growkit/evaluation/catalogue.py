"""The tasks by name: what the harness calls them, what they report, how large the full sets are, published figures.

Knows names and numbers only; leaves items to `items` and running to `harness`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from growkit.errors import UsageError, did_you_mean

BPB = "bpb"
# Documents at most for bits per byte, unless told: as the 760M run.
BPB_LIMIT = 3000
# Which N of a longer set, and in which order they are asked for, must not depend on how its file is sorted.
SEED = 1234


@dataclass(frozen=True)
class Task:
    """folder, harness: where it is there, and its name. full: items of the full set. metrics: those shown."""

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

# The parts of the Pile that the 760M run reports, by the name of a file or folder in bpb/, with its own titles.
PILE = {
    "pile_cc": "Pile CC",
    "pile_openwebtext2": "OpenWebText2",
    "pile_wikipedia": "Pile Wikipedia",
    "pile_arxiv": "Arxiv",
    "pile_bookcorpus2": "BookCorpus2",
}

# As the 760M run's log has them, by (task or part, metric). Sources: bits per byte from the Pile
# (arXiv 2101.00027, table 3), the rest from the table of GPT-Neo's README. Accuracies are fractions.
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
    """The tasks in a list with commas, each once, in its order. Raises UsageError for an unknown one."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise UsageError(f"there is no task in {text!r}; the tasks are {', '.join(NAMES)}")
    for name in names:
        if name not in NAMES:
            raise UsageError(
                f"there is no task {name!r}; the tasks are {', '.join(NAMES)}{did_you_mean(name, NAMES)}"
            )
    return names


def find_title(name: str) -> str:
    """How a task, or a part of bits per byte (`bpb/NAME`), is called in a table."""
    part = name.removeprefix(f"{BPB}/")
    return TASKS[name].title if name in TASKS else PILE.get(part, part)


def is_full(name: str, documents: int, total: int) -> bool:
    """Whether what was measured may stand beside published figures: the full set, or 3000 documents of the Pile's."""
    if name in TASKS:
        return documents == TASKS[name].full
    return name.removeprefix(f"{BPB}/") in PILE and documents >= min(BPB_LIMIT, total)


def select_published(names: Sequence[str]) -> dict[str, dict[tuple[str, str], float]]:
    """Reference rows for the tasks given: model -> (task, metric) -> figure; models without any left out."""
    rows = {
        model: {key: value for key, value in figures.items() if key[0] in names}
        for model, figures in PUBLISHED.items()
    }
    return {model: figures for model, figures in rows.items() if figures}

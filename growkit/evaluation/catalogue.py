"""The tasks by name: the harness's names, the metrics shown, and full sizes."""

from __future__ import annotations

from dataclasses import dataclass

from growkit.errors import UsageError, did_you_mean

BPB = "bpb"
# The most documents for bits per byte, unless told otherwise; the 760M run used as many.
BPB_LIMIT = 3000
# Seed of the draw of N items from a longer set: it must not depend on how a file is sorted.
SEED = 1234

Key = tuple[str, str]  # a task, or bpb/PART, and a metric
METRICS = {
    "acc": "acc, %",
    "acc_norm": "acc_norm, %",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}
PERCENT = ("acc", "acc_norm")


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

"""What leads from verb to verb: the groups of the list, an example in each help, what to do next.

The verbs themselves know nothing of it: `add_guidance` gives it to a verb when it is looked up.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import click

from growkit.cli.output import is_json, remark

GROUPS = {
    "Start": ("quickstart", "completion"),
    "Data": ("tokenize",),
    "Grow": ("depth", "search", "width", "grow", "experts", "average", "derive"),
    "Train": ("train", "anneal", "plan", "advise", "study"),
    "Inspect and convert": ("inspect", "diff", "verify", "import", "export"),
    "Evaluate": ("evaluate", "generate"),
}
# The group of a verb that none of them names.
OTHERS = "Others"

EXAMPLES = {
    "quickstart": ("growkit quickstart --out quickstart",),
    "completion": ('eval "$(growkit completion bash)"',),
    "tokenize": (
        "growkit tokenize mytexts/ --train-bpe 4096 --out tokens",
        "growkit tokenize pile/ --tokenizer tokenizer.json --out tokens",
    ),
    "train": (
        "growkit train tiny --out runs/small data.train=tokens",
        "growkit train recipe --from grown --out runs/grown data.train=tokens schedule.steps=500",
    ),
    "plan": ("growkit plan 760m --topology v3-32",),
    "advise": ("growkit advise --target 760m --source 580m --tokens 41B",),
    "anneal": ("growkit anneal runs/760m --to 2e-6 --tokens 5B --out runs/annealed",),
    "depth": (
        "growkit depth --map 18:24 runs/580m grown",
        "growkit depth --map 28:36 --method identity --check Qwen/Qwen3-0.6B bigger",
    ),
    "search": ("growkit search runs/580m --layers 24 --tokens text.txt",),
    "width": ("growkit width --embed 2x runs/580m wider",),
    "grow": ("growkit grow --like 1b runs/580m grown",),
    "experts": (
        "growkit experts 8:16 --top 2:2 --noise 0.1 mixtral_8x7b mixtral_16x7b",
        "growkit experts --from-dense 8 --top 2 mistral_7b mixtral_8x7b",
    ),
    "derive": ("growkit derive olmo2 --out olmo2.txt",),
    "average": ("growkit average runs/760m@8000 runs/760m@9000 --out averaged",),
    "inspect": ("growkit inspect runs/580m@best",),
    "diff": ("growkit diff runs/580m hf",),
    "verify": ("growkit verify runs/580m grown",),
    "import": ("growkit import hf_580m source",),
    "export": ("growkit export runs/760m@best hf --check",),
    "evaluate": (
        "growkit evaluate runs/760m --tasks lambada,piqa --output results.json",
        "growkit evaluate GPT2-Large=openai-community/gpt2-large results.json --reference 760m",
    ),
    "study": ("growkit study benchmarks/studies/cpu.yaml --out study data.train=tokens",),
    "generate": ('growkit generate runs/760m@best --prompt "It was"',),
}

TRAIN_ON = "growkit train recipe --from {out} --out RUN data.train=TOKENS"
# What to do after a verb. Names in braces are values of the verb's parameters; where one has no
# value, nothing is said.
NEXT = {
    "tokenize": "growkit train tiny --out RUN data.train={out}",
    "train": "growkit export {out}@best HF --check, or growkit depth --map L:M {out} GROWN",
    "anneal": "growkit evaluate {out}, or growkit export {out} HF --check",
    "plan": "growkit train {config} --out RUN data.train=TOKENS",
    "depth": f"growkit inspect {{out}}, or {TRAIN_ON}",
    "width": f"growkit inspect {{out}}, or {TRAIN_ON}",
    "grow": f"growkit inspect {{out}}, or {TRAIN_ON}",
    "experts": "growkit inspect {out}",
    "average": "growkit evaluate {out}",
    "derive": "growkit depth --table {out} --map L:M SRC OUT",
    "import": TRAIN_ON,
    "export": "growkit evaluate {out}",
    "evaluate": "growkit export SRC HF --evaluation {output}",
    "study": "growkit advise --target SIZE --tokens N --study {out}",
}
# Options with which a verb writes nothing to go on from.
SILENT = ("dry_run",)


def list_groups(verbs: Iterable[str]) -> dict[str, list[str]]:
    """The verbs by group, in the groups' order; those of no group come last."""
    known = set(verbs)
    named = {verb for group in GROUPS.values() for verb in group}
    groups = {name: [verb for verb in group if verb in known] for name, group in GROUPS.items()}
    groups[OTHERS] = [verb for verb in verbs if verb not in named]
    return {name: group for name, group in groups.items() if group}


def add_guidance(name: str, command: click.Command) -> None:
    """Give a verb its example, and the line after it. A verb that has both is left as it is."""
    if command.epilog is not None or name not in EXAMPLES:
        return
    command.epilog = "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in EXAMPLES[name])])
    if command.callback is not None and name in NEXT:
        command.callback = _follow(name, command.callback)


def _follow(name: str, callback: Callable[..., Any]) -> Callable[..., Any]:
    """The callback, which says what to do next where it has succeeded."""

    @functools.wraps(callback)
    def call(*given: Any, **named: Any) -> Any:
        code = callback(*given, **named)
        words = describe_next(name, click.get_current_context().params)
        # For people, not for programs: as with progress bars, a terminal alone shows it.
        if not code and words and sys.stderr.isatty() and not is_json():
            remark(f"next: {words}")
        return code

    return call


def describe_next(name: str, parameters: dict[str, Any]) -> str:
    """What to do after a verb with these parameters; empty where there is nothing to say."""
    if name not in NEXT or any(parameters.get(option) for option in SILENT):
        return ""
    given = {key: value for key, value in parameters.items() if value is not None}
    try:
        return NEXT[name].format_map(given)
    except KeyError:
        return ""

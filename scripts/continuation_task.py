#!/usr/bin/env python3
"""Makes a zero-shot task out of any text, for machines without a network: which of four continuations follows?

    scripts/continuation_task.py wiki.test.raw --out tasks
    spqr eval demo --tasks continuations --include-path tasks --limit 300

A question is the beginning of a paragraph, its answers how that paragraph and three others go on. Writes the task's
file for the LM Evaluation Harness and its questions into OUT. Scores say nothing beside those of other tasks; two
models' scores on one such task do.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

NAME = "continuations"
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def questions(text: str, context_words: int, words: int, seed: int) -> list[dict[str, object]]:
    """One question for each paragraph that is long enough, in a random order."""
    split = [paragraph.split() for paragraph in text.splitlines()]
    long = [paragraph for paragraph in split if len(paragraph) >= context_words + words]
    rng = np.random.default_rng(seed)
    found = []
    for index in rng.permutation(len(long)):
        others = rng.choice(np.delete(np.arange(len(long)), index), 3, replace=False)
        order = rng.permutation(4)
        shown = np.array([index, *others])[order]
        choices = [" ".join(long[i][context_words : context_words + words]) for i in shown]
        answer = int(np.flatnonzero(order == 0)[0])
        found.append({"context": " ".join(long[index][:context_words]), "choices": choices, "answer": answer})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8, a paragraph a line")
    parser.add_argument("--out", type=Path, default=Path("tasks"), help="folder for the task")
    parser.add_argument("--context-words", type=int, default=40)
    parser.add_argument("--words", type=int, default=12, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found = questions(given.text.read_text(encoding="utf-8"), given.context_words, given.words, given.seed)
    if len(found) < 4:
        sys.exit(f"continuation_task: {given.text} has {len(found)} paragraphs long enough, at least 4 are needed")
    given.out.mkdir(parents=True, exist_ok=True)
    file = (given.out / f"{NAME}.jsonl").absolute()
    file.write_text("".join(json.dumps(question) + "\n" for question in found), encoding="utf-8")
    (given.out / f"{NAME}.yaml").write_text(TASK.format(name=NAME, file=json.dumps(str(file))), encoding="utf-8")
    print(f"{len(found)} questions in {file}")


if __name__ == "__main__":
    main()

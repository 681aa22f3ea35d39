"""Damaged inputs for every reader, and what comes of them: docs/explanation/reliability.md says what is promised.

An input is a folder of small files of which one or several were changed. Number N of a reader, with a seed, is
always the same input, whatever ran before it: ``scripts/fuzz --reader gguf --seed 7 --only 12345``.

    mutate_*.py   changes to bytes and to the structures in them
    seeds/        sound files, made when a run begins
    readers.py    the table: which files, how they are changed, what reads them
    judge.py      one input: what is a fault
    pool.py       processes that read inputs, and a watch over them
    planted.py    readers with faults, to see that each kind is found
"""

"""
The linked lists as sentences, for a model that has learned to read: does looping pay where a real model needs steps?

    python tests/list_sentences.py --out=out/sentences    writes train.jsonl and held_out.jsonl there

A document says whom each of twelve people asks or which colour they hold; then it names the colours to which six of
them lead. Where each of these words is one token, as for SmolLM2 and GPT-2, --context=72 keeps documents whole.
"""

import json
from argparse import ArgumentParser
from pathlib import Path

import numpy as np

PEOPLE = "Ann Bob Carl Dan Emma Frank Kate Lucy Mary Paul Sam Tom".split()
COLOURS = "red blue green black white brown gold silver pink gray".split()
QUESTIONS = 6  # per document
CONTEXT = 4 * len(PEOPLE) + 4 * QUESTIONS  # tokens of a document and its end


def document(chance, links):
    """A line of .jsonl, as `list_document` in train.py writes them: all chains have `links` people."""
    chains = chance.permutation(PEOPLE).reshape(-1, links)
    colours = chance.choice(COLOURS, len(chains), replace=len(chains) > len(COLOURS))
    sentences = []
    answers = {}
    for chain, colour in zip(chains.tolist(), colours.tolist()):
        does = f"holds {colour}"
        for distance, person in enumerate(chain, start=1):
            sentences.append(f" {person} {does}.")
            answers[person] = (colour, f"{distance} links")
            does = f"asks {person}"
    asked = chance.permutation(PEOPLE)[:QUESTIONS].tolist()
    prompts = [f". {person}:" for person in asked]
    prompts[0] = "".join(chance.permutation(sentences)) + prompts[0].removeprefix(".")
    completions = [f" {answers[person][0]}" for person in asked]
    return {"prompt": prompts, "completion": completions, "kind": [answers[person][1] for person in asked]}


def write(path, count, lengths, seed):
    """Write `count` documents, of chains of each of these lengths in turn."""
    chance = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(count):
            file.write(json.dumps(document(chance, lengths[i % len(lengths)])) + "\n")


def main():
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default="out/sentences")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write(out / "train.jsonl", 20_000, [2, 3, 4], 1)
    write(out / "held_out.jsonl", 100, [4], 2)
    print(f"written to {out}; documents have {CONTEXT} tokens")


if __name__ == "__main__":
    main()

"""
Measure a model: its loss at every depth and with exit, or the paper's benchmarks.

    python eval.py                                the newest model below ./out, on the text its training held out
    python eval.py --init=gpt2 --data=book.txt    any model, any text
    python eval.py --init=out/a,out/b             a model, and its unlooped control
    python eval.py --tasks=piqa,mmlu --init=gpt2  benchmarks of lm-evaluation-harness
"""

import json
import math
import sys
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import convert
from convert import flag, refuse, windows
from loopus import InputError, early_exit

DEPTHS = (1, 2, 4, 8)


@dataclass
class Settings(convert.Inference):
    """Held-out loss of a looped model at each depth up to max_loops, and with exit; or with --tasks its benchmarks."""

    data: str = flag("", "held-out text: file, directory, glob or .bin; empty: what the model's training held out")
    context: int = flag(256, "tokens per sequence", 1)
    batch: int = flag(8, "sequences at a time", 1)
    tokens: int = flag(32768, "held-out tokens to read, spread evenly over the text", 1)
    json: bool = flag(False, "print one JSON object instead of the tables")
    tasks: str = flag("", "benchmarks of lm-evaluation-harness instead: wikitext,mmlu,…; several models: --init=a,b")
    limit: int = flag(None, "with --tasks: items of each task to read; empty: all", 1)
    num_fewshot: int = flag(None, "with --tasks: examples before each item; empty: as the task says", 0)
    include_path: str = flag(None, "with --tasks: a directory of task files (.yaml) of your own")


# ---- Losses, §4, and passes taken, Fig. 18
def states(model, x, depths, halt, max_loops):
    """(column, state (B, T, C), passes (B, T)) of tokens x (B, T): after each number of passes in `depths`, of which 0
    is the ungated pass, and with `halt`, as "exit"."""
    if depths:
        h = model.encode(x)
        if 0 in depths:
            yield 0, model.propose(h), torch.zeros_like(x)
        for b in range(1, max(depths) + 1):
            h = model.refine(h)
            if b in depths:
                yield b, h, torch.full_like(x, b)
    if halt:
        yield "exit", *early_exit(model, x, max_loops, halt)


@torch.no_grad()
def held_out_losses(model, sequences, batch, depths, halt=None, max_loops=8):
    """→ {column of `states`: mean loss in nats} over sequences of `windows`; and with exit, of the learned tokens, how
    many took 0 … max_loops passes."""
    sums = defaultdict(float)
    histogram = torch.zeros(max_loops + 1, dtype=torch.long)
    parts = list(zip(*(part.to(model.device).split(batch) for part in sequences)))
    for x, y in convert.progress(parts, "evaluating", len(parts)):
        learned = y >= 0
        if not learned.any():
            continue
        for column, h, passes in states(model, x, depths, halt, max_loops):
            loss, _ = model.loss(h, y)
            sums[column] += loss.item() * learned.sum().item()
            if column == "exit":
                histogram += torch.bincount(passes[learned].cpu(), minlength=max_loops + 1)
    count = (sequences[1] >= 0).sum().item()
    return {column: total / count for column, total in sums.items()}, histogram


class Answer(NamedTuple):
    """Tokens start … stop − 1 of a document, which answer a question of this kind."""

    kind: str
    start: int
    stop: int


class Reply(NamedTuple):
    """What a model says where an Answer stands: after the text before it, the likeliest token at each of its places."""

    column: int | str  # of `states`
    document: int  # its number
    answer: Answer
    said: list
    right: bool  # are these the answer's tokens?
    logprob: float  # of the answer, in nats
    passes: list  # that each token took


def read_answers(path, tokenizer, block_size):
    """→ (tokens, Answers) of each document of a file whose completions have a "kind". InputError: one is too long."""
    documents = []
    for number, record in enumerate(convert.read_records(path), start=1):
        kinds = record.get("kind")
        if not kinds or not isinstance(kinds, list):
            continue
        with convert.reading(f"record {number} of {path}"):
            segments = convert.segments_of(record, tokenizer)
            ids = np.asarray(convert.encode_document(segments, tokenizer, tokenizer.begin))
            if ids[0] >= 0:  # something must come before an answer
                ids = np.insert(ids, 0, ~(tokenizer.prefix or 0))
            changes = np.diff(ids >= 0, prepend=False, append=False)  # between what is read and what is learned
            borders = np.flatnonzero(changes).reshape(-1, 2).tolist()
            found = f"{len(kinds)} kinds of {len(borders)} answers in {len(ids)} tokens"
            unfit = len(kinds) != len(borders) or len(ids) > block_size
            refuse(unfit, f"{found}: expected as many kinds as answers, and at most {block_size} tokens")
        answers = [Answer(str(kind), *border) for kind, border in zip(kinds, borders)]
        documents.append((np.maximum(ids, ~ids).tolist(), answers))
    return documents


@torch.no_grad()
def replies(model, documents, batch, depths, halt=None, max_loops=8):
    """A Reply to each Answer of `documents`, which are as in `read_answers`, in each column of `states`."""
    longest_first = sorted(range(len(documents)), key=lambda i: -len(documents[i][0]))
    groups = [longest_first[start : start + batch] for start in range(0, len(documents), batch)]
    for group in convert.progress(groups, "answering", len(groups)):
        rows = [torch.tensor(documents[i][0][:-1]) for i in group]
        x = pad_sequence(rows, batch_first=True).to(model.device)  # on the right, which no token sees
        for column, h, passes in states(model, x, depths, halt, max_loops):
            h = model.norm(model.run(model.decoder, h))
            for row, i in enumerate(group):
                tokens, answers = documents[i]
                for answer in answers:
                    place = (row, slice(answer.start - 1, answer.stop - 1))
                    logprobs = model.lm_head(h[place]).float().log_softmax(dim=-1)
                    said = logprobs.argmax(dim=-1).tolist()
                    expected = tokens[answer.start : answer.stop]
                    logprob = logprobs[range(len(said)), expected].sum().item()
                    yield Reply(column, i, answer, said, said == expected, logprob, passes[place].tolist())


def accuracy_by_kind(model, documents, depths, halt=None, max_loops=8, batch=64):
    """Share of right answers after each number of passes in `depths`, with `halt` ("exit"), and the mean passes that
    the tokens of answers then take ("passes"). → {kind: {column: number}}"""
    scores = defaultdict(lambda: defaultdict(list))
    for reply in replies(model, documents, batch, depths, halt, max_loops):
        of_kind = scores[reply.answer.kind]
        of_kind[reply.column].append(reply.right)
        if reply.column == "exit":
            of_kind["passes"].append(np.mean(reply.passes))
    return {kind: {name: np.mean(values) for name, values in scores[kind].items()} for kind in sorted(scores)}


def print_accuracy(rows):
    names = next(iter(rows.values()))
    means = {name: np.mean([columns[name] for columns in rows.values()]) for name in names}
    print("\nshare of right answers; passes are those that the answers take by exit")
    print(f"{'':8}" + "".join(f"{name:>9}" for name in names))
    for kind, columns in (rows | {"mean": means}).items():
        print(f"{kind:8}" + "".join(f"{columns[name]:9.2f}" for name in names))


def held_out(directory, tokenizer, block_size, val=""):
    """→ the ids of `val` or, without it, of what a checkpoint's training held out; and the `read_answers` of `val`."""
    if not val:
        path = directory / "settings.json"
        trained = convert.read_json(path)
        with convert.reading(path):
            refuse("files" not in trained, "it does not say what text the model was trained on: give --data")
            files, val = trained["files"], trained["val"]
    if val:
        tokens = convert.load_tokens(convert.find_files(val), tokenizer)
    else:
        _, tokens = convert.load_data(files, val, tokenizer)
    path = convert.expand(val)
    has_records = path.suffix.lower() in (".json", ".jsonl") and path.is_file()
    return tokens, read_answers(path, tokenizer, block_size) if has_records else []


def bits_per_nat(sequences, tokenizer):
    """The factor from nats per token to bits per byte of the text. Neither added tokens, such as the one that ends a
    document, nor a space that the tokenizer puts in front of a text are any of its bytes."""
    inputs, targets = sequences
    learned = targets >= 0
    added = set(tokenizer.added.values())
    size = 0
    for token_before, token in zip(inputs[learned].tolist(), targets[learned].tolist()):
        if token not in added:
            size += len(tokenizer.token_bytes(token)) - (tokenizer.puts_space and token_before in added)
    return learned.sum().item() / max(1, size) / math.log(2)


def measure_losses(s):
    init, _, control = s.init.partition(",")
    directory = convert.resolve(init)
    model, tokenizer = s.load(directory)
    tokens, documents = held_out(directory, tokenizer, model.config.block_size, s.data)
    sequences = windows(tokens, min(s.context, model.config.block_size), s.tokens)
    losses, histogram = held_out_losses(model, sequences, s.batch, range(s.max_loops + 1), s.rule(), s.max_loops)
    means = {"exit": np.average(range(len(histogram)), weights=histogram), "control": 0}
    table = dict(losses)
    if control:
        other, other_tokenizer = s.load(control)
        refuse(other_tokenizer.spec != tokenizer.spec, f"{control} has another tokenizer: it cannot be compared")
        unlooped, _ = held_out_losses(other, sequences, s.batch, [0])
        table["control"] = unlooped[0]
    factor = bits_per_nat(sequences, tokenizer)
    rows = []
    for passes, loss in table.items():
        row = dict(passes=passes, mean_passes=means.get(passes, passes), loss=loss)
        rows.append(row | dict(perplexity=math.exp(min(loss, 700)), bits_per_byte=loss * factor))
    depths = [depth for depth in DEPTHS if depth <= s.max_loops]
    shares = accuracy_by_kind(model, documents, depths, s.rule(), s.max_loops, s.batch)
    if s.json:
        report = dict(init=str(directory), depths=rows, histogram=histogram.tolist(), accuracy=shares)
        print(json.dumps(report))
        return
    print(f"{directory}: held-out text; 0 passes: one ungated, as the base runs")
    print(f"{'passes':>8} {'mean':>6} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}")
    for row in rows:
        print("{passes:>8} {mean_passes:6.2f} {loss:8.4f} {perplexity:11.3f} {bits_per_byte:10.4f}".format(**row))
    print(f"\npasses taken with exit, {s.rule()}")
    for b, share in enumerate((histogram / histogram.sum()).tolist()[1:], start=1):
        print(f"{b:>8} {'█' * round(40 * share):40} {share:6.1%}")
    if shares:
        print_accuracy(shares)
    print(f"\n{summary(losses, histogram)}")


def summary(losses, histogram):
    """What `held_out_losses` come to, in a sentence."""
    losses = dict(losses)
    mean = np.average(range(len(histogram)), weights=histogram)
    exits = f"exit {losses.pop('exit'):.4f} after {mean:.2f}"
    best = min(losses, key=lambda depth: (depth == 0, losses[depth]))
    return f"best fixed depth: {best} passes, {losses[best]:.4f} nats per token; {exits}; unlooped {losses[0]:.4f}"


# ---- Benchmarks, §4: the model as lm-evaluation-harness asks for it, at one depth or with exit
def harness_model(lm_eval, model, tokenizer, batch, *column):
    """A model in a column of `states` (depths, halt, max_loops), for the harness; `passes`: those of scored tokens."""
    size = model.config.block_size

    class Scorer(lm_eval.api.model.TemplateLM):
        eot_token_id = tokenizer.end_of_text
        prefix_token_id = tokenizer.prefix or 0
        passes = []

        def tok_encode(self, string, add_special_tokens=None, **_):
            if add_special_tokens is False or not string:
                return tokenizer.encode(string)
            return tokenizer.start(string)

        def _loglikelihood_tokens(self, requests, **_):
            """(log-probability, is it the greedy one?) of each continuation. What is too long loses its beginning."""
            documents = []
            for _, context, continuation in requests:
                tokens = [*(context or [self.prefix_token_id]), *continuation][-size - 1 :]
                start = len(tokens) - len(continuation)
                refuse(start < 1, f"an answer of {len(continuation)} tokens: the context has {size}")
                documents.append((tokens, [Answer("", start, len(tokens))]))
            in_order = sorted(replies(model, documents, batch, *column))
            for reply in in_order:
                self.passes += reply.passes
            return [(reply.logprob, reply.right) for reply in in_order]

        def loglikelihood_rolling(self, requests, **_):
            """Log-probabilities of texts, in windows as long as the model's context: each token is scored once."""
            totals = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                windows = [(None, ids[:i], ids[i : i + size]) for i in range(0, len(ids), size)]
                totals.append(sum(logprob for logprob, _ in self._loglikelihood_tokens(windows)))
            return totals

        def generate_until(self, requests, **_):
            raise InputError("tasks that write text are not supported: expected ones that score it")

    return Scorer()


def measure_tables(s):
    """Benchmark the models of --init, one after the other: the harness's own table for each column."""
    with convert.reading('--tasks needs lm-evaluation-harness: pip install ".[eval]"'):
        import lm_eval.api.model
        import lm_eval.tasks
    manager = lm_eval.tasks.TaskManager(include_path=s.include_path)
    options = dict(task_manager=manager, num_fewshot=s.num_fewshot, limit=s.limit)
    report = defaultdict(dict)
    for init in s.init.split(","):
        own = replace(s)  # with this model's threshold
        model, tokenizer = own.load(init)
        columns = {"base": ([0],)}
        if s.max_loops > 0 and model.q_head[1].weight.any():  # else the loop was never trained
            columns |= {str(depth): ([depth],) for depth in DEPTHS if depth <= s.max_loops}
            columns["exit"] = ([], own.rule(), s.max_loops)
        for name, column in columns.items():
            scorer = harness_model(lm_eval, model, tokenizer, s.batch, *column)
            with convert.reading(f"--tasks={s.tasks}"), redirect_stdout(sys.stderr):
                results = lm_eval.simple_evaluate(scorer, tasks=s.tasks.split(","), log_samples=False, **options)
            passes = sum(scorer.passes) / max(1, len(scorer.passes))
            report[init][name] = {"results": results["results"], "passes": passes}
            if not s.json:
                print(f"{init or 'the newest model'}, passes: {name} (mean of the scored tokens {passes:.2f})")
                print(lm_eval.utils.make_table(results), flush=True)
    if s.json:
        print(json.dumps(report, default=float))


def main():
    s = Settings(**convert.parse(Settings))
    measure = measure_tables if s.tasks else measure_losses
    measure(s)


if __name__ == "__main__":
    convert.run(main)

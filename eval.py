"""
Measure a model: its loss at every depth and with exit, the paper's benchmarks, what each layer changes, and how fast it
writes and trains.

    python eval.py                                the model train.py wrote last, on the text its training held out
    python eval.py --init=gpt2 --data=book.txt    any model, any text
    python eval.py --tasks=piqa,mmlu --init=gpt2  the paper's benchmarks, and all others of lm-evaluation-harness
    python eval.py --figures=DIR                  the paper's figures of a model, and their numbers
    python eval.py --task=profile --init=gpt2     what each layer changes, and the losses of neighbouring cuts
    python eval.py --task=speed gpt2              tokens per second; with --train, of training
"""

import json
import logging
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import convert
from convert import flag
from loopus import RULES, Halt, InputError, deep_supervision, early_exit, precise

DEPTHS = (1, 2, 4, 8)


@dataclass
class Settings(convert.Inference):
    """Held-out loss of a looped model at each depth up to max_loops, and with exit; or with --tasks its benchmarks."""

    tasks: str = flag("", "benchmarks of lm-evaluation-harness instead: wikitext,mmlu,…; several models: --init=a,b")
    limit: int = flag(0, "with --tasks: items of each task to read; 0: all", 0)
    num_fewshot: int = flag(-1, "with --tasks: examples before each item; -1: as the task says", -1)
    include_path: str = flag("", "with --tasks: a directory of task files (.yaml) of your own")
    task: str = flag(
        "loss",
        "or profile, or speed (see --task=speed --help); benchmarks: --tasks",
        None,
        ("loss", "profile", "speed"),
    )
    data: str = flag("", "held-out text: file, directory, glob or .bin; empty: what the model's training held out")
    context: int = flag(256, "tokens per sequence", 1)
    batch: int = flag(8, "sequences at a time", 1)
    tokens: int = flag(32768, "held-out tokens to read, spread evenly over the text", 1)
    json: bool = flag(False, "print one JSON object instead of the tables")
    figures: str = flag("", "write the paper's figures to this directory; --init=a,b: a model, and its control")


# ---- Losses, §4, and passes taken, Fig. 18
def count_windows(tokens, context, kind):
    """How many sequences of `context` inputs and next tokens these tokens fill. Raises InputError if none, or if there
    is nothing to learn in any of them. kind: "training" or "held-out"."""
    count = (len(tokens) - 1) // context
    if count < 1:
        raise InputError(f"{len(tokens)} tokens of {kind} text do not fill one context of {context}: give more text")
    if not convert.any_learned(tokens[1 : count * context + 1]):
        raise InputError(f"there is nothing to learn in the {kind} text but in its first token or its rest: give more")
    return count


def windows(tokens, context, limit):
    """At most `limit` held-out tokens as evenly spread, non-overlapping sequences: inputs and next tokens, (n, context)
    each. Raises InputError if there are too few tokens, or none that is learned."""
    count = count_windows(tokens, context, "held-out")
    wanted = max(1, min(count, limit // context))
    starts = np.linspace(0, count - 1, wanted).astype(int) * context
    inputs, targets = convert.rows(tokens, starts, context)
    if not (targets >= 0).any():
        place = f"{wanted} of the {count} sequences of {context} held-out tokens"
        raise InputError(
            f"there is nothing to learn in {place}: read more of them (--tokens, in training --eval_tokens)"
        )
    return inputs, targets


def batches(sequences, size, device):
    """Inputs and targets of `windows`, `size` sequences at a time, without those in which nothing is learned."""
    for x, y in zip(sequences[0].split(size), sequences[1].split(size)):
        if (y >= 0).any():
            yield x.to(device), y.to(device)


@torch.no_grad()
def depth_losses(model, sequences, depths, batch):
    """{passes: mean loss in nats} over sequences of `windows`, for each of `depths`; 0 is the ungated pass."""
    sums = dict.fromkeys(depths, 0.0)
    for x, y in batches(sequences, batch, model.wte.weight.device):
        learned = (y >= 0).sum().item()
        h = model.encode(x)
        if 0 in sums:
            sums[0] += model.loss(model.propose(h), y)[0].item() * learned
        for b in range(1, max(depths) + 1):
            h = model.refine(h)
            if b in sums:
                sums[b] += model.loss(h, y)[0].item() * learned
    count = (sequences[1] >= 0).sum().item()
    return {depth: total / count for depth, total in sums.items()}


@torch.no_grad()
def exit_stats(model, sequences, max_loops, halt, batch):
    """With exit: mean loss, mean passes, histogram of tokens by their passes 1 … max_loops, and the ECE: how far, in
    ten bins, confidence and the share of tokens whose likeliest next one was right are apart on average. Raises
    InputError where a confidence is no number."""
    total = 0.0
    depths = []
    gaps = torch.zeros(10)
    for x, y in batches(sequences, batch, model.wte.weight.device):
        h, depth = early_exit(model, x, max_loops, halt)
        loss, likeliest = model.loss(h, y)
        right = likeliest == y
        learned = y >= 0
        total += loss.item() * learned.sum().item()
        depths.append(depth[learned].cpu())
        confidence = torch.sigmoid(model.confidence(h).float())[learned]
        if confidence.isnan().any():
            raise InputError("the model's confidence is not a number: are its weights damaged?")
        bins = (confidence * 10).long().clamp(max=9)
        gaps.index_add_(0, bins.cpu(), (confidence - right[learned].float()).cpu())
    depths = torch.cat(depths)
    return {
        "loss": total / len(depths),
        "mean_passes": depths.float().mean().item(),
        "histogram": torch.bincount(depths, minlength=max_loops + 1)[1:].tolist(),
        "ece": gaps.abs().sum().item() / len(depths),
    }


class Answer(NamedTuple):
    """Tokens start … stop − 1 of a document, which answer a question of this kind."""

    kind: str
    start: int
    stop: int


def read_answers(path, tokenizer, block_size):
    """The documents of a .jsonl file in which each completion has its "kind" → (tokens, Answers) of each. Raises
    InputError for other lines, and for a document that is longer than block_size."""
    documents = []
    for number, record in convert.read_records(path):
        try:
            segments = convert.document_of(record, tokenizer.template)
        except ValueError as e:
            raise InputError(f'line {number} of {path} ({e!s:.80}): expected a "prompt" and its "completion"') from None
        if not segments:
            continue
        ids = []
        borders = []
        for segment, part in convert.encoded(segments, tokenizer):
            start = len(ids)
            ids += part
            if segment.learned and start > 0:  # nothing comes before a "text", so it is no answer
                borders.append((start, len(ids)))
            ids = ids or [tokenizer.prefix or 0]  # something must come before an answer
        kinds = record.get("kind")
        if not is_list_of_strings(kinds) or len(kinds) != len(borders):
            raise InputError(f'line {number} of {path}: expected as many strings in "kind" as completions')
        if len(ids) > block_size:
            raise InputError(
                f"line {number} of {path}: {len(ids)} tokens do not fit the model's context of {block_size}"
            )
        answers = [Answer(kind, start, stop) for kind, (start, stop) in zip(kinds, borders) if start < stop]
        documents.append((ids, answers))
    return documents


def is_list_of_strings(value):
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def equally_long(documents, size):
    """Batches of documents of the same length, `size` at most in each."""
    by_length = defaultdict(list)
    for document in documents:
        by_length[len(document[0])].append(document)
    for group in by_length.values():
        for i in range(0, len(group), size):
            yield group[i : i + size]


@torch.no_grad()
def accuracy_by_kind(model, documents, depths, halt=None, max_loops=8, batch=64):
    """Share of right answers after each number of passes in `depths`, and with `halt` also "exit" and the mean passes
    of its tokens, "passes". An answer is right if each of its tokens is the likeliest one after the text before it.
    → {kind: {column: number}}"""
    found = defaultdict(lambda: defaultdict(list))
    for group in equally_long(documents, batch):
        idx = torch.tensor([ids for ids, _ in group], device=model.wte.weight.device)
        x, y = idx[:, :-1], idx[:, 1:]
        columns = {depth: model(x, depth).argmax(dim=-1) == y for depth in depths}
        if halt:
            h, passes = early_exit(model, x, max_loops, halt)
            columns["exit"] = model.decode(h).argmax(dim=-1) == y
            columns["passes"] = passes.float()
        for name, values in columns.items():
            for row_values, (_, answers) in zip(values.cpu(), group):
                for kind, start, stop in answers:
                    part = row_values[start - 1 : stop - 1]
                    found[kind][name].append(part.mean().item() if name == "passes" else part.all().item())
    means = {}
    for kind in sorted(found):
        means[kind] = {name: sum(values) / len(values) for name, values in found[kind].items()}
    return means


def print_accuracy(rows):
    """A table of `accuracy_by_kind`."""
    names = list(next(iter(rows.values())))
    print("\nshare of right answers; passes are those that the answers take by exit")
    print(f"{'':8}" + "".join(f"{name:>9}" for name in names))
    for kind, columns in rows.items():
        print(f"{kind:8}" + "".join(f"{columns[name]:9.2f}" for name in names))
    means = [sum(columns[name] for columns in rows.values()) / len(rows) for name in names]
    print(f"{'mean':8}" + "".join(f"{mean:9.2f}" for mean in means))


def answers_file(s, directory):
    """The held-out .jsonl file, if its completions have kinds."""
    name = s.data
    if not name and (directory / "settings.json").exists():
        name = convert.read_json(directory / "settings.json").get("val")
    path = convert.expand(name or "")
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return None
    _, first = next(convert.read_records(path), (1, None))
    if isinstance(first, dict) and "kind" in first:
        return path
    return None


def held_out_text(s, directory, tokenizer):
    """The tokens of --data, or those that the training of the model in `directory` held out."""
    if s.data:
        return convert.load_tokens(convert.find_files(s.data), tokenizer)
    path = directory / "settings.json"
    if not path.exists():
        raise InputError(f"{directory} does not say what text it was trained on: give --data")
    trained = convert.read_json(path)
    if not isinstance(trained.get("data"), str) or not isinstance(trained.get("val"), str):
        raise InputError(f"{path} does not say what text it was trained on: give --data")
    _, held_out = convert.load_data(trained["data"], trained["val"], tokenizer)
    return held_out


def bits_per_nat_and_token(sequences, tokenizer):
    """The factor from nats per token to bits per byte of the text. Neither added tokens, such as
    the one that ends a document, nor a space that the tokenizer puts in front of a text are any of its bytes."""
    inputs, targets = sequences
    learned = targets >= 0
    added = set(tokenizer.added.values())
    size = 0
    for token_before, token in zip(inputs[learned].tolist(), targets[learned].tolist()):
        if token not in added:
            size += len(tokenizer.token_bytes(token))
            if tokenizer.puts_space and token_before in added:
                size -= 1
    return learned.sum().item() / max(1, size) / math.log(2)


def checked_losses(s, model, sequences):
    """`depth_losses` at 0 … s.max_loops passes. Raises InputError where one is no number."""
    losses = depth_losses(model, sequences, range(s.max_loops + 1), s.batch)
    for depth, loss in losses.items():
        if not math.isfinite(loss):
            problem = f"the loss after {depth} passes is {loss}"
            place = s.init or "the model"
            raise InputError(f"{problem}: are the weights in {place} damaged, or --max_loops={s.max_loops} too many?")
    return losses


def measure_losses(s):
    device, dtype = convert.pick_device(s.device, s.dtype)
    directory = convert.resolve(s.init)
    model, tokenizer = convert.load(directory, device, dtype)
    context = min(s.context, model.config.block_size)
    sequences = windows(held_out_text(s, directory, tokenizer), context, s.tokens)
    count = (sequences[1] >= 0).sum().item()
    losses = checked_losses(s, model, sequences)
    halt = s.rule()
    exit = exit_stats(model, sequences, s.max_loops, halt, s.batch)
    factor = bits_per_nat_and_token(sequences, tokenizer)
    rows = [row(depth, depth, loss, factor) for depth, loss in losses.items()]
    rows.append(row("exit", exit["mean_passes"], exit["loss"], factor))
    path = answers_file(s, directory)
    shares = {}
    if path:
        documents = read_answers(path, tokenizer, model.config.block_size)
        depths = [depth for depth in DEPTHS if depth <= s.max_loops]
        shares = accuracy_by_kind(model, documents, depths, halt, s.max_loops, s.batch)
    if s.json:
        report = {"init": str(directory), "tokens": count, "depths": rows, **halt._asdict(), "exit": exit}
        print(json.dumps(report | {"accuracy": shares}))
        return
    print(f"{directory}: {count:,} held-out tokens in sequences of {context}; 0 passes: one ungated, as the base runs")
    print(f"{'passes':>8} {'mean':>6} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}")
    for r in rows:
        print("{passes:>8} {mean_passes:6.2f} {loss:8.4f} {perplexity:11.3f} {bits_per_byte:10.4f}".format(**r))
    print("\npasses taken with exit, " + ", ".join(f"{name} {value}" for name, value in halt._asdict().items()))
    for b, n in enumerate(exit["histogram"], start=1):
        print(f"{b:>8} {'█' * round(40 * n / count):40} {n / count:6.1%}")
    print(f"\nconfidence is {exit['ece']:.3f} from how often the likeliest token was right, on average (the ECE)")
    if shares:
        print_accuracy(shares)


def row(passes, mean_passes, loss, factor):
    return {
        "passes": passes,
        "mean_passes": mean_passes,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": loss * factor,
    }


# ---- Tables: the paper's benchmarks, §4
class Column(NamedTuple):
    """A column of the tables: every token takes max_loops passes, or those until `halt` stops it. base: 0 passes."""

    name: str
    max_loops: int
    halt: Halt | None = None


def columns_of(model, s):
    """base, the depths up to --max_loops, and exit; base alone where the loop was never trained, as in a pretrained
    model or the control: the last layer of the confidence head, which starts at zero, is then still zero."""
    columns = [Column("base", 0)]
    if s.max_loops > 0 and model.q_head[1].weight.any():
        columns += [Column(str(depth), depth) for depth in DEPTHS if depth <= s.max_loops]
        columns.append(Column("exit", s.max_loops, s.rule()))
    return columns


def column_states(model, idx, columns):
    """Run tokens idx (B, T) through the loop once for all fixed depths, and once with exit. Yields of each column its
    name, the states to decode (B, T, C), and with exit the passes (B, T), else None."""
    fixed = {column.max_loops: column.name for column in columns if column.halt is None}
    h = model.encode(idx)
    yield fixed[0], model.propose(h), None
    for b in range(1, max(fixed) + 1):
        h = model.refine(h)
        if b in fixed:
            yield fixed[b], h, None
    for column in columns:
        if column.halt is not None:
            yield column.name, *early_exit(model, idx, column.max_loops, column.halt)


def token_scores(model, h, scored, targets):
    """Log-probabilities of `targets` (N,), each after its state h[row, position], `scored` being the rows (N,) and
    positions (N,), and whether each is the likeliest token (N,). Some are decoded at a time: logits are large."""
    h = model.run(model.decoder, h)
    logprobs = []
    likeliest = []
    for states, tokens in zip(model.norm(h[scored]).split(512), targets.split(512)):
        logits = precise(model.lm_head(states))
        if logits.isnan().any():
            raise InputError("the model's logits are no numbers: are its weights damaged?")
        logprobs.append(-F.cross_entropy(logits, tokens, reduction="none"))
        likeliest.append(logits.argmax(dim=-1) == tokens)
    return torch.cat(logprobs).cpu(), torch.cat(likeliest).cpu()


@torch.no_grad()
def score(model, pairs, columns, batch):
    """pairs: (context, continuation), lists of tokens → of each {column: (log-probability of the continuation in nats,
    whether greedy decoding writes it)} and under "passes" those that its tokens take by exit. Pairs that are alike but
    for the last token, such as the four letters of a question, run once. What is too long loses its beginning.
    InputError: a continuation alone is too long."""
    size = model.config.block_size
    sharing = defaultdict(list)  # input tokens → numbers of the pairs that they answer
    for i, (context, continuation) in enumerate(pairs):
        if len(continuation) > size:
            raise InputError(f"an answer of {len(continuation)} tokens does not fit the model's context of {size}")
        tokens = (context + continuation)[-size - 1 : -1]
        sharing[tuple(tokens)].append(i)
    inputs = sorted(sharing, key=len, reverse=True)
    answers = [{"passes": []} for _ in pairs]
    begun = time.time()
    done = 0
    for start in range(0, len(inputs), batch):
        group = inputs[start : start + batch]
        numbers = [sharing[tokens] for tokens in group]
        score_batch(model, group, numbers, pairs, columns, answers)
        done += sum(map(len, group))
        show_progress("scoring", begun, done, sum(map(len, inputs)))
    return answers


def score_batch(model, inputs, numbers, pairs, columns, answers):
    """Fill answers[i] for the pairs i in numbers[row], which inputs[row] answers. Inputs are padded on their right,
    which no token before sees."""
    device = model.wte.weight.device
    idx = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.long)  # the first is the longest
    rows, positions, targets = [], [], []
    for row, tokens in enumerate(inputs):
        idx[row, : len(tokens)] = torch.tensor(tokens)
        for i in numbers[row]:
            continuation = pairs[i][1]
            rows += [row] * len(continuation)
            positions += range(len(tokens) - len(continuation), len(tokens))
            targets += continuation
    scored = torch.tensor(rows, device=device), torch.tensor(positions, device=device)
    targets = torch.tensor(targets, device=device)
    answered = [i for pair_numbers in numbers for i in pair_numbers]
    lengths = [len(pairs[i][1]) for i in answered]
    for name, h, passes in column_states(model, idx.to(device), columns):
        logprobs, likeliest = token_scores(model, h, scored, targets)
        for i, logprob, greedy in zip(answered, logprobs.split(lengths), likeliest.split(lengths)):
            answers[i][name] = (logprob.sum().item(), greedy.all().item())
        if passes is not None:
            for i, taken in zip(answered, passes[scored].cpu().split(lengths)):
                answers[i]["passes"] = taken.tolist()


@torch.no_grad()
def write_batch(model, tokenizer, requests, columns):
    """Continue the contexts of requests that differ in nothing else, by greedy decoding → of each {column: text}, up to
    the first string that is to end it, and under "passes" those of its tokens by exit. What is too long loses its
    beginning. InputError: the task wants texts that are drawn at random, or longer than the model's context."""
    settings = requests[0].args[1]
    task = requests[0].task_name
    if settings.get("do_sample", settings.get("temperature", 0) > 0):
        raise InputError(f"{task} draws its texts at random (do_sample): expected a task for greedy decoding")
    max_new_tokens = settings.get("max_gen_toks", 256)  # the harness's own default
    room = model.config.block_size - max_new_tokens
    if room < 1:
        raise InputError(f"{task} writes {max_new_tokens} tokens: the model's context is {model.config.block_size}")
    prompts = []
    for request in requests:
        tokens = tokenizer.start(request.args[0]) or [tokenizer.prefix or 0]
        prompts.append(tokens[-room:])
    answers = [{"passes": []} for _ in requests]
    for column in columns:
        halt = column.halt or Halt(threshold=2.0)
        texts, depths = model.generate(
            prompts, max_new_tokens, column.max_loops, temperature=0, halt=halt, ends=tokenizer.ends
        )
        for answer, prompt, tokens, passes in zip(answers, prompts, texts, depths.tolist()):
            answer[column.name] = text_until(tokenizer, tokens[len(prompt) :], settings.get("until") or [])
            if column.halt is not None:
                answer["passes"] = [depth for depth in passes if depth > 0]
    return answers


def text_until(tokenizer, tokens, until):
    """The text of tokens, without special ones, before the first end of a text and the strings `until` (or one)."""
    tokens = takewhile(lambda token: token not in tokenizer.ends, tokens)
    special = {token["id"] for token in tokenizer.spec.get("added_tokens") or [] if token.get("special")}
    text = tokenizer.decode(token for token in tokens if token not in special)
    if isinstance(until, str):
        until = [until]
    for end in filter(None, until):
        text = text.split(end)[0]
    return text


def show_progress(what, begun, done, total):
    """A line on a terminal: how much is done since the time `begun`, and how long the rest takes at that speed."""
    left = (time.time() - begun) * (total - done) / done
    convert.progress(f"{what}, {left / 60:5.1f} min left", done, total)


class Scorer:
    """The model as lm-evaluation-harness asks it: `harness_model` makes a TemplateLM of it. It answers in the column
    that `column` names. A request is answered in all columns at once, when it first comes."""

    eot_token_id = None  # the harness asks a class for them
    prefix_token_id = None

    def __init__(self, model, tokenizer, columns, batch):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.eot_token_id = tokenizer.end_of_text
        self.prefix_token_id = tokenizer.prefix or 0
        self.columns = columns
        self.column = columns[0].name
        self.batch = batch
        self.known = {}  # request → {column: answer, "passes": of its tokens by exit}
        self.requests_of = defaultdict(set)  # task → its requests

    def tok_encode(self, string, add_special_tokens=None, **_):
        if add_special_tokens is False:
            return self.tokenizer.encode(string)
        return self.tokenizer.start(string)

    def answer_all(self, requests, answer):
        """The answers in this column. answer(requests) computes those in all columns where they are not yet known."""
        keys = [repr((request.request_type, request.args)) for request in requests]
        unknown = {key: request for key, request in zip(keys, requests) if key not in self.known}
        if unknown:
            self.known.update(zip(unknown, answer(list(unknown.values()))))
        for key, request in zip(keys, requests):
            self.requests_of[request.task_name].add(key)
        return [self.known[key][self.column] for key in keys]

    def mean_passes(self, tasks):
        """Of the tokens that these tasks score or have written, by exit; None without it."""
        keys = set().union(*(self.requests_of[task] for task in tasks))
        passes = [depth for key in keys for depth in self.known[key]["passes"]]
        if not passes:
            return None
        return sum(passes) / len(passes)

    def loglikelihood(self, requests, **_):
        answer = partial(super().loglikelihood, disable_tqdm=True)  # encodes pairs for _loglikelihood_tokens
        return self.answer_all(requests, answer)

    def _loglikelihood_tokens(self, requests, **_):
        pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
        return score(self.model, pairs, self.columns, self.batch)

    def loglikelihood_rolling(self, requests, **_):
        return self.answer_all(requests, self.score_texts)

    def score_texts(self, requests):
        """Log-probabilities of whole texts, in windows as long as the model's context: each token is scored once."""
        size = self.model.config.block_size
        pairs, text_of = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for start in range(0, len(ids), size):
                context = [self.prefix_token_id, *ids[:start]]
                pairs.append((context, ids[start : start + size]))
                text_of.append(i)
        sums = [{column.name: 0.0 for column in self.columns} | {"passes": []} for _ in requests]
        for i, window in zip(text_of, score(self.model, pairs, self.columns, self.batch)):
            sums[i]["passes"] += window.pop("passes")
            for name, (logprob, _) in window.items():
                sums[i][name] += logprob
        return sums

    def generate_until(self, requests, **_):
        return self.answer_all(requests, self.write_texts)

    def write_texts(self, requests):
        """Texts after the contexts of requests, those with the same settings in batches."""
        alike = defaultdict(list)
        for i, request in enumerate(requests):
            alike[repr(request.args[1])].append(i)
        answers = {}
        begun = time.time()
        for numbers in alike.values():
            for start in range(0, len(numbers), self.batch):
                group = numbers[start : start + self.batch]
                written = write_batch(self.model, self.tokenizer, [requests[i] for i in group], self.columns)
                answers.update(zip(group, written))
                show_progress("writing", begun, len(answers), len(requests))
        return [answers[i] for i in range(len(requests))]


def import_harness():
    """lm-evaluation-harness, which is an optional extra. Raises InputError where it is not installed."""
    try:
        import lm_eval.api.model
        import lm_eval.tasks
    except ImportError:
        raise InputError('--tasks needs lm-evaluation-harness, which is missing: pip install ".[eval]"') from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would start a process for each core
    return lm_eval


def find_tasks(harness, s):
    """The harness's TaskManager for --tasks, of --include_path alone if all are there: to list the harness's own takes
    half a minute. Raises InputError for a task that is in neither."""
    path = s.include_path or None
    if path and not convert.expand(path).is_dir():
        raise InputError(f"--include_path={path} is no directory: expected one with task files (.yaml)")
    names = s.tasks.split(",")
    manager = harness.tasks.TaskManager(include_path=path, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = harness.tasks.TaskManager(include_path=path)
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        where = f"lm-evaluation-harness and --include_path={s.include_path}"
        raise InputError(f"--tasks: {where} have no {', '.join(unknown)}: lm-eval ls tasks lists the harness's own")
    return manager


def harness_model(harness, *arguments):
    """`Scorer` of these arguments as the harness takes them."""

    class HarnessModel(Scorer, harness.api.model.TemplateLM):
        pass

    return HarnessModel(*arguments)


def evaluate(harness, scorer, manager, s):
    """Let the harness score in the scorer's column. → what it returns. InputError: a task's files are damaged."""
    try:
        with redirect_stdout(sys.stderr):
            return harness.simple_evaluate(
                scorer,
                tasks=s.tasks.split(","),
                task_manager=manager,
                num_fewshot=s.num_fewshot if s.num_fewshot >= 0 else None,
                limit=s.limit or None,
                bootstrap_iters=1000,
                log_samples=False,
            )
    except (InputError, OSError):
        raise
    except Exception as e:  # templates, configs and data may fail in any way
        if convert.is_out_of_memory(e):
            raise
        problem = f"lm-evaluation-harness cannot read {s.tasks} ({e!r:.300})"
        raise InputError(f"{problem}: mend the task's files, or choose others") from e


def benchmark(harness, manager, init, s):
    """One model on all tasks → {"results": {column: {task: {metric: value}}}, "items": {task: how many}, "passes":
    {task: mean of the scored tokens by exit}, "groups": {group: what is in it}}; groups count as tasks."""
    device, dtype = convert.pick_device(s.device, s.dtype)
    directory = convert.resolve(init)
    model, tokenizer = convert.load(directory, device, dtype)
    if tokenizer is None:
        raise InputError(f"{directory} has no tokenizer.json: text cannot be read without one")
    scorer = harness_model(harness, model, tokenizer, columns_of(model, s), s.batch)
    results = {}
    for column in scorer.columns:
        scorer.column = column.name
        evaluated = evaluate(harness, scorer, manager, s)
        results[column.name] = evaluated["results"]
    groups = evaluated.get("group_subtasks", {})
    items = {}
    passes = {}
    for name in evaluated["results"]:
        tasks = tasks_in(name, groups)
        items[name] = sum(evaluated["n-samples"][task]["effective"] for task in tasks)
        passes[name] = scorer.mean_passes(tasks)
    return {"results": results, "items": items, "passes": passes, "groups": groups}


def tasks_in(name, groups):
    """The tasks of a group and of the groups in it; of a task, itself."""
    if name not in groups:
        return [name]
    return [task for part in groups[name] for task in tasks_in(part, groups)]


def is_metric(key):
    return "," in key and "_stderr," not in key


def shown_tasks(table):
    """The tasks of a table, without those that the mean of a group stands for."""
    results = table["results"]["base"]
    in_groups = set()
    for group, names in table["groups"].items():
        if any(map(is_metric, results[group])):
            in_groups.update(names)
    return [task for task in results if task not in in_groups]


def print_tables(tables, s):
    """A row for each task, metric and model: the columns, with the mean passes of exit."""
    first = next(iter(tables.values()))
    columns = max((table["results"] for table in tables.values()), key=len)
    widest = max(map(len, tables))
    print(f"base: the pretrained model's one pass; exit: {s.halt}, at most {s.max_loops} passes, on average those of")
    print("the last column for the tokens that are scored; ± standard error")
    head = f"{'task':16} {'items':>6} {'metric':16} {'model':{widest}}"
    print(head + "".join(f" {name:>16}" for name in columns) + f" {'passes':>7}")
    for task in shown_tasks(first):
        result = first["results"]["base"][task]
        for key in filter(is_metric, result):
            for model, table in tables.items():
                line = f"{task:16} {table['items'][task]:6} {key.removesuffix(',none'):16} {model:{widest}}"
                for column in columns:
                    line += f" {cell(table['results'].get(column), task, key):>16}"
                if table["passes"][task] is not None:
                    line += f" {table['passes'][task]:7.2f}"
                print(line)


def cell(results, task, metric):
    """A value and its standard error, where there is one, as text; "" where the model lacks the column."""
    if results is None:
        return ""
    error = results[task].get(metric.replace(",", "_stderr,"))
    text = f"{results[task][metric]:.4f}"
    if isinstance(error, float):
        text += f" ±{error:.4f}"
    return text


def measure_tables(s):
    """Benchmark the models of --init, side by side."""
    harness = import_harness()
    manager = find_tasks(harness, s)
    tables = {}
    for init in s.init.split(","):
        name = init or str(convert.resolve(init))
        tables[name] = benchmark(harness, manager, init, s)
    if s.json:
        print(json.dumps({"settings": asdict(s), "models": tables}, default=float))
        return
    print_tables(tables, s)


# ---- Where to cut, Fig. 1a
def measure_profile(s):
    """The profile, the cuts, and the untrained losses of these and of their neighbours, on a short sample text."""
    device, dtype = convert.pick_device(s.device, s.dtype)
    model, tokenizer = convert.load(s.init, device, dtype)
    convert.show_profile(model, tokenizer)
    encoder, decoder = len(model.encoder), len(model.decoder)
    idx = convert.sample_text(model, tokenizer)
    sequences = (idx[:, :-1], idx[:, 1:])
    print("\nuntrained loss after    1        2        4        8 passes")
    for e, d in neighbouring_cuts(encoder, decoder, model.config.n_layer):
        convert.cut(model, e, d)
        losses = depth_losses(model, sequences, [0, *DEPTHS], 8)
        print(f"cut {e:>2}, {d:<2}        " + "".join(f"{losses[b]:9.3f}" for b in DEPTHS), flush=True)
    print(f"the model itself  {losses[0]:9.3f}")


def neighbouring_cuts(encoder, decoder, n_layer):
    """A cut (encoder layers, decoder layers), and those that move one of its borders by one layer."""
    cuts = [
        (encoder, decoder),
        (encoder - 1, decoder),
        (encoder + 1, decoder),
        (encoder, decoder - 1),
        (encoder, decoder + 1),
    ]
    return [(e, d) for e, d in cuts if min(e, d) >= 0 and e + d < n_layer]


# ---- Figures
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # told apart by all eyes


def measure_figures(s):
    """Write the paper's figures to s.figures, each as a picture and with its numbers as JSON. The first of the models
    in s.init is drawn, a second one is the unlooped control. Raises InputError if matplotlib is missing, or if the
    control has another tokenizer."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError('--figures needs matplotlib: pip install ".[plots]"') from None
    if convert.expand(s.figures).is_file():
        raise InputError(f"--figures={s.figures} is a file: expected a directory, which may be new")
    if s.tasks:
        find_tasks(import_harness(), s)
    if s.max_loops < 1 or s.context < 2:
        raise InputError("--figures of --max_loops=0 or --context=1 would be empty: expected more")
    names = s.init.split(",")
    device, dtype = convert.pick_device(s.device, s.dtype)
    directory = convert.resolve(names[0])
    model, tokenizer = convert.load(directory, device, dtype)
    if tokenizer is None:
        raise InputError(f"{directory} has no tokenizer.json: text cannot be read without one")
    control = None
    if len(names) > 1:
        control, others = convert.load(names[1], device, dtype)
        if others is None or others.bytes_of != tokenizer.bytes_of:
            raise InputError(f"{names[1]} has other tokens than {names[0]}: their losses cannot be compared")
    context = min(s.context, *(loaded.config.block_size for loaded in (model, control or model)))
    sequences = windows(held_out_text(s, directory, tokenizer), context, s.tokens)
    text = sequences[0][:1, :32].to(device)
    path = answers_file(s, directory)
    documents = read_answers(path, tokenizer, model.config.block_size) if path else []
    name = "/".join(Path(names[0] or directory).parts[-3:])
    title = f"{name} on {Path(s.data or path or 'the text its training held out').name}"
    losses = loss_numbers(s, model, control, sequences, documents)
    if s.tasks:
        losses["accuracy"] |= benchmark_accuracy(s)
    save_figure(s, title, "losses", losses, draw_losses)
    save_figure(s, f"{name} on the first words of loopus.py", "layers", layer_numbers(model, tokenizer), draw_layers)
    training = training_numbers(directory.parent / "log.jsonl")
    if training:
        save_figure(s, title, "training", training, draw_training)
    else:
        print(f"no held-out losses in {directory.parent / 'log.jsonl'}: training.png is left out", file=sys.stderr)
    states = state_numbers(s, model, text)
    save_figure(s, title, "states", states, draw_states)
    prompt = before_first_answer(documents) or text[0].tolist()
    save_figure(s, title, "candidates", candidate_numbers(s, model, tokenizer, prompt), draw_candidates)
    epsilon = sorted(states["step"])[len(states["step"]) // 2]
    save_figure(s, title, "passes", passes_numbers(s, model, sequences, epsilon), draw_passes)


def before_first_answer(documents):
    """The tokens that the first answer in documents of `read_answers` follows; none without one."""
    for tokens, answers in documents:
        if answers:
            return tokens[: answers[0].start]
    return []


def save_figure(s, title, name, numbers, draw):
    """Write name.png, 900 × 600 pixels, drawn by draw(figure, numbers), and name.json: both or neither."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    figure.suptitle(plain(title), fontsize=9)
    draw(figure, numbers)
    with convert.all_or_nothing(s.figures) as unfinished:
        figure.savefig(unfinished / f"{name}.png")
        (unfinished / f"{name}.json").write_text(json.dumps({"title": title} | numbers, indent=1), encoding="utf-8")
    print(convert.expand(s.figures) / f"{name}.png")


def plain(text):
    """Text as matplotlib shows it: no formulas, and escapes for letters that its font lacks."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(None))
    letters = [letter if font.get_char_index(ord(letter)) else ascii(letter)[1:-1] for letter in text]
    return "".join(letters).replace("$", r"\$")


def layer_numbers(model, tokenizer):
    """Fig. 1a: how much each layer changes the state, and the cuts."""
    distances = convert.layer_distances(model, convert.sample_text(model, tokenizer))
    return {"distances": distances.tolist(), "encoder": len(model.encoder), "decoder": len(model.decoder)}


def draw_layers(figure, numbers):
    axes = figure.subplots()
    count = len(numbers["distances"])
    borders = [0, numbers["encoder"], count - numbers["decoder"], count]
    for part, colour, begin, end in zip(("encoder", "loop", "decoder"), COLOURS, borders, borders[1:]):
        axes.bar(range(begin, end), numbers["distances"][begin:end], color=colour, label=part)
    axes.set(xlabel="layer", ylabel="1 − cos(state before, state after)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def loss_numbers(s, model, control, sequences, documents):
    """Fig. 5: the loss at each depth, of one ungated pass, of the control and with exit; accuracy by kind."""
    halt = s.rule()
    losses = checked_losses(s, model, sequences)
    exit = exit_stats(model, sequences, s.max_loops, halt, s.batch)
    numbers = {"loss": list(losses.values()), "exit": [exit["mean_passes"], exit["loss"]]}
    if control:
        numbers["control"] = depth_losses(control, sequences, [0], s.batch)[0]
    accuracy = {}
    depths = list(range(1, s.max_loops + 1))
    by_kind = accuracy_by_kind(model, documents, depths, halt, s.max_loops, s.batch)
    for kind, columns in by_kind.items():
        shares = [columns[depth] for depth in depths]
        accuracy[kind] = {"passes": depths, "share": shares, "exit": [columns["passes"], columns["exit"]]}
    return numbers | {"accuracy": accuracy}


def benchmark_accuracy(s):
    """{task: its accuracy at each depth and with exit} of the first model in s.init, of the tasks in s.tasks that have
    one. None of a loop that was never trained."""
    harness = import_harness()
    table = benchmark(harness, find_tasks(harness, s), s.init.split(",")[0], s)
    columns = table["results"]
    depths = [depth for depth in DEPTHS if str(depth) in columns]
    accuracy = {}
    for task in shown_tasks(table):
        if depths and "acc,none" in columns["base"][task]:
            shares = [columns[str(depth)][task]["acc,none"] for depth in depths]
            exit = [table["passes"][task], columns["exit"][task]["acc,none"]]
            accuracy[task] = {"passes": depths, "share": shares, "exit": exit}
    return accuracy


def draw_losses(figure, numbers):
    panels = figure.subplots(1, 2 if numbers["accuracy"] else 1, squeeze=False)[0]
    base, *losses = numbers["loss"]
    depths = range(1, len(losses) + 1)
    panels[0].plot(depths, losses, "o-", color=COLOURS[0], markersize=4, label="looped")
    panels[0].axhline(base, linestyle="--", color=COLOURS[1], label="0 passes: one ungated")
    if "control" in numbers:
        panels[0].axhline(numbers["control"], linestyle=":", color=COLOURS[2], label="control, unlooped")
    panels[0].plot(*numbers["exit"], "*", color=COLOURS[6], markersize=11, label="exit")
    panels[0].xaxis.get_major_locator().set_params(integer=True)
    panels[0].set(xlabel="passes", ylabel="held-out loss, nats per token")
    panels[0].legend(fontsize=8)
    if numbers["accuracy"]:
        draw_accuracy(panels[1], numbers["accuracy"])


def draw_accuracy(axes, accuracy):
    for colour, (kind, row) in zip(shades_of(len(accuracy)), accuracy.items()):
        axes.plot(row["passes"], row["share"], color=colour, label=plain(kind))
        axes.plot(*row["exit"], "*", color=colour, markersize=9)
    axes.set(xlabel="passes (star: exit)", ylabel="share of right answers", ylim=(0, 1.03))
    axes.legend(fontsize=7)


def shades_of(count):
    """So many colours in an order that is seen as one."""
    from matplotlib import colormaps

    return [colormaps["viridis"](i / max(1, count - 1) * 0.92) for i in range(count)]


def training_numbers(path):
    """Fig. 6: the held-out loss at each depth while the model was trained, from its log. None: there is none."""
    by_step = {}
    if path.exists():
        for _, record in convert.read_records(path):
            if isinstance(record, dict) and "held_out" in record:
                by_step[record["step"]] = record["held_out"]  # after a kill, a step is written again
    if not by_step:
        return None
    steps = sorted(by_step)
    depths = sorted({depth for losses in by_step.values() for depth in losses}, key=int)
    return {"steps": steps, "losses": {depth: [by_step[i].get(depth) for i in steps] for depth in depths}}


def draw_training(figure, numbers):
    axes = figure.subplots()
    for colour, (depth, losses) in zip(COLOURS, numbers["losses"].items()):
        values = np.array(losses, dtype=float)  # None, for what is no number, becomes a gap
        axes.plot(numbers["steps"], values, "o-", color=colour, markersize=4, label=depth)
    axes.set(xlabel="optimizer steps", ylabel="held-out loss, nats per token")
    axes.legend(title="passes")


@torch.no_grad()
def state_numbers(s, model, text):
    """Fig. 7: the states of the tokens text (1, T) in their first two principal components, before the loop and after
    each pass; mean α and step length ‖h^{b+1} − h^b‖₂ of each pass. The first token is left out: many pretrained models
    give it a state so long (SmolLM2: after one pass 50 times the others') that it would be all one sees."""
    h = model.encode(text)
    states, alphas, steps = [h[0, 1:]], [], []
    for _ in range(s.max_loops):
        proposed = model.propose(h)
        alphas.append(model.gate.alpha(proposed - h)[0, 1:].float().mean().item())
        h = model.gate(proposed, h)
        steps.append((h[0, 1:] - states[-1]).float().norm(dim=-1).mean().item())
        states.append(h[0, 1:])
    states = torch.stack(states).float().cpu()  # (passes + 1, T − 1, C)
    centred = states - states.mean(dim=(0, 1))
    _, sizes, axes = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)
    shares = sizes.square() / sizes.square().sum().clamp(min=1e-30)
    coordinates = (centred @ axes[:2].T).tolist()
    return {"coordinates": coordinates, "variance": shares[:2].tolist(), "alpha": alphas, "step": steps}


def draw_states(figure, numbers):
    grid = figure.add_gridspec(2, 2, width_ratios=(2, 1))
    axes = figure.add_subplot(grid[:, 0])
    coordinates = np.array(numbers["coordinates"])  # (passes + 1, T − 1, 2)
    for path in coordinates.swapaxes(0, 1):
        axes.plot(*path.T, color="#bbbbbb", linewidth=0.5, zorder=1)
    for b, (points, colour) in enumerate(zip(coordinates, shades_of(len(coordinates)))):
        axes.scatter(*points.T, s=8, color=[colour], zorder=2, label=b)
    first, second = numbers["variance"]
    axes.set(xlabel=f"1st component ({first:.0%} of the variance)", ylabel=f"2nd component ({second:.0%})")
    axes.legend(title="passes", fontsize=7, title_fontsize=8)
    for place, name, label in ((0, "alpha", "mean α"), (1, "step", "mean step length")):
        axes = figure.add_subplot(grid[place, 1])
        axes.plot(range(1, len(numbers[name]) + 1), numbers[name], "o-", color=COLOURS[0], markersize=3)
        axes.set(xlabel="pass", ylabel=label, ylim=(0, 1.15 * max(numbers[name])))
        axes.xaxis.get_major_locator().set_params(integer=True)


@torch.no_grad()
def candidate_numbers(s, model, tokenizer, prompt):
    """Fig. 8: the probability, after each pass, of the tokens that are among the three likeliest after some pass; 0 is
    the ungated one."""
    idx = torch.tensor([prompt], device=model.wte.weight.device)
    h = model.encode(idx)
    rows = [model.decode(model.propose(h))[0, -1].float().softmax(dim=-1)]
    for _ in range(s.max_loops):
        h = model.refine(h)
        rows.append(model.decode(h)[0, -1].float().softmax(dim=-1))
    probabilities = torch.stack(rows).cpu()  # (passes + 1, V)
    likely = probabilities.topk(min(3, model.config.vocab_size)).indices.unique()
    order = probabilities[:, likely].amax(dim=0).argsort(descending=True)
    tokens = {}
    for token in likely[order][:6].tolist():
        text = repr(tokenizer.token_bytes(token).decode(errors="replace"))
        tokens[f"{text} ({token})"] = probabilities[:, token].tolist()
    prompt_text = b"".join(tokenizer.token_bytes(token) for token in prompt).decode(errors="replace")
    return {"prompt": prompt_text, "tokens": tokens}


def draw_candidates(figure, numbers):
    axes = figure.subplots()
    for colour, (token, shares) in zip(COLOURS, numbers["tokens"].items()):
        axes.plot(range(len(shares)), shares, "o-", color=colour, markersize=4, label=plain(token))
    axes.set(xlabel="passes (0: one ungated)", ylabel="probability of the next token", ylim=(0, 1.03))
    axes.set_title(f"after {plain(repr(numbers['prompt'][-50:]))}", fontsize=8)
    axes.legend(fontsize=8)


def passes_numbers(s, model, sequences, epsilon):
    """Fig. 18: how many tokens take how many passes, by each rule to stop."""
    rules = {}
    for rule in RULES:
        halt = Halt(rule, s.threshold, epsilon, s.min_loops)
        exit = exit_stats(model, sequences, s.max_loops, halt, s.batch)
        setting = f"ε = {epsilon:.3g}" if rule == "convergence" else f"≥ {s.threshold:g}"
        rules[f"{rule} {setting}"] = {"histogram": exit["histogram"], "loss": exit["loss"]}
    return {"rules": rules}


def draw_passes(figure, numbers):
    axes = figure.subplots()
    width = 0.8 / len(numbers["rules"])
    for i, (rule, row) in enumerate(numbers["rules"].items()):
        shares = np.array(row["histogram"]) / sum(row["histogram"])
        places = np.arange(1, len(shares) + 1) + (i - 1) * width
        mean = (shares * np.arange(1, len(shares) + 1)).sum()
        label = f"{rule}: {mean:.2f} on average, loss {row['loss']:.3f}"
        axes.bar(places, shares, width, color=COLOURS[i], label=label)
    axes.set(xlabel="passes taken", ylabel="share of tokens")
    figure.legend(loc="outside lower center", fontsize=8)


# ---- Speed: everything on this machine, in this run
WAYS = ("plain", "plain-bf16", "fp32", "bf16", "bf16-checkpointing", "bf16-compiled")


@dataclass
class Speed:
    """Tokens per second of a looped model: writing at 1, 2, 4, 8 passes and with exit, or with --train training."""

    init: str = flag("", "model: directory or hub name")
    task: str = flag("speed", "speed", None, ("speed",))
    train: bool = flag(False, "measure training instead of writing")
    way: str = flag("", "of training, in this process: " + ", ".join(WAYS), None, WAYS)
    max_loops: int = flag(4, "B, with --train", 1)
    supervised: int = flag(1, "K, with --train", 1)
    context: int = flag(256, "tokens per sequence, with --train", 1)
    batch: int = flag(0, "texts at a time; 0: one to write, two to train", 0)
    prompt: int = flag(0, "tokens of the prompt; 0: 64, or half the context", 0)
    tokens: int = flag(24, "tokens to write for each figure", 8)
    threshold: float = flag(0.6, "confidence at which a token stops in the row of exit")
    encoder_layers: int = flag(-1, "layers before the loop; -1: as the checkpoint says")
    decoder_layers: int = flag(-1, "layers after the loop; -1: as the checkpoint says")
    compile: bool = flag(None, "compile the step of a token; if not said: no, but a GPU records it")
    uncached: bool = flag(False, "also without a cache: the whole text for each token")
    data: str = flag("", "held-out text: also the losses of 4,096 tokens, against those of fp32")
    profile: bool = flag(False, "where the time of a token of 8 passes goes")
    device: str = flag("", "cpu, cuda or mps")
    dtype: str = flag("fp32", "of the weights", None, ("bf16", "fp32"))


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def seconds(device, work, times):
    """The shortest of several calls of work()."""
    shortest = math.inf
    for _ in range(times):
        begun = time.perf_counter()
        work()
        synchronize(device)
        shortest = min(shortest, time.perf_counter() - begun)
    return shortest


def best_product(device, dtype):
    """The most floating-point operations per second that this device does in a product of two matrices."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    shortest = seconds(device, lambda: a @ a, 1)
    if shortest < 0.5:  # not so with bf16 on a CPU that has no instructions for it
        shortest = min(shortest, seconds(device, lambda: a @ a, 9))
    return 2 * n**3 / shortest


def bytes_of(modules):
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


def measure_writing(s):
    """A row for each number of passes: a prompt of random tokens, the shortest of three times, and its share of the
    best product; then s.tokens tokens one by one, and the lower quartile of their times (with exit: the mean). The
    floor is the time in which the device reads the weights that a token needs, each pass anew."""
    device, dtype = convert.pick_device(s.device, s.dtype)
    cuts = {"encoder_layers": s.encoder_layers, "decoder_layers": s.decoder_layers}
    model, tokenizer = convert.load(s.init, device, dtype, **cuts)
    if s.data:
        compare_with_fp32(s, model, tokenizer, cuts)
    way = "plain"
    if s.compile:
        convert.compile_step(model)
        way = "compiled"
    elif s.compile is None and device.type == "cuda":
        convert.record_step(model)
        way = "recorded"
    c = model.config
    block = torch.randn(2**27 if device.type == "cuda" else 2**26, device=device)
    bandwidth = block.nbytes / seconds(device, block.sum, 10)
    del block
    product = best_product(device, dtype)
    name = f"cut {c.encoder_layers}, {c.reasoning_layers}, {c.decoder_layers}, {s.dtype}, batch {s.batch}, {device}"
    reached = f"memory read at {bandwidth / 1e9:.1f} GB/s, best product {product / 1e12:.3f} TFLOP/s"
    print(f"{name}, {way}; {reached}")
    columns = f"{'passes':>8} {'prefill/s':>10} {'of best':>8}"
    columns += f" {'token s':>9} {'tokens/s':>9} {'floor s':>8} {'of floor':>9}"
    print(columns + (f" {'uncached s':>11}" if s.uncached else ""))
    torch.manual_seed(0)
    length = s.prompt or min(64, c.block_size // 2)
    prompt = torch.randint(0, c.vocab_size, (s.batch, length), device=device)
    means = {}  # seconds per token
    for passes in DEPTHS:
        _, means[passes] = writing_row(s, model, prompt, passes, Halt(threshold=2.0), bandwidth, product)
    depth, means["exit"] = writing_row(s, model, prompt, 8, Halt(threshold=s.threshold), bandwidth, product)
    if depth < 7.9:
        saved = means[8] - means["exit"]
        promised = (8 - depth) * (means[8] - means[1]) / 7
        share = f"{saved / promised:.0%} of what that many passes fewer take"
        print(f"exit after {depth:.2f} passes saves {saved / means[8]:.1%} of 8 passes' time, {share}")
    if s.profile:
        cache = model.new_cache(s.batch, prompt.size(1) + 8, 8)
        write_tokens(model, prompt, cache, 3, 8, Halt(threshold=2.0))
        with torch.profiler.profile() as profile:  # of all kinds of activity that there are
            model.advance(prompt[:, :1], [prompt.size(1)] * s.batch, cache, 8, Halt(threshold=2.0))
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=50))


def writing_row(s, model, prompt, max_loops, halt, bandwidth, product):
    """Print one row. → mean passes and mean seconds per token."""
    device = prompt.device
    batch, length = prompt.shape
    cache = model.new_cache(batch, min(length + s.tokens, model.config.block_size), max_loops)
    prefill = seconds(device, lambda: model.advance(prompt, [0] * batch, cache, max_loops, halt), 3)
    write_tokens(model, prompt, cache, s.tokens, max_loops, halt)  # compiles or records all that comes up
    times, depths = write_tokens(model, prompt, cache, s.tokens, max_loops, halt)
    depth = sum(depths) / len(depths)
    mean = sum(times) / len(times)
    ends = bytes_of([*model.encoder, *model.decoder])
    floor = (ends + bytes_of([model.lm_head]) + depth * bytes_of(model.reasoning)) / bandwidth
    weights = (ends + max_loops * bytes_of(model.reasoning)) / model.wte.weight.element_size()
    share = 2 * weights * batch * length / prefill / product
    shown, token, share = max_loops, sorted(times)[len(times) // 4], f"{share:.1%}"
    if halt.threshold <= 1:
        shown, token, share = f"{depth:.2f}", mean, "-"  # nobody counts the passes of the prompt
    line = f"{shown:>8} {batch * length / prefill:10.0f} {share:>8}"
    line += f" {token:9.4f} {batch / token:9.1f} {floor:8.4f} {token / floor:9.2f}"
    if s.uncached:
        with torch.no_grad():
            line += f" {seconds(device, lambda: model(prompt, max_loops), 3):11.4f}"
    print(line, flush=True)
    return depth, mean


def write_tokens(model, prompt, cache, count, max_loops, halt):
    """Greedy tokens after the prompt (B, T). → seconds and mean passes of each of them."""
    batch, length = prompt.shape
    logits, _ = model.advance(prompt, [0] * batch, cache, max_loops, halt)
    times, depths = [], []
    for i in range(length, length + count):
        idx = logits.argmax(dim=-1, keepdim=True)
        begun = time.perf_counter()
        logits, depth = model.advance(idx, [i] * batch, cache, max_loops, halt)
        synchronize(prompt.device)
        times.append(time.perf_counter() - begun)
        depths.append(depth.float().mean().item())
    return times, depths


def compare_with_fp32(s, model, tokenizer, cuts):
    """Print what the precision of the model costs in held-out loss."""
    exact, _ = convert.load(s.init, model.wte.weight.device, **cuts)
    tokens = convert.load_tokens(convert.find_files(s.data), tokenizer)
    sequences = windows(tokens, min(256, model.config.block_size), 4096)
    exact_losses = depth_losses(exact, sequences, [0, *DEPTHS], 4)
    for depth, loss in depth_losses(model, sequences, [0, *DEPTHS], 4).items():
        change = loss / exact_losses[depth] - 1
        print(
            f"{depth} passes: held-out loss {loss:.4f}, in fp32 {exact_losses[depth]:.4f} ({change:+.2%})", flush=True
        )


# ---- Speed of training
def plain_losses(model, x, y, supervised):
    """The method as one would first write it, without thought for speed or memory."""
    with torch.no_grad():
        h = model.encode(x)
    for b in range(max(supervised) + 1):
        if b not in supervised:
            with torch.no_grad():
                h = model.refine(h)
            continue
        with torch.no_grad():
            lm_before = F.cross_entropy(model.decode(h).float().flatten(0, 1), y.flatten())
        torch.clear_autocast_cache()
        h = model.refine(h)
        logits = model.decode(h).float()
        lm = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        right = (logits.argmax(-1) == y).float()
        yield lm, F.silu(lm - lm_before), F.binary_cross_entropy_with_logits(model.confidence(h).float(), right)
        h = h.detach()


def compare_training(s):
    """Each way in a process of its own: its memory is then its own, too."""
    print(f"{s.batch} x {s.context} tokens, B = {s.max_loops}, K = {s.supervised}")
    print(
        f"{'way':20} {'s / step':>8} {'tokens/s':>10} {'TFLOP':>8} {'peak TF/s':>10} {'MFU':>6} {'GB':>8}", flush=True
    )
    for way in WAYS:
        ended = subprocess.run([sys.executable, __file__, *sys.argv[1:], f"--way={way}"])
        if ended.returncode != 0:
            sys.exit(ended.returncode)  # it has said why


def measure_training(s):
    """Print one row: seconds of a step of §3.2 by s.way, over draws of every depth, and the share of the best product.
    "plain" is `plain_losses`, in float32 or under autocast to bf16."""
    import train  # which imports this file

    plain = s.way.startswith("plain")
    device, dtype = convert.pick_device(s.device, "fp32" if s.way in ("plain", "fp32") else "bf16")
    model, _ = convert.load(s.init, device, encoder_layers=s.encoder_layers, decoder_layers=s.decoder_layers)
    settings = train.Settings(batch=s.batch, accumulate=1, context=s.context)
    optimizer = train.make_optimizer(model, settings)
    fast = model
    if dtype == torch.bfloat16 and not plain:
        fast = train.computing_copy(model, dtype)
    if s.way.endswith("compiled"):
        for block in fast.layers():
            block.forward = torch.compile(block.forward)
    if s.way.endswith("checkpointing"):
        train.checkpoint_layers(fast)
    peak = best_product(device, dtype)
    torch.manual_seed(0)
    times, flops = [], 0
    for supervised in training_draws(s):
        x, y = torch.randint(0, model.config.vocab_size, (2, s.batch, s.context), device=device)
        begun = time.perf_counter()
        with torch.autocast(device.type, dtype, enabled=s.way == "plain-bf16"):
            method = plain_losses if plain else deep_supervision
            for terms in method(fast, x, y, supervised):
                (sum(terms) / s.supervised).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if fast is not model:
            fast.load_state_dict(model.state_dict())
        synchronize(device)
        times.append(time.perf_counter() - begun)
        flops += train.step_flops(model, settings, supervised)
    flops -= train.step_flops(model, settings, training_draws(s)[0])
    spent = sum(times[1:])  # the first step compiles
    steps = len(times) - 1
    line = f"{s.way:20} {spent / steps:8.2f} {s.batch * s.context * steps / spent:10.0f} {flops / steps / 1e12:8.3f}"
    print(line + f" {peak / 1e12:10.3f} {flops / spent / peak:6.1%} {convert.peak_memory(device):8.2f}", flush=True)


def training_draws(s):
    """The supervised passes of each step to measure: every depth twice if one pass is supervised, else eight draws."""
    if s.supervised > 1:
        return [random.Random(i).sample(range(s.max_loops), s.supervised) for i in range(9)]
    return [[s.max_loops - 1]] + [[b] for b in range(s.max_loops)] * 2


def measure_speed(given):
    s = Speed(**given)
    if not s.train:
        refuse_others("speed without --train", given, WRITING_FLAGS)
        s.batch = s.batch or 1
        measure_writing(s)
        return
    refuse_others("--train", given, TRAINING_FLAGS)
    s.batch = s.batch or 2
    if s.supervised > s.max_loops:
        raise InputError(f"--supervised={s.supervised} of --max_loops={s.max_loops}: expected K, 1 to B")
    if s.way:
        measure_training(s)
    else:
        compare_training(s)


LOOP_FLAGS = {"dtype", "max_loops", "halt", "threshold", "epsilon", "min_loops"}
TASK_FLAGS = {"tasks", "limit", "num_fewshot", "include_path"}
CUT_FLAGS = {"task", "encoder_layers", "decoder_layers", "batch"}
WRITING_FLAGS = CUT_FLAGS | {"dtype", "prompt", "tokens", "threshold", "compile", "uncached", "data", "profile"}
TRAINING_FLAGS = CUT_FLAGS | {"train", "way", "max_loops", "supervised", "context"}


def refuse_others(way, given, taken):
    """Raises InputError if a flag was given that this way of measuring would ignore."""
    others = given.keys() - taken - {"init", "device"}
    if others:
        raise InputError(f"{way} takes no --{min(others)}: leave it out")


def main():
    if re.search("--task[= ]speed", " ".join(sys.argv)):
        return measure_speed(convert.parse(Speed, "init"))
    given = convert.parse(Settings)
    s = Settings(**given)
    if s.figures:
        taken = LOOP_FLAGS | TASK_FLAGS | {"figures", "data", "context", "tokens", "batch"}
        refuse_others("--figures", given, taken)
        return measure_figures(s)
    if s.tasks:
        refuse_others("--tasks", given, LOOP_FLAGS | TASK_FLAGS | {"batch", "json"})
        return measure_tables(s)
    if s.task == "profile":
        refuse_others("--task=profile", given, {"task", "dtype"})
        return measure_profile(s)
    refuse_others("the loss", given, LOOP_FLAGS | {"task", "data", "context", "tokens", "batch", "json"})
    measure_losses(s)


if __name__ == "__main__":
    convert.run(main)

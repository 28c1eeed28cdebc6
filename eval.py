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
from loopus import Halt, InputError, early_exit

DEPTHS = (1, 2, 4, 8)
NEVER = Halt(threshold=2.0)


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
def batches(sequences, size, device):
    """Inputs and targets of `windows`, `size` sequences at a time, without those in which nothing is learned."""
    parts = list(zip(*(part.split(size) for part in sequences)))
    for x, y in convert.progress(parts, "evaluating", len(parts)):
        if (y >= 0).any():
            yield x.to(device), y.to(device)


def states(model, x, depths):
    """(b, the state (B, T, C) of tokens x (B, T) after b passes) for each b of `depths`; 0 is the ungated pass."""
    h = model.encode(x)
    if 0 in depths:
        yield 0, model.propose(h)
    for b in range(1, max(depths, default=0) + 1):
        h = model.refine(h)
        if b in depths:
            yield b, h


@torch.no_grad()
def depth_losses(model, sequences, depths, batch):
    """{passes: mean loss in nats} over sequences of `windows`, for each of `depths`; 0 is the ungated pass."""
    sums = dict.fromkeys(depths, 0.0)
    for x, y in batches(sequences, batch, model.wte.weight.device):
        learned = (y >= 0).sum().item()
        for b, h in states(model, x, depths):
            loss, _ = model.loss(h, y)
            sums[b] += loss.item() * learned
    count = (sequences[1] >= 0).sum().item()
    return {depth: total / count for depth, total in sums.items()}


@torch.no_grad()
def exit_stats(model, sequences, max_loops, halt, batch):
    """With exit: mean loss, mean passes, and how many tokens took 1 … max_loops passes."""
    total = 0.0
    depths = []
    for x, y in batches(sequences, batch, model.wte.weight.device):
        h, depth = early_exit(model, x, max_loops, halt)
        learned = y >= 0
        loss, _ = model.loss(h, y)
        total += loss.item() * learned.sum().item()
        depths.append(depth[learned].cpu())
    depths = torch.cat(depths)
    return {
        "loss": total / len(depths),
        "mean_passes": depths.float().mean().item(),
        "histogram": torch.bincount(depths, minlength=max_loops + 1)[1:].tolist(),
    }


class Answer(NamedTuple):
    """Tokens start … stop − 1 of a document, which answer a question of this kind."""

    kind: str
    start: int
    stop: int


def read_answers(path, tokenizer, block_size):
    """The documents of a file in which each completion has its "kind" → (tokens, Answers) of each; none of others.
    Raises InputError for a document that is longer than block_size."""
    documents = []
    for number, record in enumerate(convert.read_records(path), start=1):
        kinds = record.get("kind")
        if not isinstance(kinds, list):
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


def groups_of(items, size, what):
    """The items, `size` at a time, with a line of progress."""
    groups = [items[start : start + size] for start in range(0, len(items), size)]
    return convert.progress(groups, what, len(groups))


def padded(texts, model):
    """Texts, lists of tokens, as one tensor on the model's device: padded on the right, which no token sees."""
    rows = [torch.tensor(tokens) for tokens in texts]
    return pad_sequence(rows, batch_first=True).to(model.wte.weight.device)


@torch.no_grad()
def accuracy_by_kind(model, documents, depths, halt=NEVER, max_loops=8, batch=64):
    """Share of right answers after each number of passes in `depths`, with `halt` ("exit"), and the mean passes that
    the tokens of answers then take ("passes"). An answer is right if each of its tokens is the likeliest one after the
    text before it. → {kind: {column: number}}"""
    scores = defaultdict(lambda: defaultdict(list))
    for group in groups_of(documents, batch, "answering"):
        idx = padded([tokens for tokens, _ in group], model)
        x, y = idx[:, :-1], idx[:, 1:]
        columns = {}
        for b, h in states(model, x, depths):
            columns[b] = model.decode(h).argmax(dim=-1) == y
        if halt is not NEVER:
            h, passes = early_exit(model, x, max_loops, halt)
            columns["exit"] = model.decode(h).argmax(dim=-1) == y
            columns["passes"] = passes
        for name, values in columns.items():
            for row, (_, answers) in zip(values.float().cpu(), group):
                for kind, start, stop in answers:
                    part = row[start - 1 : stop - 1]
                    score = part.mean() if name == "passes" else part.min()  # each of its tokens
                    scores[kind][name].append(score.item())
    return {kind: {name: np.mean(values) for name, values in scores[kind].items()} for kind in sorted(scores)}


def print_accuracy(rows):
    """A table of `accuracy_by_kind`."""
    names = list(next(iter(rows.values())))
    means = {name: np.mean([columns[name] for columns in rows.values()]) for name in names}
    print("\nshare of right answers; passes are those that the answers take by exit")
    print(f"{'':8}" + "".join(f"{name:>9}" for name in names))
    for kind, columns in (rows | {"mean": means}).items():
        print(f"{kind:8}" + "".join(f"{columns[name]:9.2f}" for name in names))


def held_out(directory, tokenizer, block_size, data=""):
    """→ the ids of `data` or, without it, of what the training of a checkpoint held out, by the files that it had; and
    the documents of `read_answers` in them."""
    val = data
    if not data:
        path = directory / "settings.json"
        with convert.reading(path):
            trained = convert.read_json(path)
            refuse("files" not in trained, "it does not say what text the model was trained on: give --data")
            files, val = trained["files"], trained["val"]
    if val:
        tokens = convert.load_tokens(convert.find_files(val), tokenizer)
    else:
        _, tokens = convert.load_data(files, val, tokenizer)
    path = convert.expand(val)
    documents = []
    if path.suffix.lower() in (".json", ".jsonl") and path.is_file():
        documents = read_answers(path, tokenizer, block_size)
    return tokens, documents


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
    init, *controls = s.init.split(",")
    directory = convert.resolve(init)
    model, tokenizer = s.load(directory)
    tokens, documents = held_out(directory, tokenizer, model.config.block_size, s.data)
    sequences = windows(tokens, min(s.context, model.config.block_size), s.tokens)
    losses = depth_losses(model, sequences, range(s.max_loops + 1), s.batch)
    finite = math.isfinite(sum(losses.values())) and model.q_head[1].weight.isfinite().all()
    refuse(not finite, f"the losses {losses} or the confidence are not finite: are the weights damaged?")
    exit = exit_stats(model, sequences, s.max_loops, s.rule(), s.batch)
    measured = [(depth, depth, loss) for depth, loss in losses.items()]
    measured.append(("exit", exit["mean_passes"], exit["loss"]))
    for name in controls:
        control, other = s.load(name)
        refuse(other.spec != tokenizer.spec, f"{name} has another tokenizer: its losses cannot be compared")
        unlooped = depth_losses(control, sequences, [0], s.batch)
        measured.append(("control", 0, unlooped[0]))
    factor = bits_per_nat(sequences, tokenizer)
    rows = []
    for passes, mean, loss in measured:
        more = dict(perplexity=math.exp(min(loss, 700)), bits_per_byte=loss * factor)
        rows.append(dict(passes=passes, mean_passes=mean, loss=loss, **more))
    depths = [depth for depth in DEPTHS if depth <= s.max_loops]
    shares = accuracy_by_kind(model, documents, depths, s.rule(), s.max_loops, s.batch)
    if s.json:
        print(json.dumps({"init": str(directory), "depths": rows, "exit": exit, "accuracy": shares}))
        return
    print(f"{directory}: held-out text; 0 passes: one ungated, as the base runs")
    print(f"{'passes':>8} {'mean':>6} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}")
    for row in rows:
        print("{passes:>8} {mean_passes:6.2f} {loss:8.4f} {perplexity:11.3f} {bits_per_byte:10.4f}".format(**row))
    print(f"\npasses taken with exit, {s.rule()}")
    for b, n in enumerate(exit["histogram"], start=1):
        share = n / sum(exit["histogram"])
        print(f"{b:>8} {'█' * round(40 * share):40} {share:6.1%}")
    if shares:
        print_accuracy(shares)
    print(f"\n{summary(losses, exit)}")


def summary(losses, exit):
    """What `depth_losses` and `exit_stats` come to, in a sentence."""
    best = min(losses, key=lambda depth: (depth == 0, losses[depth]))
    exits = f"exit {exit['loss']:.4f} after {exit['mean_passes']:.2f}"
    return f"best fixed depth: {best} passes, {losses[best]:.4f} nats per token; {exits}; unlooped {losses[0]:.4f}"


# ---- Benchmarks, §4: the model as lm-evaluation-harness asks for it, at one depth or with exit
class Column(NamedTuple):
    """A column of the tables: every token takes max_loops passes, or those until `halt` stops it. base: 0 passes."""

    name: str
    max_loops: int
    halt: Halt = NEVER


def columns_of(model, s):
    """base, the depths up to --max_loops, and exit; base alone where the loop was never trained, as in a pretrained
    model or the control: the last layer of the confidence head, which starts at zero, is then still zero."""
    columns = [Column("base", 0)]
    if s.max_loops > 0 and model.q_head[1].weight.any():
        columns += [Column(str(depth), depth) for depth in DEPTHS if depth <= s.max_loops]
        columns.append(Column("exit", s.max_loops, s.rule()))
    return columns


def import_harness():
    """lm-evaluation-harness, which is an optional extra. Raises InputError where it is not installed."""
    try:
        import lm_eval.api.model
        import lm_eval.tasks
        import lm_eval.utils
    except ImportError:
        raise InputError('--tasks needs lm-evaluation-harness, which is missing: pip install ".[eval]"') from None
    return lm_eval


def harness_model(harness, model, tokenizer, column, batch):
    """A model in one column of the tables, as the harness asks for it; its `passes` are those of the scored tokens."""

    class Scorer(harness.api.model.TemplateLM):
        eot_token_id = tokenizer.end_of_text
        prefix_token_id = tokenizer.prefix or 0
        passes = []

        def tok_encode(self, string, add_special_tokens=None, **_):
            if add_special_tokens is False or not string:
                return tokenizer.encode(string)
            return tokenizer.start(string)

        def _loglikelihood_tokens(self, requests, **_):
            pairs = [(context or [self.prefix_token_id], continuation) for _, context, continuation in requests]
            return score(model, pairs, column, batch, self.passes)

        def loglikelihood_rolling(self, requests, **_):
            """Log-probabilities of texts, in windows as long as the model's context: each token is scored once."""
            size = model.config.block_size
            totals = []
            for request in requests:
                ids = self.tok_encode(request.args[0])
                starts = range(0, len(ids), size)
                pairs = [([self.prefix_token_id, *ids[:start]], ids[start : start + size]) for start in starts]
                totals.append(sum(logprob for logprob, _ in score(model, pairs, column, batch, self.passes)))
            return totals

        def generate_until(self, requests, **_):
            raise InputError("tasks that write text are not supported: expected ones that score it")

    return Scorer()


@torch.no_grad()
def score(model, pairs, column, batch, all_passes):
    """pairs: (context, continuation), lists of tokens → of each the log-probability of the continuation in nats, and
    whether greedy decoding writes it. What is too long loses its beginning. The passes of the scored tokens are added
    to all_passes. InputError: a continuation alone is too long."""
    size = model.config.block_size
    texts = []
    for context, continuation in pairs:
        refuse(len(continuation) > size, f"an answer of {len(continuation)} tokens: the context has {size}")
        texts.append((context + continuation)[-size - 1 : -1])
    longest_first = sorted(range(len(pairs)), key=lambda i: -len(texts[i]))
    scores = [None] * len(pairs)
    for group in groups_of(longest_first, batch, f"scoring, {column.name}"):
        idx = padded([texts[i] for i in group], model)
        h, passes = early_exit(model, idx, column.max_loops, column.halt)
        h = model.norm(model.run(model.decoder, h))
        for row, i in enumerate(group):
            continuation = torch.tensor(pairs[i][1], device=idx.device)
            end = len(texts[i])
            scored = slice(end - len(continuation), end)
            logprobs = model.lm_head(h[row, scored]).float().log_softmax(dim=-1)
            refuse(logprobs.isnan().any(), "the model's logits are not finite: are its weights damaged?")
            chosen = logprobs.gather(1, continuation[:, None]).sum()
            greedy = logprobs.argmax(dim=-1) == continuation
            scores[i] = (chosen.item(), greedy.all().item())
            all_passes += passes[row, scored].tolist()
    return scores


def measure_tables(s):
    """Benchmark the models of --init, one after the other: the harness's own table for each column."""
    harness = import_harness()
    manager = harness.tasks.TaskManager(include_path=s.include_path)
    report = {}
    for init in s.init.split(","):
        own = replace(s)  # with this model's threshold
        model, tokenizer = own.load(init)
        for column in columns_of(model, own):
            scorer = harness_model(harness, model, tokenizer, column, s.batch)
            with convert.reading(f"--tasks={s.tasks}"), redirect_stdout(sys.stderr):
                results = harness.simple_evaluate(
                    scorer,
                    tasks=s.tasks.split(","),
                    task_manager=manager,
                    num_fewshot=s.num_fewshot,
                    limit=s.limit,
                    log_samples=False,
                )
            passes = sum(scorer.passes) / max(1, len(scorer.passes))
            report.setdefault(init, {})[column.name] = {"results": results["results"], "passes": passes}
            if not s.json:
                print(f"{init or 'the newest model'}, passes: {column.name} (mean of the scored tokens {passes:.2f})")
                print(harness.utils.make_table(results), flush=True)
    if s.json:
        print(json.dumps(report, default=float))


def main():
    s = Settings(**convert.parse(Settings))
    if s.tasks:
        return measure_tables(s)
    measure_losses(s)


if __name__ == "__main__":
    convert.run(main)

"""
Measure a model: its loss at every depth and with exit, the paper's benchmarks, the paper's figures.

    python eval.py                                the newest model below ./out, on the text its training held out
    python eval.py --init=gpt2 --data=book.txt    any model, any text
    python eval.py --tasks=piqa,mmlu --init=gpt2  benchmarks of lm-evaluation-harness
    python eval.py --figures=DIR                  the paper's figures of a model, and their numbers
"""

import json
import math
import sys
from collections import defaultdict
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

import convert
from convert import flag, refuse, windows
from loopus import RULES, Halt, InputError, early_exit

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
    limit: int = flag(0, "with --tasks: items of each task to read; 0: all", 0)
    num_fewshot: int = flag(-1, "with --tasks: examples before each item; -1: as the task says", -1)
    include_path: str = flag("", "with --tasks: a directory of task files (.yaml) of your own")
    figures: str = flag("", "write the paper's figures to this directory instead; --init=a,b: a model, and its control")


# ---- Losses, §4, and passes taken, Fig. 18
def batches(sequences, size, device):
    """Inputs and targets of `windows`, `size` sequences at a time, without those in which nothing is learned."""
    inputs, targets = sequences
    parts = list(zip(inputs.split(size), targets.split(size)))
    for x, y in convert.progress(parts, "evaluating", len(parts)):
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
            loss, _ = model.loss(model.propose(h), y)
            sums[0] += loss.item() * learned
        for b in range(1, max(depths) + 1):
            h = model.refine(h)
            if b in sums:
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
    for where, record in convert.read_records(path):
        kinds = record.get("kind")
        if not isinstance(kinds, list):
            continue
        with convert.reading(f"{where} of {path}"):
            segments = convert.segments_of(record, tokenizer)
            ids = np.asarray(convert.encode_document(segments, tokenizer, tokenizer.begin))
            if ids[0] >= 0:  # something must come before an answer
                ids = np.insert(ids, 0, ~(tokenizer.prefix or 0))
            changes = np.diff(ids >= 0, prepend=False, append=False)  # between what is read and what is learned
            borders = np.flatnonzero(changes).reshape(-1, 2).tolist()
            fits = len(kinds) == len(borders) and len(ids) <= block_size
            found = f"{len(kinds)} kinds of {len(borders)} answers in {len(ids)} tokens"
            refuse(not fits, f"{found}: expected as many kinds as answers, and at most {block_size} tokens")
        answers = [Answer(str(kind), *border) for kind, border in zip(kinds, borders)]
        documents.append((np.maximum(ids, ~ids).tolist(), answers))
    return documents


@torch.no_grad()
def accuracy_by_kind(model, documents, depths, halt=NEVER, max_loops=8, batch=64):
    """Share of right answers after each number of passes in `depths`, with `halt` ("exit"), and the mean passes that
    the tokens of answers then take ("passes"). An answer is right if each of its tokens is the likeliest one after the
    text before it. → {kind: {column: number}}"""
    scores = defaultdict(lambda: defaultdict(list))
    starts = range(0, len(documents), batch)
    groups = [documents[start : start + batch] for start in starts]
    for group in convert.progress(groups, "answering", len(groups)):
        rows = [torch.tensor(tokens) for tokens, _ in group]
        idx = pad_sequence(rows, batch_first=True).to(model.wte.weight.device)  # on the right, which no token sees
        x, y = idx[:, :-1], idx[:, 1:]
        columns = {}
        for depth in depths:
            columns[depth] = model(x, depth).argmax(dim=-1) == y
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
    means = {}
    for kind in sorted(scores):
        means[kind] = {name: np.mean(values) for name, values in scores[kind].items()}
    return means


def print_accuracy(rows):
    """A table of `accuracy_by_kind`."""
    names = list(next(iter(rows.values())))
    means = {name: np.mean([columns[name] for columns in rows.values()]) for name in names}
    print("\nshare of right answers; passes are those that the answers take by exit")
    print(f"{'':8}" + "".join(f"{name:>9}" for name in names))
    for kind, columns in (rows | {"mean": means}).items():
        print(f"{kind:8}" + "".join(f"{columns[name]:9.2f}" for name in names))


class Loaded(NamedTuple):
    """A model to measure, with the text to measure it on."""

    directory: object
    model: object
    tokenizer: object
    sequences: tuple  # of `windows`
    documents: list  # of `read_answers`

    def measure(self, s):
        """→ {passes: loss} of 0 … s.max_loops passes, and the `exit_stats`."""
        losses = depth_losses(self.model, self.sequences, range(s.max_loops + 1), s.batch)
        finite = all(map(math.isfinite, losses.values())) and self.model.q_head[1].weight.isfinite().all()
        refuse(not finite, f"the losses {losses} or the confidence are not finite: are the weights damaged?")
        return losses, exit_stats(self.model, self.sequences, s.max_loops, s.rule(), s.batch)

    def states(self, s):
        """The states of a text's first 32 tokens before the loop and after each pass, (passes + 1, T − 1, C). The very
        first token is left out: many pretrained models give it a state so long that it would be all one sees."""
        inputs, _ = self.sequences
        h = self.model.encode(inputs[:1, :32].to(self.model.wte.weight.device))
        states = [h]
        for _ in range(s.max_loops):
            h = self.model.refine(h)
            states.append(h)
        return torch.cat(states)[:, 1:].float()


def load(s, init):
    """→ Loaded: --data or, without it, what the training of the model held out, by the files that it had."""
    directory = convert.resolve(init)
    model, tokenizer = s.load(directory)
    files = s.data
    val = s.data
    if not s.data:
        with convert.reading(directory / "settings.json"):
            trained = convert.read_json(directory / "settings.json")
            refuse("files" not in trained, "it does not say what text the model was trained on: give --data")
            files, val = trained["files"], trained["val"]
            files_now = []
            with suppress(InputError):
                files_now = [str(file.resolve()) for file in convert.find_files(trained["data"])]
            if files != files_now:
                print(f"{trained['data']} has changed: reading what training held out of its files", file=sys.stderr)
    _, held_out = convert.load_data(files, val, tokenizer)
    sequences = windows(held_out, min(s.context, model.config.block_size), s.tokens)
    documents = []
    path = convert.expand(val)
    if path.suffix.lower() in (".json", ".jsonl") and path.is_file():
        documents = read_answers(path, tokenizer, model.config.block_size)
    return Loaded(directory, model, tokenizer, sequences, documents)


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
    loaded = load(s, s.init)
    losses, exit = loaded.measure(s)
    rows = []
    for depth, loss in losses.items():
        rows.append({"passes": depth, "mean_passes": depth, "loss": loss})
    rows.append({"passes": "exit", "mean_passes": exit["mean_passes"], "loss": exit["loss"]})
    factor = bits_per_nat(loaded.sequences, loaded.tokenizer)
    for row in rows:
        row["perplexity"] = math.exp(min(row["loss"], 700))
        row["bits_per_byte"] = row["loss"] * factor
    depths = [depth for depth in DEPTHS if depth <= s.max_loops]
    shares = accuracy_by_kind(loaded.model, loaded.documents, depths, s.rule(), s.max_loops, s.batch)
    if s.json:
        print(json.dumps({"init": str(loaded.directory), "depths": rows, "exit": exit, "accuracy": shares}))
        return
    print(f"{loaded.directory}: held-out text; 0 passes: one ungated, as the base runs")
    print(f"{'passes':>8} {'mean':>6} {'loss':>8} {'perplexity':>11} {'bits/byte':>10}")
    for row in rows:
        print("{passes:>8} {mean_passes:6.2f} {loss:8.4f} {perplexity:11.3f} {bits_per_byte:10.4f}".format(**row))
    print(f"\npasses taken with exit, {s.rule()}")
    for b, n in enumerate(exit["histogram"], start=1):
        share = n / sum(exit["histogram"])
        print(f"{b:>8} {'█' * round(40 * share):40} {share:6.1%}")
    if shares:
        print_accuracy(shares)


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
            return [self.score_text(self.tok_encode(request.args[0])) for request in requests]

        def score_text(self, ids):
            """The log-probability of a text, in windows as long as the model's context: each token is scored once."""
            size = model.config.block_size
            starts = range(0, len(ids), size)
            pairs = [([self.prefix_token_id, *ids[:start]], ids[start : start + size]) for start in starts]
            return sum(logprob for logprob, _ in score(model, pairs, column, batch, self.passes))

        def generate_until(self, requests, **_):
            requests = convert.progress(requests, f"writing, {column.name}", len(requests))
            return [write(model, tokenizer, *request.args, column, self.passes) for request in requests]

    return Scorer()


@torch.no_grad()
def score(model, pairs, column, batch, all_passes):
    """pairs: (context, continuation), lists of tokens → of each the log-probability of the continuation in nats, and
    whether greedy decoding writes it. What is too long loses its beginning. The passes of the scored tokens are added
    to all_passes. InputError: a continuation alone is too long."""
    size = model.config.block_size
    device = model.wte.weight.device
    lengths = [len(context) + len(continuation) for context, continuation in pairs]
    longest_first = sorted(range(len(pairs)), key=lengths.__getitem__, reverse=True)
    starts = range(0, len(pairs), batch)
    groups = [longest_first[start : start + batch] for start in starts]
    scores = [None] * len(pairs)
    for group in convert.progress(groups, f"scoring, {column.name}", len(groups)):
        inputs = []
        for i in group:
            context, continuation = pairs[i]
            refuse(len(continuation) > size, f"an answer of {len(continuation)} tokens: the context has {size}")
            inputs.append(torch.tensor((context + continuation)[-size - 1 : -1]))
        idx = pad_sequence(inputs, batch_first=True)  # on the right, which no token sees
        h, passes = early_exit(model, idx.to(device), column.max_loops, column.halt)
        h = model.norm(model.run(model.decoder, h))
        for row, i in enumerate(group):
            end = len(inputs[row])
            continuation = torch.tensor(pairs[i][1], device=device)
            scored = slice(end - len(continuation), end)
            logprobs = model.lm_head(h[row, scored]).float().log_softmax(dim=-1)
            refuse(logprobs.isnan().any(), "the model's logits are not finite: are its weights damaged?")
            chosen = logprobs.gather(1, continuation[:, None]).sum()
            greedy = logprobs.argmax(dim=-1) == continuation
            scores[i] = (chosen.item(), greedy.all().item())
            all_passes += passes[row, scored].tolist()
    return scores


LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names of one setting of a task


def write(model, tokenizer, context, settings, column, all_passes):
    """Continue the context of a task by greedy decoding, up to the first string that is to end it. What is too long
    loses its beginning. InputError: the task wants a text that is drawn at random, or longer than the context."""
    max_new_tokens = next((settings[name] for name in LIMITS if name in settings), 256)  # the harness's own default
    room = model.config.block_size - max_new_tokens
    drawn = settings.get("do_sample", settings.get("temperature", 0) > 0)
    refuse(drawn or room < 1, f"{settings} of a task: expected greedy decoding, within the context")
    prompt = tokenizer.start(context)[-room:]
    ends = tokenizer.ends
    [tokens], depths = model.generate(
        [prompt], max_new_tokens, column.max_loops, temperature=0, halt=column.halt, ends=ends
    )
    all_passes += filter(None, depths[0].tolist())  # 0: after the end
    special = {token["id"] for token in tokenizer.spec["added_tokens"] if token["special"]}
    written = [token for token in tokens[len(prompt) :] if token not in special | ends]
    text = tokenizer.decode(written)
    until = settings.get("until") or []
    for end in filter(None, [until] if isinstance(until, str) else until):
        text = text.split(end)[0]
    return text


def measure_tables(s):
    """Benchmark the models of --init, one after the other: the harness's own table for each column."""
    harness = import_harness()
    manager = harness.tasks.TaskManager(include_path=s.include_path or None)
    report = {}
    for init in s.init.split(","):
        model, tokenizer = s.load(init)
        for column in columns_of(model, s):
            scorer = harness_model(harness, model, tokenizer, column, s.batch)
            with convert.reading(f"--tasks={s.tasks}"), redirect_stdout(sys.stderr):
                results = harness.simple_evaluate(
                    scorer,
                    tasks=s.tasks.split(","),
                    task_manager=manager,
                    num_fewshot=s.num_fewshot if s.num_fewshot >= 0 else None,
                    limit=s.limit or None,
                    log_samples=False,
                )
            passes = sum(scorer.passes) / max(1, len(scorer.passes))
            report.setdefault(init, {})[column.name] = {"results": results["results"], "passes": passes}
            if not s.json:
                print(f"{init or 'the newest model'}, passes: {column.name} (mean of the scored tokens {passes:.2f})")
                print(harness.utils.make_table(results), flush=True)
    if s.json:
        print(json.dumps(report, default=float))


# ---- Figures: each function gives the lines of one of the paper's, {label: (x, y)}, and what its axes are
def layers_figure(s, loaded, control):
    """Fig. 1a: how much each layer changes the state, and the cuts."""
    model = loaded.model
    distances = convert.layer_distances(model, convert.sample_text(model, loaded.tokenizer)).tolist()
    lines = {}
    first = 0
    for name in ("encoder", "reasoning", "decoder"):
        layers = range(first, first + len(getattr(model, name)))
        lines[name] = (list(layers), distances[layers.start : layers.stop])
        first = layers.stop
    return lines, "layer", "1 − cos(state before, state after)"


def losses_figure(s, loaded, control):
    """Fig. 5: the loss at each depth, with exit, and of the control."""
    losses, exit = loaded.measure(s)
    lines = {}
    lines["looped"] = (list(losses), list(losses.values()))
    lines["exit"] = ([exit["mean_passes"]], [exit["loss"]])
    if control:
        control_losses = depth_losses(control.model, control.sequences, [0], s.batch)
        lines["control, unlooped"] = ([0, s.max_loops], [control_losses[0]] * 2)
    return lines, "passes (0: one ungated)", "held-out loss, nats per token"


def accuracy_figure(s, loaded, control):
    """Fig. 5 for questions: the share of right answers at each depth, by kind."""
    depths = list(range(s.max_loops + 1))
    lines = {}
    for kind, columns in accuracy_by_kind(loaded.model, loaded.documents, depths, batch=s.batch).items():
        lines[kind] = (depths, list(columns.values()))
    return lines, "passes (0: one ungated)", "share of right answers"


def training_figure(s, loaded, control):
    """Fig. 6: the held-out loss at each depth while the model was trained, from its log."""
    path = loaded.directory.parent / "log.jsonl"
    lines = defaultdict(lambda: ([], []))
    with convert.reading(path):
        for _, record in convert.read_records(path) if path.exists() else []:
            for depth, loss in record.get("held_out", {}).items():
                lines[f"{depth} passes"][0].append(record["step"])
                lines[f"{depth} passes"][1].append(loss)
    return lines, "optimizer steps", "held-out loss, nats per token"


@torch.no_grad()
def states_figure(s, loaded, control):
    """Fig. 7: the states of `Loaded.states` in their first two principal components."""
    states = loaded.states(s).cpu()
    centred = states - states.mean(dim=(0, 1))
    _, _, components = torch.linalg.svd(centred.flatten(0, 1), full_matrices=False)
    points = centred @ components[:2].T  # (passes + 1, T − 1, 2)
    lines = {f"{b} passes": xy.T.tolist() for b, xy in enumerate(points)}
    return lines, "first principal component", "second"


@torch.no_grad()
def steps_figure(s, loaded, control):
    """Fig. 7: mean step length ‖h^{b+1} − h^b‖₂ over that of the first pass, of `Loaded.states`."""
    passes = list(range(1, s.max_loops + 1))
    states = loaded.states(s)
    lengths = states.diff(dim=0).norm(dim=-1).mean(dim=-1)
    lines = {"step length": (passes, (lengths / lengths[0]).tolist())}
    return lines, "pass", "mean over tokens, first pass: 1"


@torch.no_grad()
def candidates_figure(s, loaded, control):
    """Fig. 8: after each pass, the probability of the six tokens that come to be the likeliest, for the first answer
    or, in a text, after 32 tokens."""
    prompt = loaded.sequences[0][0, :32].tolist()
    answered = [document for document in loaded.documents if document[1]]
    for tokens, answers in answered[:1]:
        prompt = tokens[: answers[0].start]
    idx = torch.tensor([prompt], device=loaded.model.wte.weight.device)
    depths = list(range(s.max_loops + 1))
    rows = [loaded.model(idx, b)[0, -1] for b in depths]
    logits = torch.stack(rows, dim=1).float().cpu()
    probabilities = logits.softmax(dim=0)  # (V, passes + 1)
    lines = {}
    likeliest = probabilities.amax(dim=1).argsort(descending=True)
    for token in likeliest[:6].tolist():
        text = loaded.tokenizer.token_bytes(token).decode(errors="replace")
        lines[f"{text!r} ({token})"] = (depths, probabilities[token].tolist())
    return lines, "passes (0: one ungated)", "probability of the next token"


def passes_figure(s, loaded, control):
    """Fig. 18: how many tokens take how many passes, by each rule to stop."""
    lines = {}
    for rule in RULES:
        halt = replace(s, halt=rule).rule()
        exit = exit_stats(loaded.model, loaded.sequences, s.max_loops, halt, s.batch)
        passes = list(range(1, s.max_loops + 1))
        lines[f"{rule}: loss {exit['loss']:.3f}"] = (passes, exit["histogram"])
    return lines, "passes taken", "tokens"


def measure_figures(s):
    """Write the paper's figures to s.figures, each as a picture and with its numbers as JSON. The first of the models
    in s.init is drawn, a second one is the unlooped control."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError('--figures needs matplotlib: pip install ".[plots]"') from None
    refuse(s.max_loops < 1 or s.context < 2, "--figures of --max_loops=0 or --context=1 would be empty: expected more")
    loaded, *control = [load(s, init) for init in s.init.split(",")]
    figures = [layers_figure, losses_figure, accuracy_figure, training_figure, states_figure, steps_figure]
    for work in [*figures, candidates_figure, passes_figure]:
        lines, xlabel, ylabel = work(s, loaded, next(iter(control), None))
        figure = Figure(figsize=(6, 4), dpi=150, layout="constrained")
        axes = figure.subplots()
        for label, (x, y) in lines.items():
            style = "o" if work is states_figure else "o-"
            label = label.replace("$", r"\$")
            axes.plot(x, np.array(y, dtype=float), style, markersize=4, label=label)
        axes.set(xlabel=xlabel, ylabel=ylabel, title=str(loaded.directory))
        name = work.__name__.removesuffix("_figure")
        if lines:  # without questions no accuracy, without a log no training
            axes.legend(fontsize=7)
            with convert.all_or_nothing(s.figures) as unfinished:
                figure.savefig(unfinished / f"{name}.png")
                (unfinished / f"{name}.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")
            print(convert.expand(s.figures) / f"{name}.png")


def main():
    s = Settings(**convert.parse(Settings))
    if s.figures:
        return measure_figures(s)
    if s.tasks:
        return measure_tables(s)
    measure_losses(s)


if __name__ == "__main__":
    convert.run(main)

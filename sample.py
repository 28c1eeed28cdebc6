"""
Let a looped model write. Each token takes the passes it needs; a terminal shows them as a tint.

    python sample.py --max_loops=8 --prompt="def "    continue a prompt with the newest model below ./out
    python sample.py                                  show what training held out, then ask for prompts
    python sample.py --chat                           talk with a model that was taught to
    python sample.py --prompt="The sky is" --trace    watch the next token form, pass by pass (paper Fig. 7 and 8)
"""

import codecs
import copy
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

import convert
import loopus
from convert import flag, refuse
from eval import accuracy_by_kind, held_out, replies
from loopus import InputError, Positions

TINTS = (75, 79, 114, 150, 186, 215, 209, 203)  # terminal colours from cool, few passes, to warm, many


@dataclass
class Settings(convert.Inference):
    """Continue a prompt with a looped model."""

    prompt: str = flag("", "text to continue; empty: what training held out, then asked for, or read from a pipe")
    max_new_tokens: int = flag(200, "tokens to write, unless the text ends before", 1)
    temperature: float = flag(0.8, "0: always the likeliest token", 0)
    top_k: int = flag(50, "draw among this many likeliest tokens", 1)
    top_p: float = flag(1.0, "of these, among the fewest likeliest that reach this probability", 0)
    seed: int = flag(2026, "of the random draws", 0)
    compile: bool = flag(None, "compile the step of a token; if not said: where it pays on a CPU. GPUs record it")
    trace: bool = flag(False, "show the next token's candidates after each pass instead of writing")
    chat: bool = flag(False, "a conversation in the model's chat template; each line that is typed or piped is a turn")
    system: str = flag("", "with --chat: the system message; empty: none, also where transformers has one by default")


def drawing(model, s):
    """The function logits → tokens of these settings."""
    generator = torch.Generator(model.device).manual_seed(s.seed)
    return partial(loopus.sample, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, generator=generator)


def tint(text, passes, max_loops):
    """Colour text by its passes, where standard output is a terminal."""
    if not sys.stdout.isatty() or max_loops < 1:
        return text
    colour = TINTS[(passes - 1) * (len(TINTS) - 1) // max(1, max_loops - 1)]
    return f"\x1b[38;5;{colour}m{text}\x1b[0m"


def show(model, tokenizer, ids, most, draw, s):
    """Write at most `most` tokens after ids to standard output, and one line about them to standard error. → tokens"""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character can span tokens
    written = []
    passes = 0
    begun = time.time()
    with suppress(KeyboardInterrupt):
        for [(token, depth)] in model.stream([ids], most, s.max_loops, s.rule(), draw):
            if token in tokenizer.ends:
                break
            written.append(token)
            passes += depth
            print(tint(utf8.decode(tokenizer.token_bytes(token)), depth, s.max_loops), end="", flush=True)
    print(utf8.decode(b"", final=True), flush=True)
    count = len(written)
    legend = " ".join(tint(str(b), b, s.max_loops) for b in range(1, s.max_loops + 1))
    each = f"{passes / max(1, count):.2f} passes each on average (of {legend or 0})"
    print(f"\n{count} tokens, {each}, {count / (time.time() - begun):.1f} tokens/s", file=sys.stderr)
    return written


def write(model, tokenizer, prompt, s):
    print(prompt, end="", flush=True)
    show(model, tokenizer, tokenizer.start(prompt), s.max_new_tokens, drawing(model, s), s)


# ---- A conversation, in the model's chat template
class Conversation(NamedTuple):
    model: loopus.LoopUS
    tokenizer: convert.Tokenizer
    s: Settings

    def message(self, role, content):
        """The tokens of a message, as training reads them: in its content, special tokens are plain text."""
        segments = self.tokenizer.template.segments(role, content, False)
        return [~i for i in convert.encode_document(segments, self.tokenizer)]

    def converse(self, questions):
        """Show a reply to each question, which reads all that was said before. → the tokens of the whole conversation.
        Raises InputError where the context has no room for another reply."""
        model, tokenizer, s = self
        template = tokenizer.template
        parts = (template.opening.format(role="assistant"), template.end, template.after)
        opening, end, after = (tokenizer.encode(part, first=False) for part in parts)
        tokenizer.ends.add(end[0])
        draw = drawing(model, s)
        ids = [*tokenizer.begin]
        if s.system:
            ids += self.message("system", s.system)
        for question in questions:
            ids += self.message("user", question.strip()) + opening
            size = model.config.block_size
            refuse(len(ids) >= size, f"the conversation has filled the context of {size} tokens: begin another")
            ids += show(model, tokenizer, ids, min(size - len(ids), s.max_new_tokens), draw, s) + end + after
        return ids


# ---- One token, pass by pass
def candidates(model, tokenizer, h):
    """The likeliest tokens after the state h (1, T, C) with their probabilities, two spaces before each."""
    probabilities = model.decode(h)[0, -1].float().softmax(dim=-1)
    likeliest = probabilities.argsort(descending=True)[:5].tolist()
    texts = [tokenizer.token_bytes(token).decode(errors="replace") for token in likeliest]
    return "".join(f"  {text!r} {probabilities[token]:.3f}" for text, token in zip(texts, likeliest))


@torch.no_grad()
def trace(model, tokenizer, prompt, s):
    """One row per pass for the token after the prompt: confidence q, step length ‖h^{b+1} − h^b‖₂, mean α, and the
    likeliest tokens. No token is stopped; where the rule holds is marked."""
    h = model.encode(torch.tensor([tokenizer.start(prompt)], device=model.device))
    print(f"pass  {'q':>5}  {'step':>8}  {'α':>5}  candidates")
    print(f"base{'':24}{candidates(model, tokenizer, model.propose(h))}")
    log_doubt = 0.0
    for b in range(1, s.max_loops + 1):
        proposed = model.propose(h)
        alpha = model.gate.alpha(proposed - h)[0, -1].float().mean()
        h_before = h
        h = model.gate(proposed, h)
        step = (h - h_before)[0, -1].float().norm()
        q = torch.sigmoid(model.confidence(h).float())[0, -1]
        stops, log_doubt = s.rule().stops(model, b, h_before, h, log_doubt)
        mark = "  ← exit" if stops[0, -1] else ""
        print(f"{b:>4}  {q:5.3f}  {step:8.2f}  {alpha:5.3f}{candidates(model, tokenizer, h)}{mark}")


# ---- For speed alone: compiled and recorded writing. A first reading may skip this.
class SumLinear(torch.nn.Linear):
    """A linear layer that is a sum for one token: compiled for a CPU it reads its matrix twice as fast as a product."""

    def forward(self, x):
        if x.numel() > x.size(-1):
            return super().forward(x)
        y = (self.weight.float() * x.float()[..., None, :]).sum(dim=-1)
        if self.bias is not None:
            y = y + self.bias
        return y.type_as(x)


def compiled_for_one_token(plain, compiled, x, at, kv=None):
    forward = compiled if x.size(1) == 1 else plain
    return forward(x, at, kv)


def compile_step(model):
    """Compile, in place, what one token of each text runs through when it is written: once for all layers, passes,
    positions and numbers of texts. Prompts run as before. On a CPU, sums take the place of the products."""
    if model.device.type == "cpu":
        for module in [*model.layers().modules(), model.lm_head]:
            if isinstance(module, torch.nn.Linear):
                module.__class__ = SumLinear
    # A norm is to be stored before a matrix reads it, not computed again for each row of the matrix.
    options = {"realize_acc_reads_threshold": 2, "size_asserts": False}
    for block in model.layers():
        compiled = torch.compile(block.forward, dynamic=True, options=options)
        block.forward = partial(compiled_for_one_token, block.forward, compiled)
    model.lm_head.compile(dynamic=True, options=options)
    record_step(model)


class Recorded:
    """A part of the model on a GPU, called as plain(x, at, cache). What it does for one token of each text is recorded
    as a CUDA graph, once for each cache and number of texts, and from then on started as a whole: its kernels run for a
    few microseconds each, and starting them one by one takes longer."""

    recording = False  # while True, the parts that a part calls run plainly

    def __init__(self, plain):
        self.plain = plain

    def __call__(self, x, at=None, cache=None):
        if Recorded.recording or cache is None or x.size(1) > 1:
            return self.plain(x, at, cache)
        graphs = cache.__dict__.setdefault("graphs", {})  # which end with their cache
        which = (self, x.shape)
        if which not in graphs:
            graphs[which] = self.record(x, at, cache)
        graph, places, output = graphs[which]
        for place, value in zip(places, (x, *at)):
            if value is not None:
                place.copy_(value)
        graph.replay()
        return output.clone()

    def record(self, x, at, cache):
        """→ a graph, the places from which it reads x and `at`, and its output."""
        Recorded.recording = True
        try:
            self.plain(x, at, cache)  # compiles what is to be compiled
            places = [value if value is None else value.clone() for value in (x, *at)]
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                output = self.plain(places[0], Positions(*places[1:]), cache)
        finally:
            Recorded.recording = False
        return graph, places, output


def record_step(model):
    """On a GPU, have what one token of each text runs through recorded: the model stays where and as it is."""
    if model.device.type == "cuda":
        for name in ("encode", "propose", "refine", "decode"):
            setattr(model, name, Recorded(getattr(model, name)))


MUCH_TO_READ = 100e9  # weights, as 124 tokens of SmolLM2-135M at 8 passes read: then the first compiling has paid


def made_fast(model, s):
    """The model made fast to write with, sharing its weights: its step compiled, where --compile says so or, if it says
    nothing, where that pays on a CPU; else on a GPU recorded. Where compiling fails, a line says why."""
    compiling = s.compile
    if compiling is None:
        work = s.max_new_tokens * max(1, s.max_loops) * sum(p.numel() for p in model.reasoning.parameters())
        compiling = model.device.type == "cpu" and work > MUCH_TO_READ
    if compiling:
        print("compiling, which takes some seconds (--no-compile leaves it out)", file=sys.stderr)
        compiled = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        try:
            compile_step(compiled)
            compiled.generate([[0]], 12, 1, temperature=0)  # 13 tokens: no layer has this size, which torch would fix
            return compiled
        except Exception as e:  # of many types: of torch, of the compiler, of the disk
            print(f"compiling failed, going on without: {convert.one_line(e):.200}", file=sys.stderr)
    record_step(model)
    return model


# ---- Without a prompt: what the model's training held out
def show_held_out(model, tokenizer, directory, s):
    """One held-out document's questions, each with the answer and the passes that it took, and what many come to; or,
    where there are none, a passage's beginning and how the model goes on."""
    tokens, documents = held_out(directory, tokenizer, model.config.block_size)
    if not documents:
        print("The first words of held-out text, and how the model goes on:\n")
        ids = [max(i, ~i) for i in tokens[:32].tolist()]
        return write(model, tokenizer, tokenizer.decode(ids), s)
    documents = documents[:50]
    tokens, answers = documents[0]
    print(f"A held-out document:{tokenizer.decode(tokens[: answers[0].start])} …")
    print(f"\n{'':9} question  answer  it says  passes")
    for reply in sorted(replies(model, documents[:1], 1, [], s.rule(), s.max_loops)):
        kind, start, stop = reply.answer
        question, answer, said = map(tokenizer.decode, (tokens[:start], tokens[start:stop], reply.said))
        passes = max(reply.passes)
        question = question.rpartition(" ")[2]
        mark = "" if reply.right else "  wrong"
        print(tint(f"{kind:9} {question:>8} {answer:>7} {said:>8} {passes:>7}{mark}", passes, s.max_loops))
    means = accuracy_by_kind(model, documents, [1], s.rule(), s.max_loops).values()
    share, passes, once = (sum(row[name] for row in means) / len(means) for name in ("exit", "passes", 1))
    print(f"\n{len(documents)} such documents: {share:.2f} right after {passes:.2f} passes each, {once:.2f} after 1")


# ---- The program
def inputs(s, trained=False):
    """What is to be continued or answered: --prompt, or each line that is typed, or what comes from a pipe. "", at a
    terminal before anything is asked, or of an empty pipe: what training held out."""
    if s.prompt:
        yield s.prompt
    elif sys.stdin.isatty():
        if trained:
            yield ""
        greeting = "Say something." if s.chat else "What should it continue?"
        print(f"\n{greeting} An empty line ends. Ctrl-C stops a text.")
        with suppress(EOFError):
            while (line := input("\n> ")).strip():
                yield line
    elif s.chat:
        yield from filter(str.strip, sys.stdin)
    else:
        yield sys.stdin.read().rstrip("\n")


def main():
    s = Settings(**convert.parse(Settings))
    refuse(s.system and not s.chat, "--system without --chat: only a conversation has a system message")
    refuse(s.trace and s.chat, "--trace is of a text, not of a conversation: leave out --chat")
    directory = convert.resolve(s.init)
    model, tokenizer = s.load(directory)
    refuse(s.chat and not tokenizer.template, "no chat template that we know: expected ChatML, Llama 3's or Phi-4's")
    if s.trace:
        for prompt in inputs(s):
            trace(model, tokenizer, prompt, s)
        return
    model = made_fast(model, s)
    if s.chat:
        return Conversation(model, tokenizer, s).converse(inputs(s))
    trained = (directory / "settings.json").exists() and s.max_loops > 0
    for prompt in inputs(s, trained):
        if prompt or not trained:
            write(model, tokenizer, prompt, s)
            continue
        try:
            show_held_out(model, tokenizer, directory, s)
        except (InputError, OSError) as e:  # it may lie elsewhere by now
            refuse(not sys.stdin.isatty(), e)
            print(f"no held-out text to show: {e}", file=sys.stderr)


if __name__ == "__main__":
    convert.run(main)

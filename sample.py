"""
Let a looped model write. Each token takes the passes it needs; a terminal shows them as a tint.

    python sample.py --max_loops=8 --prompt="def "    continue a prompt with the model train.py wrote last
    python sample.py                                  ask for prompts, again and again (or read one from a pipe)
    python sample.py --chat                           talk with a model that was taught to
    python sample.py --prompt="The sky is" --trace    watch the next token form, pass by pass (paper Fig. 7 and 8)
"""

import codecs
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import torch

import convert
import loopus
from convert import flag
from loopus import InputError

TINTS = (75, 79, 114, 150, 186, 215, 209, 203)  # terminal colours from cool, few passes, to warm, many


@dataclass
class Settings(convert.Inference):
    """Continue a prompt with a looped model."""

    prompt: str = flag("", "text to continue; empty: asked for, or read from a pipe")
    max_new_tokens: int = flag(200, "tokens to write, unless the text ends before", 1)
    temperature: float = flag(0.8, "0: always the likeliest token", 0)
    top_k: int = flag(50, "draw among this many likeliest tokens", 1)
    top_p: float = flag(1.0, "of these, among the fewest likeliest that reach this probability", 0)
    seed: int = flag(2026, "of the random draws")
    compile: bool = flag(None, "compile the step of a token; if not said: where it pays on a CPU; GPUs record it")
    trace: bool = flag(False, "show the next token's candidates after each pass instead of writing")
    chat: bool = flag(False, "a conversation in the model's chat template; each line that is typed or piped is a turn")
    system: str = flag("", "with --chat: the system message; empty: none, also where transformers has one by default")


def tint(text, passes, max_loops):
    """Colour text by its passes, where standard output is a terminal."""
    if not sys.stdout.isatty() or max_loops < 1:
        return text
    warmth = (passes - 1) / max(1, max_loops - 1)  # 0 … 1
    colour = TINTS[int(warmth * (len(TINTS) - 1))]
    return f"\x1b[38;5;{colour}m{text}\x1b[0m"


def drawing(model, s):
    """The function logits → tokens of these settings."""
    generator = torch.Generator(model.wte.weight.device).manual_seed(convert.valid_seed(s.seed))
    return partial(loopus.sample, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, generator=generator)


def print_legend(s):
    """What the tints mean, on a terminal."""
    if sys.stdout.isatty() and s.max_loops > 0:
        print("passes: " + " ".join(tint(str(b), b, s.max_loops) for b in range(1, s.max_loops + 1)) + "\n")


def show(steps, model, tokenizer, s):
    """Print what is written to standard output, and one line about it to standard error. steps: what `LoopUS.stream`
    yields for one text."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character can span tokens
    depths = []
    begun = time.time()
    with suppress(KeyboardInterrupt):
        for [(token, depth)] in steps:
            if token in tokenizer.ends:
                break
            depths.append(depth)
            piece = utf8.decode(tokenizer.token_bytes(token))
            print(tint(piece, depth, s.max_loops), end="", flush=True)
    print(utf8.decode(b"", final=True), flush=True)
    mean = f"{sum(depths) / max(1, len(depths)):.2f} passes each on average (of at most {s.max_loops})"
    memory = convert.peak_memory(model.wte.weight.device)
    speed = f"{len(depths) / (time.time() - begun):.1f} tokens/s, peak memory {memory:.2f} GB"
    print(f"\n{len(depths)} tokens, {mean}, {speed}", file=sys.stderr)


def write(model, tokenizer, prompt, s):
    """Print a prompt and its continuation."""
    print_legend(s)
    print(prompt, end="", flush=True)
    ids = prompt_tokens(tokenizer, prompt)
    steps = model.stream([ids], s.max_new_tokens, s.max_loops, s.rule(), drawing(model, s))
    show(steps, model, tokenizer, s)


def prompt_tokens(tokenizer, prompt):
    """The tokens of a prompt; where it has none, the one that begins a text."""
    return tokenizer.start(prompt) or [tokenizer.prefix or 0]


# ---- A conversation
class Conversation:
    """What was said, as tokens, and a cache that holds it from turn to turn, so that no token runs twice. When the
    context is full, the oldest turns are forgotten, and what remains runs again.

    beginning   the tokens before all turns, with the system message
    turns       of each question and its reply
    cached      how many of all these tokens the cache holds
    """

    def __init__(self, model, tokenizer, s):
        self.model = model
        self.tokenizer = tokenizer
        self.s = s
        self.draw = drawing(model, s)
        self.ending = tokenizer.encode(tokenizer.template.end + tokenizer.template.after)
        self.ends = tokenizer.ends | {self.ending[0]}
        self.beginning = list(tokenizer.begin)
        if s.system:
            self.beginning += self.message("system", s.system)
        self.turns = []
        self.cache = []
        self.cached = 0

    def message(self, role, content):
        """The tokens of a message. In its content, special tokens are plain text."""
        return self.tokenizer.encode(self.tokenizer.template.opening.format(role=role), content) + self.ending

    def tokens(self):
        return self.beginning + [token for turn in self.turns for token in turn]

    def ask(self, question):
        """Add a question to the conversation. Raises InputError where it is longer than the context."""
        opening = self.tokenizer.template.opening.format(role="assistant")
        asked = self.message("user", question) + self.tokenizer.encode(opening)
        context = self.model.config.block_size
        length = len(self.beginning) + len(asked)
        if length >= context:
            raise InputError(f"a message of {length} tokens does not fit the context of {context}: shorten it")
        if self.turns:  # its reply does not hold its end
            self.turns[-1] += self.ending
        self.turns.append(asked)
        if len(self.tokens()) + min(self.s.max_new_tokens, context // 2) > context:
            self.forget(context // 2)
        self.make_room(min(len(self.tokens()) + self.s.max_new_tokens, context))

    def forget(self, size):
        """Drop the oldest turns, never the newest, until at most `size` tokens remain."""
        if len(self.turns) > 1 and len(self.tokens()) > size:
            print("the context is full: the oldest turns are forgotten", file=sys.stderr)
            self.cached = 0
        while len(self.turns) > 1 and len(self.tokens()) > size:
            del self.turns[0]

    def make_room(self, size):
        """Have a cache of at least `size` tokens, with what it held."""
        held = self.cache[0].size(3) if self.cache else 0
        if size > held:
            larger = self.model.new_cache(1, size, self.s.max_loops)
            for part, part_before in zip(larger, self.cache):
                part[:, :, :, :held] = part_before
            self.cache = larger

    def reply(self):
        """Answer the question, token by token, up to the end of the message: yields [(token, depth)] of each."""
        room = self.cache[0].size(3) - len(self.tokens())
        for _ in range(min(self.s.max_new_tokens, room)):
            idx = torch.tensor([self.tokens()[self.cached :]], device=self.model.wte.weight.device)
            logits, depth = self.model.advance(idx, [self.cached], self.cache, self.s.max_loops, self.s.rule())
            self.cached += idx.size(1)
            token = self.draw(logits).item()
            if token in self.ends:
                return
            self.turns[-1].append(token)
            yield [(token, depth[0, -1].item())]


def chat(model, tokenizer, s):
    """Answer what is said, in one conversation."""
    conversation = Conversation(model, tokenizer, s)
    print_legend(s)
    for question in inputs(s):
        try:
            conversation.ask(question.strip())
        except InputError as e:
            if not sys.stdin.isatty():
                raise
            print(f"error: {e}", file=sys.stderr)
            continue
        show(conversation.reply(), model, tokenizer, s)


# ---- One token, pass by pass
def candidates(model, tokenizer, h):
    """The likeliest tokens after the state h (1, T, C), with their probabilities."""
    probabilities = model.decode(h)[0, -1].float().softmax(dim=-1)
    if probabilities.isnan().any():
        raise InputError("the model's probabilities are no numbers: are its weights damaged?")
    top = probabilities.topk(min(5, len(probabilities)))
    words = []
    for token, probability in zip(top.indices.tolist(), top.values.tolist()):
        text = tokenizer.token_bytes(token).decode(errors="replace")
        words.append(f"{text!r} {probability:.3f}")
    return "  ".join(words)


@torch.no_grad()
def trace(model, tokenizer, prompt, s):
    """One row per pass for the token after the prompt: confidence q, step length ‖h^{b+1} − h^b‖₂, mean α, and the
    likeliest tokens. No token is stopped; where the rule first holds is marked."""
    ids = prompt_tokens(tokenizer, prompt)
    halt = s.rule()
    h = model.encode(torch.tensor([ids], device=model.wte.weight.device))
    print(f"pass  {'q':>5}  {'step':>8}  {'α':>5}  candidates")
    print(f"base{'':24}{candidates(model, tokenizer, model.propose(h))}")
    log_doubt = 0.0
    stopped = False
    for b in range(1, s.max_loops + 1):
        proposed = model.propose(h)
        alpha = model.gate.alpha(proposed - h)[0, -1].float().mean()
        h_before = h
        h = model.gate(proposed, h)
        step = (h - h_before)[0, -1].float().norm()
        q = torch.sigmoid(model.confidence(h).float())[0, -1]
        line = f"{b:>4}  {q:5.3f}  {step:8.2f}  {alpha:5.3f}  {candidates(model, tokenizer, h)}"
        stops, log_doubt = halt.stops(model, b, h_before, h, log_doubt)
        if stops[0, -1] and not stopped:
            stopped = True
            line += "  ← exit"
        print(line)


# ---- The program
def inputs(s):
    """What is to be continued or answered: --prompt, or each line that is typed, or what comes from a pipe. Raises
    InputError where that is not text."""
    try:
        if s.prompt:
            yield s.prompt
        elif sys.stdin.isatty():
            greeting = "Say something." if s.chat else "What should it continue?"
            print(f"{greeting} An empty line ends. Ctrl-C stops a text.")
            yield from lines("\n> ")
        elif s.chat:
            yield from filter(str.strip, sys.stdin)
        else:
            yield sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not {sys.stdin.encoding} text ({e}): convert it") from None


def lines(prompt):
    """The lines of standard input, until an empty one or the end."""
    with suppress(EOFError):
        while (line := input(prompt)).strip():
            yield line


def main():
    s = Settings(**convert.parse(Settings))
    if s.system and not s.chat:
        raise InputError("--system without --chat: only a conversation has a system message")
    if s.trace and s.chat:
        raise InputError("--trace is of a text, not of a conversation: leave out --chat")
    device, dtype = convert.pick_device(s.device, s.dtype)
    model, tokenizer = convert.load(s.init, device, dtype)
    if tokenizer is None:
        raise InputError(f"{s.init or 'the model'} has no tokenizer.json: text cannot be read or written without one")
    if s.chat and tokenizer.template is None:
        problem = f"{s.init or 'the model'} has no chat template that we know"
        raise InputError(f"{problem} (ChatML, Llama 3, Phi-4): take a model with one")
    if s.compile is None and not s.trace:
        s.compile = convert.pays_to_compile(model, s.max_new_tokens, s.max_loops)
        convert.record_step(model)
    if s.compile:
        model = convert.try_to_compile(model)
    if s.chat:
        return chat(model, tokenizer, s)
    for prompt in inputs(s):
        if s.trace:
            trace(model, tokenizer, prompt, s)
        else:
            write(model, tokenizer, prompt, s)


if __name__ == "__main__":
    convert.run(main)

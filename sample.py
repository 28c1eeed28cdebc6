"""
Let a looped model write. Each token takes the passes it needs; a terminal shows them as a tint.

    python sample.py --max_loops=8 --prompt="def "    continue a prompt with the model train.py wrote last
    python sample.py                                  ask for prompts, again and again (or read one from a pipe)
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
from loopus import Halt, InputError

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
    compile: bool = flag(False, "compile the step of a token: on a CPU some seconds, then two to three times as fast")
    trace: bool = flag(False, "show the next token's candidates after each pass instead of writing")


def tint(text, passes, max_loops):
    """Colour text by its passes, where standard output is a terminal."""
    if not sys.stdout.isatty() or max_loops < 1:
        return text
    warmth = (passes - 1) / max(1, max_loops - 1)  # 0 … 1
    colour = TINTS[int(warmth * (len(TINTS) - 1))]
    return f"\x1b[38;5;{colour}m{text}\x1b[0m"


def write(model, tokenizer, prompt, ids, s):
    """Stream the continuation of a prompt to standard output, and one line about it to standard error."""
    halt = Halt(s.halt, s.threshold, s.epsilon, s.min_loops)
    generator = torch.Generator(model.wte.weight.device).manual_seed(convert.valid_seed(s.seed))
    draw = partial(loopus.sample, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, generator=generator)
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")  # a character can span tokens
    if sys.stdout.isatty() and s.max_loops > 0:
        print("passes: " + " ".join(tint(str(b), b, s.max_loops) for b in range(1, s.max_loops + 1)) + "\n")
    print(prompt, end="", flush=True)
    depths = []
    begun = time.time()
    with suppress(KeyboardInterrupt):
        for [(token, depth)] in model.stream([ids], s.max_new_tokens, s.max_loops, halt, draw):
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
def trace(model, tokenizer, ids, s):
    """One row per pass for the token after the prompt: confidence q, step length ‖h^{b+1} − h^b‖₂, mean α, and the
    likeliest tokens. No token is stopped; where the rule first holds is marked."""
    halt = Halt(s.halt, s.threshold, s.epsilon, s.min_loops)
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


def asked_prompts():
    """What is typed at a prompt, line by line, until an empty line."""
    print("What should it continue? An empty line ends. Ctrl-C stops a text.")
    while prompt := input("\n> "):
        yield prompt


def read_pipe():
    """The prompt on standard input. Raises InputError where it is not text."""
    try:
        return sys.stdin.read().rstrip("\n")
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not {sys.stdin.encoding} text ({e}): convert it") from None


def main():
    s = Settings(**convert.parse(Settings))
    device, dtype = convert.pick_device(s.device, s.dtype)
    model, tokenizer = convert.load(s.init, device, dtype)
    if tokenizer is None:
        raise InputError(f"{s.init or 'the model'} has no tokenizer.json: text cannot be read or written without one")
    if s.compile:
        convert.compile_step(model)
    if s.prompt:
        prompts = [s.prompt]
    elif sys.stdin.isatty():
        prompts = asked_prompts()
    else:
        prompts = [read_pipe()]
    for prompt in prompts:
        ids = tokenizer.start(prompt)
        if not ids:  # begin a text
            ids = [tokenizer.end_of_text or 0]
        if s.trace:
            trace(model, tokenizer, ids, s)
        else:
            write(model, tokenizer, prompt, ids, s)


if __name__ == "__main__":
    convert.run(main)

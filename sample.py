"""
Let a looped model write, each token taking the passes it needs, by which a terminal shows it tinted.

    python sample.py --max_loops=8 --prompt="def "    continue a prompt with the model train.py wrote last
    python sample.py                                  ask for prompts, again and again (or read one from a pipe)
    python sample.py --prompt="The sky is" --trace    watch the next token form, pass by pass (paper Fig. 7 and 8)
"""

import codecs
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import torch

import convert
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
    shared: bool = flag(False, "one cache for all depths: less memory, a little worse")
    compile: bool = flag(False, "compile the step of a token: on a CPU some seconds, then three times as fast")
    trace: bool = flag(False, "show the next token's candidates after each pass instead of writing")


def tint(text, passes, max_loops):
    """Colour text by its passes, where standard output is a terminal."""
    if not sys.stdout.isatty() or max_loops < 1:
        return text
    return f"\x1b[38;5;{TINTS[(passes - 1) * (len(TINTS) - 1) // max(1, max_loops - 1)]}m{text}\x1b[0m"


def write(model, tokenizer, prompt, ids, s):
    """Stream the continuation of a prompt to standard output, and one line about it to standard error."""
    names = "max_loops threshold temperature top_k top_p halt epsilon min_loops shared".split()
    given = {name: getattr(s, name) for name in names} | dict(generator=torch.Generator(ids.device).manual_seed(s.seed))
    utf8, depths, begun = codecs.getincrementaldecoder("utf-8")("replace"), [], time.time()
    if sys.stdout.isatty() and s.max_loops > 0:
        print("passes: " + " ".join(tint(str(b), b, s.max_loops) for b in range(1, s.max_loops + 1)) + "\n")
    print(prompt, end="", flush=True)
    with suppress(KeyboardInterrupt):
        for [(token, passes)] in model.stream(ids, s.max_new_tokens, **given):
            if token == tokenizer.end_of_text:
                break
            depths.append(passes)
            piece = utf8.decode(tokenizer.bytes_of[token])  # a character can span tokens
            print(tint(piece, depths[-1], s.max_loops), end="", flush=True)
    print(utf8.decode(b"", final=True), flush=True)
    mean = f"{sum(depths) / max(1, len(depths)):.2f} passes each on average (of at most {s.max_loops})"
    speed = f"{len(depths) / (time.time() - begun):.1f} tokens/s, peak memory {convert.peak_memory(ids.device):.2f} GB"
    print(f"\n{len(depths)} tokens, {mean}, {speed}", file=sys.stderr)


@torch.no_grad()
def trace(model, tokenizer, prompt, ids, s):
    """One row per pass for the token after the prompt: confidence q, step length ‖h^{b+1} − h^b‖₂, mean α, and the
    likeliest tokens with their probabilities. No token is stopped; where exit would is marked."""

    def candidates(h):
        top = model.decode(h)[0, -1].float().softmax(-1).topk(5)
        words = [tokenizer.bytes_of[i].decode(errors="replace") for i in top.indices.tolist()]
        return "  ".join(f"{word!r} {p:.3f}" for word, p in zip(words, top.values.tolist()))

    h = model.encode(ids)
    print(f"pass  {'q':>5}  {'step':>8}  {'α':>5}  candidates\nbase{'':24}{candidates(model.propose(h))}")
    halt, doubt, stopped = Halt(s.halt, s.threshold, s.epsilon, s.min_loops), torch.zeros_like(h[..., 0]).float(), 0
    for b in range(1, s.max_loops + 1):
        proposed = model.propose(h)
        alpha = model.gate.alpha(proposed - h)[0, -1].float().mean()
        before, h = h, model.gate(proposed, h)
        step, q = (h - before)[0, -1].float().norm(), torch.sigmoid(model.confidence(h).float())[0, -1]
        stopped = stopped or (b if halt.stops(model, b, before, h, doubt)[0, -1] else 0)
        print(f"{b:>4}  {q:5.3f}  {step:8.2f}  {alpha:5.3f}  {candidates(h)}" + "  ← exit" * (stopped == b))


def main():
    s = Settings(**convert.parse(Settings))
    device, dtype = convert.pick_device(s.device, s.dtype)
    model, tokenizer = convert.load(s.init, device, dtype)
    if s.compile:
        model.compile_step()
    if tokenizer is None:
        raise InputError(f"{s.init or 'it'} has no tokenizer.json: text cannot be read or written without one")
    asks = not s.prompt and sys.stdin.isatty()
    if asks:
        print("What shall it continue? An empty line or Ctrl-C ends.")
    for prompt in iter(lambda: input("\n> "), "") if asks else [s.prompt or sys.stdin.read().rstrip("\n")]:
        ids = tokenizer.begin + tokenizer.encode(prompt) or [tokenizer.end_of_text or 0]  # with nothing: begin a text
        (trace if s.trace else write)(model, tokenizer, prompt, torch.tensor([ids], device=device), s)


if __name__ == "__main__":
    convert.run(main)

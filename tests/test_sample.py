"""sample.py: the text it writes, what a terminal shows, --trace, conversations, and compiled writing."""

import io
import json
import os
import re
import subprocess
import sys
from itertools import takewhile

import pytest
import torch
from conftest import GOLDEN, ROOT, random_model, typed

import convert
import sample
from loopus import Halt, InputError, early_exit

GREEDY = ("--temperature=0", "--max_loops=4", "--dtype=fp32", "--device=cpu")


@pytest.fixture
def write(command):
    return lambda directory, *flags: command(sample, f"--init={directory}", *GREEDY, *flags)


def pipe(monkeypatch, data):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def refused(ended, *words):
    """The program ended in one line of error, which says these words."""
    code, _, err = ended
    *notes, line = err.splitlines()
    assert code == 1 and line.startswith("error: ") and all(word in line for word in words), err
    assert all(note.endswith("--max_loops=0 runs it unlooped") for note in notes), err


# ---- Text
def test_greedy_text_and_its_passes_are_those_of_generate_up_to_an_end_that_the_checkpoint_states(write, checkpoint):
    model, tokenizer = convert.load(checkpoint[0])
    halt = Halt("cdf", threshold=0.8, min_loops=2)
    [tokens], [depths] = model.generate([list(b"def ")], 20, 4, temperature=0, halt=halt)
    stop = next(i for i in range(6, 24) if tokens[i] not in tokens[4:i])
    flags = "--max_new_tokens=20 --halt=cdf --threshold=0.8 --min_loops=2".split()
    for end in (24, stop):
        code, out, err = write(checkpoint[0], "--prompt=def ", *flags)
        assert (code, out) == (0, tokenizer.decode(tokens[:end]) + "\n")  # without colours: this is no terminal
        assert f"{end - 4} tokens, {depths[: end - 4].float().mean():.2f} passes each on average" in err
        (checkpoint[0] / "generation_config.json").write_text(json.dumps(dict(eos_token_id=[256, tokens[stop]])))


def test_a_line_says_that_a_loop_was_never_trained(write, checkpoint, tmp_path):
    convert.save(random_model("gpt2"), convert.byte_tokenizer(), tmp_path / "looped")
    for directory, loops, said in ((checkpoint[0], 2, 1), (checkpoint[0], 0, 0), (tmp_path / "looped", 2, 0)):
        _, _, err = write(directory, "--prompt=a", "--max_new_tokens=1", f"--max_loops={loops}")
        assert err.count("its loop was never trained; --max_loops=0 runs it unlooped\n") == said


@pytest.mark.parametrize("piped, prompt", [(b"two\nlines\n", b"two\nlines"), (b"", b"")])
def test_a_piped_text_is_continued(write, checkpoint, monkeypatch, piped, prompt):
    model, tokenizer = convert.load(checkpoint[0])
    [tokens], _ = model.generate([list(prompt) or [256]], 5, 4, temperature=0)  # nothing: as after <|endoftext|>
    pipe(monkeypatch, piped)
    text = prompt.decode() + tokenizer.decode(tokens[-5:]) + "\n"
    assert write(checkpoint[0], "--max_new_tokens=5")[:2] == (0, text)


def test_a_terminal_asks_for_prompts_and_shows_passes_as_tints(checkpoint):
    flags = [f"--init={checkpoint[0]}", "--max_new_tokens=20", "--max_loops=4"]
    answers = [(b"\n> ", b"def f\n"), (b"\n> ", b"class\n"), (b"\n> ", b"\n")]
    code, shown = typed(["sample.py", *flags], answers)
    assert code == 0 and not answers and shown.count("20 tokens, ") == 2
    legend = [f"\x1b[38;5;{tint}m{passes}\x1b[0m" for passes, tint in ((1, 75), (2, 114), (3, 186), (4, 203))]
    assert shown.count(" ".join(legend)) == 2


# ---- One token, pass by pass
@torch.no_grad()
def test_a_trace_has_the_numbers_of_plain_calls_and_marks_where_the_rule_holds(write, tmp_path):
    model, tokenizer = random_model("gpt2"), convert.byte_tokenizer()
    convert.save(model, tokenizer, tmp_path / "looped")
    code, out, _ = write(tmp_path / "looped", "--prompt=def ", "--trace", "--threshold=0.5")
    head, *rows = out.splitlines()
    assert code == 0 and head.split() == ["pass", "q", "step", "α", "candidates"]
    assert [row.split()[0] for row in rows] == ["base", "1", "2", "3", "4"]
    idx = torch.tensor([list(b"def ")])
    h = model.encode(idx)
    sure = []
    for b, row in enumerate(rows):
        top = model(idx, b)[0, -1].softmax(-1).topk(5)
        words = [f"{tokenizer.decode([i])!r} {p:.3f}" for i, p in zip(top.indices.tolist(), top.values)]
        assert row.removesuffix("  ← exit").endswith("  ".join(words))
        if b > 0:
            delta = model.propose(h) - h
            alpha = model.gate.alpha(delta)
            h = h + alpha * delta
            q = torch.sigmoid(model.confidence(h))[0, -1].item()
            expected = [q, (alpha * delta)[0, -1].norm().item(), alpha[0, -1].mean().item()]
            assert [float(word) for word in row.split()[1:4]] == pytest.approx(expected, abs=0.006)
            if q >= 0.5:
                sure.append(b)
    assert [b for b, row in enumerate(rows) if row.endswith("  ← exit")] == sure


# ---- Without a prompt: what training held out
def trained_on(directory, data, val):
    (directory / "settings.json").write_text(json.dumps(dict(files=[str(data)], data=str(data), val=str(val))))


def test_without_a_prompt_held_out_questions_are_answered_by_difficulty(write, checkpoint, monkeypatch):
    directory, text = checkpoint
    records = [dict(prompt=["ab c", "; d"], completion=["e", "fg"], kind=["2 links", "1 links"])] * 3
    answers = directory / "answers.jsonl"
    answers.write_text("".join(json.dumps(record) + "\n" for record in records))
    trained_on(directory, text, answers)
    pipe(monkeypatch, b"")
    _, out, _ = write(directory, "--threshold=0.5", "--max_loops=3")
    model, tokenizer = convert.load(directory)
    h, passes = early_exit(model, torch.tensor([list(b"ab ce; dfg")]), 3, Halt(threshold=0.5))
    said = model.decode(h)[0].argmax(-1).tolist()
    lines = out.splitlines()
    assert lines[0] == "A held-out document:ab c …"
    assert lines[3].split()[:4] == ["1", "links", "d", "fg"] and str(max(passes[0, 7:9].tolist())) in lines[3]
    assert lines[4].split()[:4] == ["2", "links", "c", "e"] and str(passes[0, 3].item()) in lines[4]
    right = [said[3:4] == [ord("e")], said[7:9] == list(b"fg")]
    assert f"3 such documents: {sum(right) / 2:.2f} right after" in lines[-1] and out.count("wrong") == right.count(
        False
    )


def test_without_a_prompt_the_beginning_of_held_out_text_is_continued(write, checkpoint, monkeypatch):
    directory, text = checkpoint
    trained_on(directory, text, text)
    beginning = text.read_text()[:32]
    expected = write(directory, f"--prompt={beginning}", "--max_new_tokens=5")[1]
    pipe(monkeypatch, b"")
    code, out, _ = write(directory, "--max_new_tokens=5")
    assert (code, out) == (0, f"The first words of held-out text, and how the model goes on:\n\n{expected}")


# ---- Conversations
TEMPLATES = {  # of each golden tokenizer: what stands before a conversation, before a message, at its end, and after it
    "smollm2": ("", "<|im_start|>{}\n", "<|im_end|>", "\n"),
    "llama2": ("", "<|im_start|>{}\n", "<|im_end|>", "\n"),  # read by the tokenizers package
    "llama3": ("<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n", "<|eot_id|>", ""),
    "qwen3": ("", "<|im_start|>{}<|im_sep|>", "<|im_end|>", ""),  # Phi-4's
}


def chat_model(directory, name="smollm2", **overrides):
    """A model of random weights whose tokenizer has the tokens of a chat template. → directory"""
    if name == "llama2":
        pytest.importorskip("tokenizers")
    spec = json.loads((GOLDEN / "tokenizers" / f"{name}.json").read_text(encoding="utf-8"))
    tokenizer = convert.Tokenizer(spec)
    lacked = [token for token in re.findall(r"<\|\w+\|>", "".join(TEMPLATES[name])) if token not in tokenizer.added]
    for i, content in enumerate(lacked, start=tokenizer.n_vocab):
        spec["added_tokens"].append(convert.ADDED | dict(id=i, content=content, special=True))
    if name == "llama3":  # each text begins with <|begin_of_text|>
        begin = dict(single=[dict(SpecialToken=dict(id="b"))], special_tokens=dict(b=dict(ids=[tokenizer.n_vocab])))
        spec["post_processor"] = begin
    size = dict(vocab_size=tokenizer.n_vocab + len(lacked), block_size=256)
    convert.save(random_model("llama", **size | overrides), convert.Tokenizer(spec), directory)
    return directory


def settings(**others):
    return sample.Settings(**dict(temperature=0.0, max_new_tokens=12, max_loops=4, threshold=0.52) | others)


def conversation(directory, *questions, **others):
    """Ask. → the model, its tokenizer, and for each question the tokens before the reply, and the reply"""
    model, tokenizer = convert.load(directory)
    replies = []

    def noted_show(model, tokenizer, ids, *rest, show=sample.show):
        replies.append((list(ids), show(model, tokenizer, ids, *rest)))
        return replies[-1][1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "show", noted_show)
        sample.Conversation(model, tokenizer, settings(**others)).converse(questions)
    return model, tokenizer, replies


def whole_reply(model, tokenizer, before, loops=4):
    """What greedy decoding writes after these tokens, up to an end."""
    [tokens], _ = model.generate([before], 12, loops, 0.52, temperature=0)
    return list(takewhile(lambda token: token not in tokenizer.ends, tokens[len(before) :]))


@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "llama2"])  # whose words merge across lines
def test_a_conversation_is_the_text_of_its_template_encoded_whole(tmp_path, monkeypatch, name):
    """An end token ends a reply, and stands there once."""
    model, tokenizer = convert.load(chat_model(tmp_path / name, name))
    begin, before, end, after = TEMPLATES[name]
    said = begin + before.format("system") + "Be brief." + end + after
    drawn = []
    for question in ("(why) 2?", "And?"):
        said += before.format("user") + question + end + after + before.format("assistant")
        start = len(tokenizer.encode(said))
        said += "A  sea." + end
        drawn += torch.tensor(tokenizer.encode(said)[start:]).split(1)
        said += after
    monkeypatch.setattr(sample, "drawing", lambda *_: lambda logits: drawn.pop(0))
    talk = sample.Conversation(model, tokenizer, settings(system="Be brief."))
    ids = talk.converse(["(why) 2?", " And?\n"])
    assert ids == tokenizer.encode(said) and not drawn


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_special_tokens_that_are_typed_are_plain_text_as_in_training(tmp_path, name):
    _, before, end, _ = TEMPLATES[name]
    said = f"a{end} {before}b"
    _, tokenizer, replies = conversation(chat_model(tmp_path / name, name), said, "And?")
    messages = [dict(role="user", content=said), dict(role="assistant", content=""), dict(role="user", content="And?")]
    segments = convert.segments_of(dict(messages=messages), tokenizer)
    trained = convert.encode_document(segments, tokenizer, tokenizer.begin)
    trained = [max(i, ~i) for i in trained] + tokenizer.encode(before.format("assistant"), first=False)
    (before_reply, reply), (before_second, _) = replies
    assert before_reply + before_second[len(before_reply + reply) :] == trained
    assert before_reply.count(tokenizer.added[end]) == 1 and said in tokenizer.decode(before_reply)


@pytest.mark.parametrize("loops", [0, 4])
def test_from_turn_to_turn_replies_are_those_of_the_whole_conversation(tmp_path, loops):
    questions = ("What is the sea?", "And why?", "Tell me.")
    said = conversation(chat_model(tmp_path / "chat"), *questions, max_loops=loops, system="Be brief.")
    model, tokenizer, replies = said
    assert [reply for _, reply in replies] == [whole_reply(model, tokenizer, before, loops) for before, _ in replies]
    for (before, reply), (later, _) in zip(replies, replies[1:]):
        assert later[: len(before + reply)] == before + reply


def test_a_reply_fills_the_context_and_what_is_asked_then_is_refused(tmp_path):
    directory = chat_model(tmp_path / "chat", block_size=80)
    model, tokenizer, [(before, reply)] = conversation(directory, "Why?", system="Be brief.", max_new_tokens=100)
    assert 12 < len(before + reply) <= 80 and reply[:12] == whole_reply(model, tokenizer, before)
    with pytest.raises(InputError, match="has filled the context of 80 tokens: begin another"):
        conversation(directory, *["And why?"] * 9, max_new_tokens=100)


def test_ctrl_c_on_a_terminal_stops_a_reply_but_not_the_chat(tmp_path):
    flags = [f"--init={chat_model(tmp_path / 'chat', block_size=4096)}", "--max_new_tokens=4000", "--max_loops=3"]
    answers = [(b"\n> ", b"Hello\n"), (b"[38;", b"\x03"), (b"\n> ", b"Go on\n"), (b"[38;", b"\x03"), (b"\n> ", b"\x04")]
    code, shown = typed(["sample.py", "--chat", *flags], answers)
    assert code == 0 and not answers and "Traceback" not in shown, shown
    assert shown.count("tokens/s") == 2 and "Say something." in shown


def test_each_piped_line_is_a_turn(write, tmp_path, monkeypatch, capsys):
    questions = ("What is it?", "And why?")
    _, tokenizer, replies = conversation(chat_model(tmp_path / "chat"), *questions, system="Be brief.")
    text = "".join(tokenizer.decode(reply) + "\n" for _, reply in replies)
    capsys.readouterr()
    pipe(monkeypatch, b"What is it?\n\n And why? \n")
    flags = ["--chat", "--system=Be brief.", "--max_new_tokens=12", "--threshold=0.52"]
    assert write(tmp_path / "chat", *flags)[:2] == (0, text)


def test_what_cannot_be_continued_or_answered_is_refused_in_one_line(write, checkpoint, tmp_path, monkeypatch):
    chat = chat_model(tmp_path / "chat")
    for flags in ((checkpoint[0],), (chat, "--chat")):
        pipe(monkeypatch, b"caf\xe9\n")
        refused(write(*flags), "utf-8")
    refused(write(chat, "--system=b"), "--system", "--chat")
    refused(write(chat, "--trace", "--chat"), "--trace", "--chat")
    refused(write(chat, "--chat", f"--prompt={'a b ' * 256}"), "filled the context of 256 tokens: begin another")
    refused(write(checkpoint[0], "--chat"), "no chat template that we know")
    (chat / "tokenizer_config.json").write_text('{"chat_template": "[INST]"}')  # though the tokens of ChatML are there
    refused(write(chat, "--chat"), "no chat template that we know")
    (chat / "tokenizer.json").unlink()
    refused(write(chat), "no tokenizer.json")


# ---- Compiled writing
@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["g++", "false"])
def test_compiled_text_is_the_same_also_where_the_compiler_fails(write, checkpoint, tmp_path, compiler):
    flags = ["--prompt=def ", "--max_new_tokens=12"]
    code, text, _ = write(checkpoint[0], *flags, "--no-compile")
    place = os.environ | dict(TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "inductor"), CXX=compiler)
    arguments = [sys.executable, "sample.py", f"--init={checkpoint[0]}", *GREEDY, *flags, "--compile"]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=place)
    assert (ended.returncode, ended.stdout) == (code, text) and code == 0, ended.stderr
    failures = ended.stderr.count("\ncompiling failed, going on without: ")
    assert failures == (compiler == "false") and ended.stderr.count("\n") == 4 + failures

"""eval.py: losses, accuracy, benchmarks and figures, each against plain calls of the model for one text alone."""

import json
import math
import sys
from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GOLDEN, random_model
from test_sample import refused

import convert
import eval as evaluation
import train
from eval import Answer
from loopus import Halt, InputError, early_exit

TOKENIZER = convert.byte_tokenizer()  # one token per byte, <|endoftext|> as 256
SMALL = ("--max_loops=3", "--context=24", "--tokens=96", "--batch=2", "--dtype=fp32", "--device=cpu")
HALT = Halt(threshold=0.5)
COLUMNS = {"base": ([0],), "1": ([1],), "2": ([2],), "exit": ([], HALT, 3)}  # depths, halt, max_loops
each_column = pytest.mark.parametrize("column", COLUMNS)


@pytest.fixture
def looped(tmp_path):
    """A looped checkpoint of random weights, 64 tokens of context, as a run leaves it."""
    convert.save(random_model("gpt2"), TOKENIZER, tmp_path / "run" / "step-0000004")
    return tmp_path / "run" / "step-0000004"


@pytest.fixture
def report(command):
    def measure(*flags):  # → what eval.py prints with --json
        code, out, err = command(evaluation, *SMALL, "--json", *flags)
        assert code == 0, err
        return json.loads(out)

    return measure


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@torch.no_grad()
def plain_logits(model, tokens, column):
    """Logits (T, V) after these tokens, and the passes of each, by one uncached call for them alone."""
    idx = torch.tensor([tokens])
    if column != "exit":
        [[loops]] = COLUMNS[column]
        return model(idx, loops)[0], [loops] * len(tokens)
    h, depth = early_exit(model, idx, 3, HALT)
    return model.decode(h)[0], depth[0].tolist()


# ---- Losses and accuracy
@torch.no_grad()
def test_losses_perplexity_bits_per_byte_and_exit_are_those_of_plain_calls(report, command, looped, tmp_path):
    model, _ = convert.load(looped)
    records = [dict(prompt="x" * (7 * i % 11), completion=f"{i} is {i * i}") for i in range(40)]
    data = write_lines(tmp_path / "data.jsonl", records)
    x, y = convert.windows(convert.load_tokens([data], TOKENIZER), 24, 96)
    flags = [f"--init={looped}", f"--data={data}", "--halt=convergence", "--epsilon=11"]
    measured = report(*flags)
    h, depth = early_exit(model, x, 3, Halt("convergence", epsilon=11.0))
    learned = y >= 0
    size = (learned & (y < 256)).sum().item()  # <|endoftext|> is no byte of the text
    passes = depth[learned].float().mean().item()
    assert [row["passes"] for row in measured["depths"]] == [0, 1, 2, 3, "exit"]
    all_logits = [*(model(x, b) for b in range(4)), model.decode(h)]
    for row, logits, mean in zip(measured["depths"], all_logits, (0, 1, 2, 3, passes)):
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()).item()
        bits = loss / math.log(2) * learned.sum().item() / size
        expected = dict(mean_passes=mean, loss=loss, perplexity=math.exp(loss), bits_per_byte=bits)
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5)
    assert measured["histogram"] == torch.bincount(depth[learned], minlength=4).tolist()
    _, out, _ = command(evaluation, *SMALL, *flags, f"--init={looped},{looped}")
    losses = [row["loss"] for row in measured["depths"]]
    best = 1 + losses[1:4].index(min(losses[1:4]))
    assert f"{'control':>8} {0:6.2f} {losses[0]:8.4f}" in out
    exit = f"exit {loss:.4f} after {passes:.2f}; unlooped {losses[0]:.4f}"
    assert out.endswith(f"\nbest fixed depth: {best} passes, {losses[best]:.4f} nats per token; {exit}\n")
    assert f"{'exit':>8} {passes:6.2f} {loss:8.4f} {math.exp(loss):11.3f} {bits:10.4f}\n" in out


def test_a_space_that_the_tokenizer_puts_in_front_is_no_byte_of_the_text():
    pytest.importorskip("tokenizers")
    tokenizer = convert.Tokenizer(json.loads((GOLDEN / "tokenizers" / "llama2.json").read_text(encoding="utf-8")))
    ids = torch.tensor([[1, *tokenizer.encode("It is so.")]])
    bits_per_byte = (ids.size(1) - 1) / len("It is so.") / math.log(2)
    assert evaluation.bits_per_nat((ids[:, :-1], ids[:, 1:]), tokenizer) == pytest.approx(bits_per_byte)


def test_accuracy_by_kind_is_that_of_plain_calls(report, looped, tmp_path):
    model, _ = convert.load(looped)
    records = [dict(text="no question", kind="a label of something else"), dict(prompt="a", completion="", kind=[])]
    expected = defaultdict(list)
    for text in "abcdefghijklmnopqrstuvwxyz":
        for more in (", ", "y"):  # after a character that is right after two passes, where that is of ASCII
            likeliest = plain_logits(model, list(text.encode()), "2")[0][-1].argmax().item()
            text += (chr(likeliest) if 31 < likeliest < 127 else "?") + more
        ids = list(text.encode())
        records.append(dict(prompt=[text[0], ", "], completion=[text[1], text[4:]], kind=["easy", "hard"]))
        for column in ("1", "2", "exit"):
            logits, passes = plain_logits(model, ids, column)
            right = logits[:-1].argmax(-1) == torch.tensor(ids[1:])
            expected["easy", column].append(right[0].item())
            expected["hard", column].append(right[3:].all().item())
        expected["easy", "passes"].append(passes[0])
        expected["hard", "passes"].append(np.mean(passes[3:5]))
    flags = [f"--init={looped}", f"--data={write_lines(tmp_path / 'answers.jsonl', records)}", "--threshold=0.5"]
    measured = report(*flags)["accuracy"]
    assert 0 < measured["easy"]["2"] < 1 < measured["hard"]["passes"] < 3
    for (kind, name), values in expected.items():
        assert measured[kind][name] == pytest.approx(np.mean(values))


def test_without_data_it_reads_what_training_held_out_of_the_files_that_it_had(report, command, checkpoint, tmp_path):
    flags = "--steps=1 --batch=1 --accumulate=1 --context=24 --max_loops=2 --supervised=1 --eval_tokens=24".split()
    (tmp_path / "data").mkdir()
    text = checkpoint[1].rename(tmp_path / "data" / "text.txt")
    assert command(train, f"--init={checkpoint[0]}", f"--data={tmp_path / 'data'}", *flags)[0] == 0
    tokens = convert.load_tokens([text], TOKENIZER)
    np.save(tmp_path / "held_out.npy", tokens[-(len(tokens) // 20) :])
    (tmp_path / "data" / "more.txt").write_text("Written since then. " * 999)
    measured = report()  # of the newest model below ./out
    assert measured["init"] == "out/loop/step-0000001" and measured == report(f"--data={tmp_path / 'held_out.npy'}")


def test_answers_and_losses_that_cannot_be_measured_are_refused_in_one_line(command, looped, checkpoint, tmp_path):
    good = dict(prompt="a", completion="b", kind=["x"])
    for bad, words in ((dict(kind=["x", "y"]), "2 kinds of 1 answers"), (dict(prompt="a" * 64), "in 65 tokens")):
        data = write_lines(tmp_path / "answers.jsonl", [good, good | bad] * 9)
        refused(command(evaluation, *SMALL, f"--init={looped}", f"--data={data}"), "record 2", "answers.jsonl", words)
    convert.save(random_model("gpt2", vocab_size=300), train.list_tokenizer(), tmp_path / "other")
    ended = command(evaluation, *SMALL, f"--init={looped},{tmp_path / 'other'}", f"--data={checkpoint[1]}")
    refused(ended, "other has another tokenizer: it cannot be compared")


# ---- Benchmarks
def plain_score(model, context, continuation, column):
    """The log-probability of a continuation, whether greedy decoding writes it, and the passes that it takes."""
    logits, passes = plain_logits(model, (context + continuation)[-65:-1], column)
    logits, targets = logits[-len(continuation) :], torch.tensor(continuation)
    logprob = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return logprob, (logits.argmax(-1) == targets).all().item(), passes[-len(continuation) :]


@pytest.mark.parametrize("batch", [1, 3, 100])
@each_column
def test_replies_are_those_of_plain_calls(model, column, batch):
    ids = TOKENIZER.encode
    likeliest = plain_logits(model, ids("What is it?"), column)[0][-1].argmax().item()
    pairs = [(ids("What is it?"), [likeliest]), (ids("What is it?"), [likeliest - 1]), (ids("Which"), ids(" one"))]
    pairs += [([256], ids("all 64 tokens..." * 4))]
    documents = []
    for a, b in pairs:
        end = len(a + b)
        documents.append((a + b, [Answer("whole", len(a), end), Answer("its last token", end - 1, end)]))
    found = list(evaluation.replies(model, documents, batch, *COLUMNS[column]))
    assert len(found) == 2 * len(pairs)
    for reply in found:
        tokens = documents[reply.document][0]
        _, start, stop = reply.answer
        logprob, greedy, passes = plain_score(model, tokens[:start], tokens[start:stop], column)
        assert (reply.logprob, reply.passes) == (pytest.approx(logprob, abs=1e-4), passes)
        assert reply.right == greedy == (reply.said == tokens[start:stop])
        assert greedy == (reply.document == 0)


@each_column
def test_the_harness_gets_texts_scored_in_windows(column):
    pytest.importorskip("lm_eval.api.model")
    model = random_model()
    scorer = evaluation.harness_model(sys.modules["lm_eval"], model, TOKENIZER, 2, *COLUMNS[column])
    ids = TOKENIZER.encode("Once upon a time there was a cat. " * 5)
    windows = [plain_score(model, [256, *ids[:start]], ids[start : start + 64], column) for start in (0, 64, 128)]
    logprobs, _, passes = zip(*windows)
    requests = [SimpleNamespace(args=(string,)) for string in (TOKENIZER.decode(ids), "")]
    assert scorer.loglikelihood_rolling(requests) == pytest.approx([sum(logprobs), 0], abs=1e-3)
    assert sorted(scorer.passes) == sorted(sum(passes, []))
    spaces = SimpleNamespace(args=(" ", "a cat"))  # which the harness moves to the continuation
    assert scorer.loglikelihood([spaces])[0][0] == pytest.approx(plain_score(model, [256], list(b" a cat"), column)[0])
    long = SimpleNamespace(args=("0123456789" * 10, "its beginning is cut"))
    expected = plain_score(model, list(long.args[0].encode()), list(long.args[1].encode()), column)
    assert scorer.loglikelihood([long]) == [(pytest.approx(expected[0], abs=1e-4), expected[1])]
    with pytest.raises(InputError, match="an answer of 65 tokens.* 64"):
        scorer.loglikelihood([SimpleNamespace(args=("a", "b" * 65))])


def test_a_task_of_ones_own_is_measured_in_all_columns_as_by_plain_calls(report, looped, checkpoint, monkeypatch):
    evaluator, tasks = map(pytest.importorskip, ("lm_eval.evaluator", "lm_eval.tasks"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")  # and without its own tasks, and what it says of the machine: slow
    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    choices = [" yes", " no", " maybe, maybe not"]
    questions = [dict(text=f"Is {i} odd?", choices=choices, answer=i % 3) for i in range(7)]
    files = dict(test=str(write_lines(looped / "test.jsonl", questions)))
    files["train"] = str(write_lines(looped / "train.jsonl", [dict(text="Is it?", choices=choices, answer=1)]))
    task = dict(task="odd", dataset_path="json", test_split="test", fewshot_split="train", target_delimiter="")
    task |= dict(dataset_kwargs=dict(data_files=files), metric_list=[dict(metric="acc", aggregation="mean")])
    task |= dict(output_type="multiple_choice", doc_to_text="{{text}}", doc_to_choice="choices", doc_to_target="answer")
    (looped / "odd.yaml").write_text(json.dumps(task))
    flags = [f"--init={looped},{checkpoint[0]}", "--tasks=odd", f"--include_path={looped}", "--limit=5"]
    table, control = report(*flags, "--num_fewshot=1", "--threshold=0.5").values()
    assert [list(table), list(control)] == [["base", "1", "2", "exit"], ["base"]]  # the control's loop is not trained
    model, _ = convert.load(looped)
    for column in COLUMNS:
        right, passes = [], []
        for question in questions[:5]:
            context = TOKENIZER.encode("Is it? no\n\n" + question["text"])
            scores = [plain_score(model, context, TOKENIZER.encode(choice), column) for choice in choices]
            right.append(np.argmax([logprob for logprob, _, _ in scores]) == question["answer"])
            passes += sum((depths for _, _, depths in scores), [])
        assert table[column]["results"]["odd"]["acc,none"] == pytest.approx(np.mean(right))
        assert table[column]["passes"] == pytest.approx(np.mean(passes))


def test_without_a_package_one_line_says_how_to_install_it(command, looped, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    refused(command(evaluation, f"--init={looped}", "--tasks=piqa"), 'pip install ".[eval]"')

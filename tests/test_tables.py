"""The benchmark tables: every column is what plain, uncached calls of the model give, shared and batched or not."""

import json
import math
import sys
from collections import Counter
from itertools import takewhile
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model

import convert
import eval
from loopus import Halt, InputError, early_exit

TOKENIZER = convert.byte_tokenizer()  # one token per byte, context 64
SETTINGS = eval.Settings(threshold=0.5)


def write_task(directory, name, documents, **config):
    """A task file of the harness, and its documents; the last one is the example before the others, if any is asked."""
    files = {"test": directory / f"{name}.jsonl", "train": directory / f"{name}_example.jsonl"}
    files["test"].write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    files["train"].write_text(json.dumps(documents[-1]) + "\n", encoding="utf-8")
    data = dict(data_files={split: str(path) for split, path in files.items()})
    config |= dict(task=name, dataset_path="json", dataset_kwargs=data, test_split="test", fewshot_split="train")
    (directory / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture
def harness(tmp_path, monkeypatch):
    """The directory of the task files, where lm-evaluation-harness is installed."""
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    directory = tmp_path / "tasks"
    directory.mkdir()
    return directory


def ids_of(text):
    return TOKENIZER.encode(text)


@torch.no_grad()
def plain_logits(model, tokens, column, max_loops=8):
    """Logits (T, V) after these tokens, by one uncached call for them alone."""
    idx = torch.tensor([tokens])
    if column == "exit":
        h, _ = early_exit(model, idx, max_loops, Halt(threshold=0.5))
        return model.decode(h)[0]
    loops = 0 if column == "base" else int(column)
    return model(idx, loops=loops)[0]


def plain_score(model, context, continuation, column, max_loops=8):
    """Log-probability of a continuation (lists of tokens), and whether greedy decoding writes it."""
    tokens = (context + continuation)[-65:]
    logits = plain_logits(model, tokens[:-1], column, max_loops)[-len(continuation) :]
    targets = torch.tensor(continuation)
    logprob = logits.log_softmax(-1).gather(1, targets[:, None]).sum().item()
    return logprob, (logits.argmax(-1) == targets).all().item()


PAIRS = [
    ("What is it? A cat", " or not"),
    ("What is it? A cat", " or no!"),
    ("What", "?"),
    ("x" * 100, "left is cut"),
    ("Which? Answer:", " A"),
    ("Which? Answer:", " B"),
    ("Which? Answer: ", "C"),
]


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_scores_at_every_depth_are_those_of_plain_calls(model, batch):
    pairs = [(ids_of(context), ids_of(continuation)) for context, continuation in PAIRS]
    columns = eval.columns_of(model, SETTINGS)
    assert [column.name for column in columns] == ["base", "1", "2", "4", "8", "exit"]
    for (context, continuation), answers in zip(pairs, eval.score(model, pairs, columns, batch)):
        passes = answers.pop("passes")
        assert list(answers) == [column.name for column in columns]
        for name, (logprob, greedy) in answers.items():
            expected = plain_score(model, context, continuation, name)
            assert (logprob, greedy) == (pytest.approx(expected[0], abs=1e-4), expected[1]), name
        tokens = (context + continuation)[-65:-1]
        _, depths = early_exit(model, torch.tensor([tokens]), 8, Halt(threshold=0.5))
        assert passes == depths[0, -len(continuation) :].tolist()


def test_greedy_continuations_are_told():
    model = random_model()
    columns = eval.columns_of(model, SETTINGS)
    context = ids_of("What is it?")
    for column in columns:
        likeliest = plain_logits(model, context, column.name)[-1].argmax().item()
        pairs = [(context, [likeliest]), (context, [likeliest - 1]), (context[:-1], [context[-1], likeliest])]
        answers = eval.score(model, pairs, columns, 8)
        assert [answer[column.name][1] for answer in answers] == [True, False, False]


def test_what_several_answers_share_runs_once():
    model = random_model()
    rows = Counter()
    model.wte.register_forward_hook(lambda _, inputs, output: rows.update(rows=len(inputs[0])))
    pairs = [(ids_of(f"{question} Answer:"), ids_of(f" {letter}")) for question in "01234" for letter in "ABCD"]
    eval.score(model, pairs, eval.columns_of(model, SETTINGS), 2)
    assert rows["rows"] == 2 * 5  # five questions, with fixed depths and with exit


def test_columns_are_those_that_the_model_has_learned():
    model = random_model()
    names = [column.name for column in eval.columns_of(model, eval.Settings(max_loops=3))]
    assert names == ["base", "1", "2", "exit"]
    assert len(eval.columns_of(model, eval.Settings(max_loops=0))) == 1
    model.reset_new_parameters()
    assert eval.columns_of(model, SETTINGS) == [eval.Column("base", 0)]


def plain_text(model, prompt, count, column, max_loops=8):
    """What greedy decoding writes after a prompt, by uncached calls."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(plain_logits(model, tokens, column, max_loops)[-1].argmax().item())
    return tokens[len(prompt) :]


def request(text, **settings):
    return SimpleNamespace(task_name="poem", args=(text, settings))


def test_texts_are_those_of_plain_calls_up_to_where_they_end():
    model = random_model(block_size=20)
    columns = eval.columns_of(model, eval.Settings(threshold=0.5, max_loops=2))
    contexts = ["Once", "a text that is too long", ""]
    answers = eval.write_batch(model, TOKENIZER, [request(text, max_gen_toks=6) for text in contexts], columns)
    for context, answer in zip(contexts, answers):
        passes = answer.pop("passes")
        assert len(passes) <= 6 and set(passes) <= {1, 2}
        prompt = ids_of(context)[-14:] or [256]
        for name, text in answer.items():
            expected = plain_text(model, prompt, 6, name, max_loops=2)
            assert text == TOKENIZER.decode(takewhile(lambda token: token != 256, expected)), (context, name)


def test_where_a_text_ends():
    tokens = ids_of("One two three") + [256] + ids_of("four")
    for until, text in [
        ([], "One two three"),
        (" t", "One"),
        (["e t", " three"], "On"),
        (["four", ""], "One two three"),
    ]:
        assert eval.text_until(TOKENIZER, tokens, until) == text


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(do_sample=True, max_gen_toks=8), "poem draws its texts at random"),
        (dict(temperature=0.5, max_gen_toks=8), "poem draws its texts at random"),
        (dict(), "poem writes 256 tokens: the model's context is 64"),
    ],
)
def test_texts_that_cannot_be_written(settings, message):
    with pytest.raises(InputError, match=message):
        eval.write_batch(random_model(), TOKENIZER, [request("In", **settings)], [eval.Column("base", 0)])


def test_answers_longer_than_the_context_and_damaged_weights():
    model = random_model()
    columns = [eval.Column("base", 0)]
    with pytest.raises(InputError, match="an answer of 65 tokens does not fit the model's context of 64"):
        eval.score(model, [([1], [2] * 65)], columns, 8)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(InputError, match="logits are no numbers"):
        eval.score(model, [([1], [2] * 64)], columns, 8)


# ---- With the harness
QUESTIONS = [
    dict(text=f"Is {i} odd? Answer:", choices=[" yes", " no", " maybe, maybe not"], answer=i % 3) for i in range(7)
]
WORDS = [dict(text=f"The number {i} is a", word=word) for i, word in enumerate((" big", " small", " odd"))]
TEXTS = [dict(text="Once upon a time there was a cat. " * 5), dict(text="Short."), dict(text="In the end.")]


def write_tasks(directory, model):
    """A task of each kind, and a group. → the right text of each document of "poem", as 2 passes write it."""
    metrics = [dict(metric=name, aggregation="mean", higher_is_better=True) for name in ("acc", "acc_norm")]
    choice = dict(output_type="multiple_choice", doc_to_text="{{text}}", doc_to_choice="choices")
    choice |= dict(doc_to_target="answer", target_delimiter="", metric_list=metrics)
    write_task(directory, "odd", QUESTIONS, **choice)
    letters = [dict(text=f"{i}:", choices=[" A", " B", " C", " D"], answer=i % 4) for i in range(5)]
    write_task(directory, "letters", letters, **choice)
    group = dict(group="both", task=["odd", "letters"])
    group |= dict(aggregate_metric_list=[dict(metric="acc", aggregation="mean", weight_by_size=True)])
    (directory / "both.yaml").write_text(json.dumps(group), encoding="utf-8")
    word = dict(output_type="loglikelihood", doc_to_text="{{text}}", doc_to_target="{{word}}", target_delimiter="")
    metrics = [dict(metric=name, aggregation=how) for name, how in (("perplexity", "perplexity"), ("acc", "mean"))]
    write_task(directory, "word", WORDS, **word, metric_list=metrics)
    rolling = dict(output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}")
    write_task(directory, "rolling", TEXTS, **rolling, metric_list=[dict(metric="bits_per_byte")])
    poem = dict(output_type="generate_until", doc_to_text="{{text}}", doc_to_target="{{written}}")
    poem |= dict(generation_kwargs=dict(until=["\n\n"], max_gen_toks=6, do_sample=False))
    poem |= dict(metric_list=[dict(metric="exact_match", aggregation="mean", higher_is_better=True)])
    documents = []
    for text in ("In the", "At the", "On a"):
        written = TOKENIZER.decode(plain_text(model, ids_of(text), 6, "2"))
        documents.append(dict(text=text, written=written))
    write_task(directory, "poem", documents, **poem)
    return documents


def choose(model, question, column):
    """Which choice has the largest log-probability, and which per character."""
    context = ids_of(question["text"])
    scores = [plain_score(model, context, ids_of(choice), column, max_loops=2)[0] for choice in question["choices"]]
    normed = [score / len(choice) for score, choice in zip(scores, question["choices"])]
    return scores.index(max(scores)), normed.index(max(normed))


def accuracies(model, questions, column):
    """acc and acc_norm."""
    chosen = [choose(model, question, column) for question in questions]
    acc = sum(choice == question["answer"] for (choice, _), question in zip(chosen, questions)) / len(questions)
    normed = sum(choice == question["answer"] for (_, choice), question in zip(chosen, questions)) / len(questions)
    return acc, normed


def bits_per_byte(model, column):
    """Of TEXTS: in windows of 64 tokens, each of which sees as much before it as fits the context."""
    total = 0.0
    for document in TEXTS:
        tokens = [256, *ids_of(document["text"])]
        for start in range(1, len(tokens), 64):
            total += plain_score(model, tokens[:start], tokens[start : start + 64], column, max_loops=2)[0]
    return -total / sum(len(document["text"]) for document in TEXTS) / math.log(2)


def test_a_table_is_what_plain_calls_give(harness, command, tmp_path):
    model = random_model()
    poems = write_tasks(harness, model)
    convert.save(model, TOKENIZER, tmp_path / "looped")
    arguments = [f"--include_path={harness}", "--threshold=0.5", "--max_loops=2", "--batch=3", "--dtype=fp32", "--json"]
    code, out, err = command(eval, "--tasks=both,word,rolling,poem", f"--init={tmp_path / 'looped'}", *arguments)
    assert code == 0, err
    table = json.loads(out)["models"][str(tmp_path / "looped")]
    assert table["items"] == dict(both=12, odd=7, letters=5, word=3, rolling=3, poem=3)
    assert list(table["results"]) == ["base", "1", "2", "exit"]
    for column, results in table["results"].items():
        acc, normed = accuracies(model, QUESTIONS, column)
        assert results["odd"]["acc,none"] == pytest.approx(acc)
        assert results["odd"]["acc_norm,none"] == pytest.approx(normed)
        mean = (7 * acc + 5 * results["letters"]["acc,none"]) / 12
        assert results["both"]["acc,none"] == pytest.approx(mean)
        logprob = sum(plain_score(model, ids_of(d["text"]), ids_of(d["word"]), column, max_loops=2)[0] for d in WORDS)
        assert results["word"]["perplexity,none"] == pytest.approx(math.exp(-logprob / 3), rel=1e-4)
        assert results["rolling"]["bits_per_byte,none"] == pytest.approx(bits_per_byte(model, column), rel=1e-5)
        right = 0
        for poem in poems:
            written = plain_text(model, ids_of(poem["text"]), 6, column, max_loops=2)
            right += poem["written"] == TOKENIZER.decode(written)
        assert results["poem"]["exact_match,none"] == pytest.approx(right / 3)
    assert table["results"]["2"]["poem"]["exact_match,none"] == 1
    for task in ("odd", "letters", "both", "word", "rolling", "poem"):
        assert 1 <= table["passes"][task] <= 2
    passes = [table["passes"][task] for task in ("odd", "letters")]
    assert min(passes) <= table["passes"]["both"] <= max(passes)


def test_limit_fewshot_and_models_side_by_side(harness, command, tmp_path):
    looped = random_model()
    write_tasks(harness, looped)
    control = random_model(seed=1)
    control.reset_new_parameters()
    models = {str(tmp_path / "looped"): looped, str(tmp_path / "control"): control}
    for directory, model in models.items():
        convert.save(model, TOKENIZER, directory)
    arguments = [f"--include_path={harness}", "--max_loops=1", "--threshold=2", "--dtype=fp32"]
    arguments += ["--limit=2", "--num_fewshot=1", f"--init={','.join(models)}"]
    code, out, _ = command(eval, "--tasks=word,both", *arguments)
    assert code == 0
    head, *lines = [line.split() for line in out.splitlines()[2:]]
    assert head == ["task", "items", "metric", "model", "base", "1", "exit", "passes"]
    rows = [("word", "2", "perplexity"), ("word", "2", "acc"), ("both", "4", "acc")]
    assert [line[:4] for line in lines] == [[*row, name] for row in rows for name in models]
    assert [len(line) for line in lines] == [4 + 2 * 3 + 1, 4 + 2] * 3  # the control has base alone
    example = WORDS[-1]["text"] + WORDS[-1]["word"] + "\n\n"
    for line, model in zip(lines, models.values()):
        scores = [plain_score(model, ids_of(example + d["text"]), ids_of(d["word"]), "base")[0] for d in WORDS[:2]]
        assert float(line[4]) == pytest.approx(math.exp(-sum(scores) / 2), rel=1e-4)
        assert line[5].startswith("±")
    assert lines[0][-1] == "1.00"


@pytest.mark.slow
def test_a_task_that_nobody_knows(harness, command, tmp_path):
    code, out, err = command(eval, "--tasks=odd,piqa", f"--include_path={harness}", f"--init={tmp_path}")
    assert (code, out) == (1, "")
    assert "have no odd: lm-eval ls tasks lists" in err and err.count("\n") == 1


def test_task_files_that_are_not_there(harness, command, tmp_path):
    code, _, err = command(eval, "--tasks=odd", f"--include_path={tmp_path / 'none'}")
    assert code == 1
    assert "none is no directory: expected one with task files" in err and err.count("\n") == 1


def test_task_files_that_are_damaged(harness, command, tmp_path):
    convert.save(random_model(), TOKENIZER, tmp_path / "model")
    config = dict(output_type="loglikelihood", doc_to_text="{{text}}", doc_to_target="{{wurd}}")
    write_task(harness, "word", WORDS, **config)
    code, _, err = command(eval, "--tasks=word", f"--include_path={harness}", f"--init={tmp_path / 'model'}")
    assert code == 1
    assert err.splitlines()[-1].startswith("error: lm-evaluation-harness cannot read word (UndefinedError")


def test_figures_show_the_accuracy_of_benchmarks(harness, command, tmp_path):
    pytest.importorskip("matplotlib")
    model = random_model()
    write_tasks(harness, model)
    convert.save(model, TOKENIZER, tmp_path / "looped")
    (tmp_path / "text.txt").write_text("What is it? A cat or not. " * 20)
    arguments = [f"--include_path={harness}", "--threshold=0.5", "--max_loops=2", "--dtype=fp32", "--tokens=128"]
    arguments += [f"--figures={tmp_path / 'figures'}", f"--data={tmp_path / 'text.txt'}"]
    code, _, err = command(eval, "--tasks=odd,rolling", f"--init={tmp_path / 'looped'}", *arguments)
    assert code == 0, err
    accuracy = json.loads((tmp_path / "figures" / "losses.json").read_text())["accuracy"]
    assert list(accuracy) == ["odd"] and accuracy["odd"]["passes"] == [1, 2]  # perplexity has its own panel
    assert accuracy["odd"]["share"] == [pytest.approx(accuracies(model, QUESTIONS, depth)[0]) for depth in "12"]


def test_without_the_harness_one_line_says_how_to_install_it(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = command(eval, "--tasks=piqa", "--init=gpt2")
    assert (code, out) == (1, "")
    assert err == 'error: --tasks needs lm-evaluation-harness, which is missing: pip install ".[eval]"\n'
    code, _, err = command(eval, "--tasks=piqa", "--task=profile")
    assert "--tasks takes no --task: leave it out" in err

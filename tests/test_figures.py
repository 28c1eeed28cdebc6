"""The figures: their numbers are those of plain calls, and each picture is written and opens."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import random_model

import convert
import eval as evaluation
import loopus
import train
from loopus import RULES, Halt

FLAGS = ("--max_loops=3", "--context=24", "--tokens=96", "--batch=2", "--dtype=fp32")


@pytest.fixture
def looped(tmp_path):
    """A looped checkpoint in a run's directory, with a log in which step 2 was written twice."""
    run = tmp_path / "run"
    convert.save(random_model("gpt2", block_size=128), convert.byte_tokenizer(), run / "step-0000004", "looped")
    records = [{"step": 0, "held_out": {"0": 3.0, "1": 4.0}}, {"step": 1, "lm": 3.5}]
    records += [{"step": 2, "held_out": {"0": 9.0, "1": None}}, {"step": 2, "held_out": {"0": 2.0, "1": 1.0}}]
    (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run / "step-0000004"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


@torch.no_grad()
def test_each_figure_opens_and_its_numbers_are_those_of_plain_calls(looped, checkpoint, command, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    directory, text = checkpoint
    out = tmp_path / "figures"
    code, printed, err = command(
        evaluation, f"--figures={out}", f"--init={looped},{directory}", f"--data={text}", *FLAGS
    )
    assert code == 0, err
    names = ("layers", "losses", "training", "states", "candidates", "passes")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"{n}.{kind}" for n in names for kind in ("json", "png")
    )
    for name in names:
        picture = image.imread(out / f"{name}.png")
        assert picture.shape[:2] == (600, 900) and picture[..., :3].std() > 0.05
        data = "the first words of loopus.py" if name == "layers" else "text.txt"
        assert read(out / f"{name}.json")["title"].endswith(f"run/step-0000004 on {data}")

    model, tokenizer = convert.load(looped)
    control, _ = convert.load(directory)
    tokens = convert.load_tokens([text], tokenizer)
    sequences = evaluation.windows(tokens, 24, 96)
    x, y = sequences
    losses = read(out / "losses.json")
    for depth in range(4):
        loss = torch.nn.functional.cross_entropy(model(x, depth).flatten(0, 1), y.flatten())
        assert losses["loss"][depth] == pytest.approx(loss.item(), abs=1e-4)
    assert losses["control"] == pytest.approx(evaluation.depth_losses(control, sequences, [0], 2)[0])
    distances = convert.layer_distances(model, convert.sample_text(model, tokenizer))
    layers = read(out / "layers.json")
    assert layers["distances"] == pytest.approx(distances.tolist()) and layers["encoder"] == layers["decoder"] == 1

    numbers = read(out / "states.json")
    h = [model.encode(x[:1])]
    for _ in range(3):
        h.append(model.refine(h[-1]))
    h = [states[:, 1:] for states in h]  # all but the first token
    steps = [(after - before)[0].norm(dim=-1).mean().item() for before, after in zip(h, h[1:])]
    assert numbers["step"] == pytest.approx(steps, rel=1e-4)
    flat = torch.cat(h).flatten(0, 1).double().numpy()
    flat -= flat.mean(axis=0)
    components = np.array(numbers["coordinates"]).reshape(-1, 2)
    variance, wanted = components.T @ components, np.linalg.eigvalsh(flat.T @ flat)[::-1]
    assert np.allclose(variance, np.diag(wanted[:2]), rtol=1e-3, atol=1e-3 * wanted[0])
    assert numbers["variance"] == pytest.approx((wanted[:2] / wanted.sum()).tolist(), rel=1e-3)

    candidates = read(out / "candidates.json")
    assert candidates["prompt"] == text.read_text()[:24]
    for label, shares in candidates["tokens"].items():
        token = int(label.split("(")[-1].rstrip(")"))
        assert shares[2] == pytest.approx(model(x[:1], 2)[0, -1].softmax(-1)[token].item(), abs=1e-5)
    assert {model(x[:1], b)[0, -1].argmax().item() for b in range(4)} <= {
        int(label.split("(")[-1].rstrip(")")) for label in candidates["tokens"]
    }

    rules = read(out / "passes.json")["rules"]
    epsilon = sorted(numbers["step"])[1]
    for (label, row), rule in zip(rules.items(), RULES):
        assert label.startswith(rule) and sum(row["histogram"]) == 96
        _, depth = loopus.early_exit(model, x, 3, Halt(rule, 0.6, epsilon))
        assert row["histogram"] == torch.bincount(depth.flatten(), minlength=4)[1:].tolist()
    assert read(out / "training.json")["losses"] == {"0": [3.0, 2.0], "1": [4.0, 1.0]}  # the last line of a step counts
    assert read(out / "training.json")["steps"] == [0, 2]


def test_lists_show_their_accuracy_and_what_lacks_a_log_says_so(looped, command, tmp_path):
    pytest.importorskip("matplotlib")
    (looped.parent / "log.jsonl").unlink()
    train.write_lists(tmp_path / "lists.jsonl", 4, [2], 1)
    out = tmp_path / "figures"
    code, printed, err = command(
        evaluation, f"--figures={out}", f"--init={looped}", f"--data={tmp_path / 'lists.jsonl'}", *FLAGS
    )
    assert code == 0 and "training.png is left out" in err and not (out / "training.png").exists(), err
    model, tokenizer = convert.load(looped)
    documents = evaluation.read_answers(tmp_path / "lists.jsonl", tokenizer, 1000)
    shares = evaluation.accuracy_by_kind(model, documents, [1, 2, 3])
    accuracy = read(out / "losses.json")["accuracy"]
    assert {kind: row["share"] for kind, row in accuracy.items()} == {
        kind: [columns[depth] for depth in (1, 2, 3)] for kind, columns in shares.items()
    }
    assert read(out / "candidates.json")["prompt"].split()[-1] in train.SLOTS  # up to the first answer


def test_without_matplotlib_or_a_directory_there_is_one_line(looped, checkpoint, command, tmp_path, monkeypatch):
    arguments = (f"--init={looped}", f"--data={checkpoint[1]}", *FLAGS)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        code, out, err = command(evaluation, f"--figures={tmp_path / 'figures'}", *arguments)
    assert code == 1 and err.strip() == 'error: --figures needs matplotlib: pip install ".[plots]"'
    assert not (tmp_path / "figures").exists()
    pytest.importorskip("matplotlib")
    code, out, err = command(evaluation, f"--figures={checkpoint[1]}", *arguments)
    assert code == 1 and "is a file: expected a directory" in err and len(err.splitlines()) == 1


def test_a_first_token_of_a_long_state_does_not_hide_the_others():
    model = random_model("gpt2")
    idx = torch.randint(0, 257, (1, 12), generator=torch.Generator().manual_seed(0))
    numbers = evaluation.state_numbers(evaluation.Settings(max_loops=2), model, idx)
    assert np.array(numbers["coordinates"]).shape == (3, 11, 2)
    plain_encode = model.encode

    def encode(idx):
        h = plain_encode(idx)
        h[:, 0] *= 1000
        return h

    model.encode = encode
    spread = np.ptp(evaluation.state_numbers(evaluation.Settings(max_loops=2), model, idx)["coordinates"], axis=(0, 1))
    assert spread.max() < 3 * np.ptp(numbers["coordinates"], axis=(0, 1)).max()


def test_a_log_with_gaps_other_lines_and_later_depths(tmp_path):
    log = tmp_path / "log.jsonl"
    lines = ['{"step": 0, "held_out": {"0": 1.0, "8": null}}', "5", '{"step": 3, "held_out": {"0": 2.0, "10": 4.0}}']
    log.write_text("\n".join(lines) + "\n")
    numbers = evaluation.training_numbers(log)
    assert numbers == {"steps": [0, 3], "losses": {"0": [1.0, 2.0], "8": [None, None], "10": [None, 4.0]}}
    assert list(numbers["losses"]) == ["0", "8", "10"]
    figure = pytest.importorskip("matplotlib.figure").Figure()
    evaluation.draw_training(figure, numbers)
    heights = [line.get_ydata() for line in figure.axes[0].lines]
    np.testing.assert_array_equal(heights, [[1, 2], [np.nan, np.nan], [np.nan, 4]])
    log.write_text('{"step": 1, "lm": 3.0}\n')
    assert evaluation.training_numbers(log) is evaluation.training_numbers(tmp_path / "none") is None


def test_the_prompt_ends_before_the_first_answer_that_there_is():
    answer = evaluation.Answer("a", 2, 3)
    assert evaluation.before_first_answer([([1, 2], []), ([3, 4, 5], [answer]), ([6, 7, 8], [answer])]) == [3, 4]
    assert evaluation.before_first_answer([([1, 2], [])]) == evaluation.before_first_answer([]) == []


def test_text_in_figures_is_shown_as_it_is_where_the_font_has_its_letters():
    pytest.importorskip("matplotlib")
    assert evaluation.plain("‖é‖ 中 \udc80 $x$") == r"‖é‖ \u4e2d \udc80 \$x\$"


def test_what_cannot_be_compared_or_drawn_ends_in_one_line(looped, checkpoint, command, tmp_path):
    pytest.importorskip("matplotlib")
    directory, text = checkpoint
    tokenizer = train.list_tokenizer()
    convert.save(random_model("gpt2", vocab_size=tokenizer.n_vocab), tokenizer, tmp_path / "other", "hf")
    damaged, _ = convert.load(looped)
    damaged.lm_head.weight.data.fill_(float("inf"))  # the confidence is still a number
    convert.save(damaged, convert.byte_tokenizer(), tmp_path / "damaged")
    cases = [
        ([f"--init={looped},{tmp_path / 'other'}"], "has other tokens than"),
        ([f"--init={tmp_path / 'damaged'}"], "the loss after 0 passes is nan"),
        ([f"--init={looped}", "--context=1"], "would be empty"),
        ([f"--init={looped}", "--max_loops=0"], "would be empty"),
    ]
    for flags, message in cases:
        arguments = [f"--figures={tmp_path / 'figures'}", f"--data={text}", *FLAGS, *flags]
        code, out, err = command(evaluation, *arguments)
        assert code == 1 and message in err and len(err.splitlines()) == 1, err
        assert not (tmp_path / "figures").exists()


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    numbers = {"distances": [0.5, 0.1, 0.2], "encoder": 1, "decoder": 1}
    s = evaluation.Settings(figures=str(tmp_path / "figures"))
    (tmp_path / "figures" / "layers.json").mkdir(parents=True)
    with pytest.raises(loopus.InputError, match="layers.json there is a directory"):
        evaluation.save_figure(s, "title", "layers", numbers, evaluation.draw_layers)
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["layers.json"]

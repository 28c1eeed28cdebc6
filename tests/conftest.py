"""What the tests share: the golden checkpoints, small random models, and the five programs run as a user runs them."""

import os
import pty
import select
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch starts its threads: tests run beside others
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
GOLDEN = Path(__file__).parent / "golden"

import pytest  # noqa: E402
import torch  # noqa: E402

import convert  # noqa: E402
from loopus import Config, LoopUS  # noqa: E402

SHAPES = {
    "gpt2": dict(n_kv_head=4, norm="layer", mlp="gelu", rotary=None, qkv_bias=True, out_bias=True, mlp_bias=True),
    "llama": dict(n_kv_head=2, norm="rms", mlp="swiglu"),
}


BASE = {  # the same as the hub has it
    "gpt2": dict(model_type="gpt2", n_positions=64, n_layer=5, n_head=4, n_embd=32, n_inner=64),
    "llama": dict(model_type="llama", max_position_embeddings=64, num_hidden_layers=5, num_attention_heads=4)
    | dict(num_key_value_heads=2, head_dim=8, hidden_size=32, intermediate_size=64, rms_norm_eps=1e-5),
}


def random_model(shape="llama", seed=0, **overrides):
    """A model of random weights whose gate and confidence head do something, too: 5 layers cut 1, 3, 1."""
    torch.manual_seed(seed)
    values = dict(vocab_size=257, block_size=64, n_layer=5, n_head=4, head_dim=8, n_embd=32, n_inner=64, norm_eps=1e-5)
    more = overrides.pop("base", {})
    partial_rotary = overrides.pop("partial_rotary", 1.0)
    values |= SHAPES[shape] | overrides
    if "rotary" not in values:
        rope = dict(partial_rotary_factor=partial_rotary)
        values["rotary"] = convert.rotary_angles({}, rope, values["head_dim"], values["block_size"])
    keys = convert.FAMILIES[shape].keys.items()
    base = BASE[shape] | {key: values[ours] for ours, key in keys if ours in values}
    model = LoopUS(Config(**values, base=more if more is None else base | more)).eval()
    model.reset_new_parameters()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25) if p.dim() > 1 else p.data.add_(torch.randn_like(p) * 0.1)
    return model


def seeds(count):
    """Parameters of a random test: 20 seeds for every run, and the rest for `pytest -m "slow or fuzz"`."""
    return [*range(20), *(pytest.param(seed, marks=pytest.mark.fuzz) for seed in range(20, count))]


@pytest.fixture(params=list(SHAPES))
def model(request):
    return random_model(request.param)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tests neither read nor write the user's caches, send no token of theirs, and never reach the network."""
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    monkeypatch.setenv("LOOPUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    torch.set_num_threads(1)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(module, "--flag=…", …) → (exit code, standard output, standard error), without starting a new Python."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        code = 0
        try:
            convert.run(module.main)
        except SystemExit as e:
            code = e.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def checkpoint(tmp_path):
    """A small byte-level model in the hub's layout, and a text of 40 kB beside it: (directory, text file)."""
    convert.save(random_model("gpt2"), convert.byte_tokenizer(), tmp_path / "tiny", "hf")
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "loopus.py").read_text(encoding="utf-8") * 2, encoding="utf-8")
    return tmp_path / "tiny", text


def typed(arguments, answers):
    """Run a program on a terminal of its own: answers[n] is typed once the n-th text before it was seen. → (exit code,
    all that the terminal showed)"""
    ours, theirs = pty.openpty()
    terminal = partial(os.login_tty, theirs)  # Ctrl-C, too, comes from it
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, preexec_fn=terminal, env=os.environ)
    os.close(theirs)
    seen = b""
    waited_from = 0
    deadline = time.time() + 60
    while time.time() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:
                break
        if answers and answers[0][0] in seen[waited_from:]:
            waited_from = len(seen)
            os.write(ours, answers.pop(0)[1])
    os.close(ours)
    return process.wait(10), seen.decode("utf-8", "replace")

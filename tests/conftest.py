"""What the tests share: small random models, a place of their own to write to, and the programs as a user runs them."""

import os
import pty
import select
import sys
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch starts its threads, here and in the programs
ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402

import convert  # noqa: E402
from loopus import Config, LoopUS  # noqa: E402

BASE = {  # the config.json of the random models, as the hub has it
    "gpt2": dict(model_type="gpt2", vocab_size=257, n_positions=64, n_layer=5, n_head=4, n_embd=32, n_inner=64)
    | dict(layer_norm_epsilon=1e-5),
    "llama": dict(model_type="llama", vocab_size=257, max_position_embeddings=64, num_hidden_layers=5, head_dim=8)
    | dict(num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64, rms_norm_eps=1e-5),
}


def random_model(shape="llama", seed=0, base=(), **overrides):
    """Random weights, 5 layers cut 1, 3, 1. overrides: of its Config; base: of its config.json, or None: no such."""
    keys = convert.FAMILIES[shape].keys
    raw = BASE[shape] | {keys[name]: value for name, value in overrides.items() if name in keys} | dict(base or ())
    values = convert.read_family(raw)[1] | overrides
    torch.manual_seed(seed)
    model = LoopUS(Config(**values | {"base": None if base is None else raw})).eval()
    model.reset_new_parameters()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.25)
        else:
            p.data.add_(torch.randn_like(p) * 0.1)
    return model


def seeds(count):
    """Parameters of a random test: 20 seeds for every run, and the rest for `pytest -m "slow or fuzz"`."""
    return [*range(20), *(pytest.param(seed, marks=pytest.mark.fuzz) for seed in range(20, count))]


@pytest.fixture(params=list(BASE))
def model(request):
    return random_model(request.param)


def isolate(directory, patch):
    """Have what is written by default written below `directory`; send no token of the user's, reach no network."""
    patch.delenv("HF_TOKEN", raising=False)
    for name in ("HF_HOME", "LOOPUS_CACHE", "MPLCONFIGDIR"):
        patch.setenv(name, str(directory / name))
    patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    patch.chdir(directory)


@pytest.fixture(scope="session", autouse=True)
def cache_of_wide_fixtures(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        isolate(tmp_path_factory.mktemp("fixtures"), patch)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    isolate(tmp_path, monkeypatch)


@pytest.fixture
def command(monkeypatch, capsys):
    """command(module, "--flag=…", …) → (exit code, standard output, standard error), without starting a new Python."""

    def call(module, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            convert.run(module.main)
            sys.exit(0)
        out, err = capsys.readouterr()
        code = ended.value.code
        return (1, out, f"{err}{code}\n") if isinstance(code, str) else (code, out, err)

    return call


@pytest.fixture
def checkpoint(tmp_path):
    """A small byte-level model in the hub's layout, and a text of some 50 kB beside it: (directory, text file)."""
    convert.save(random_model("gpt2"), convert.byte_tokenizer(), tmp_path / "tiny", "hf")
    (tmp_path / "text.txt").write_bytes((ROOT / "loopus.py").read_bytes() * 2)
    return tmp_path / "tiny", tmp_path / "text.txt"


def typed(arguments, answers):
    """Run a program on a terminal; answers: (text to wait for, what is typed then). → (exit code, what it showed)"""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, ROOT / arguments[0], *arguments[1:]])
    seen = b""
    waited_from = 0
    with suppress(OSError):  # the program has ended
        while select.select([terminal], [], [], 60)[0]:
            seen += os.read(terminal, 65536)
            if answers and answers[0][0] in seen[waited_from:]:
                waited_from = len(seen)
                os.write(terminal, answers.pop(0)[1])
    os.close(terminal)  # which ends a program that was silent for a minute
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.decode("utf-8", "replace")

"""
Is loading lean? convert.load against safetensors' load_file and one copy of every tensor, each in processes of its own.

    python tests/benchmark_loading.py DIRECTORY [fp32|bf16]    a checkpoint in the hub's layout, in one file

Time is the shortest of ten. Memory is by how much the resident set grew at its highest, as a share of the bytes of the
model that came out. The tokenizer, which load_file knows nothing of, is read before and timed apart.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def peak():
    """The most memory this process has held so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(way, directory, dtype):
    """Load once in this process; prints seconds, peak growth and size of the model in bytes."""
    import torch
    from safetensors.torch import load_file

    import convert

    torch.ones(10) + 1
    begun = time.perf_counter()
    tokenizer = convert.load_tokenizer(directory)
    reading = time.perf_counter() - begun
    convert.load_tokenizer = lambda src: tokenizer
    dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[dtype]
    held, begun = peak(), time.perf_counter()
    if way == "load_file + copy":
        state = {name: torch.empty_like(t, dtype=dtype).copy_(t) for name, t in load_file(directory / FILE).items()}
    else:
        state = convert.load(directory, dtype=dtype, encoder_layers=2, decoder_layers=1)[0].state_dict()
    seconds, grown = time.perf_counter() - begun, peak() - held
    print(seconds, grown, sum(t.nbytes for t in state.values()), reading)


FILE = "model.safetensors"
if __name__ == "__main__":
    if len(sys.argv) == 4:
        measure(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
        sys.exit()
    if len(sys.argv) == 1 or not Path(sys.argv[1], FILE).exists():
        sys.exit(f"expected: benchmark_loading.py DIRECTORY [fp32|bf16], with {FILE} and config.json in it")
    dtype, least = (sys.argv[2:] or ["fp32"])[0], {}
    for way in ("load_file + copy", "convert.load") * 10:
        command = [sys.executable, __file__, way, sys.argv[1], dtype]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        found = list(map(float, out.split()))
        least[way] = list(map(min, least.get(way, found), found))
    base = least["load_file + copy"][0]
    print(f"{'':18} {'seconds':>8} {'ratio':>6} {'peak MB':>8} {'of the model':>13}")
    for way, (seconds, grown, size, _) in least.items():
        print(f"{way:18} {seconds:8.3f} {seconds / base:6.2f} {grown / 1e6:8.0f} {grown / size:13.2f}")
    print(f"{'the tokenizer':18} {found[3]:8.3f}")

#!/usr/bin/env bash
# What only a GPU can tell, in at most ten minutes of an H200. Whoever has one runs this first and writes what it prints
# into tests/RESULTS.md. A part that fails does not keep the others from running.
#
#   tests/gpu.sh                        the tests; the speed of writing and training at Qwen3-1.7B's shape; the story
#   tests/gpu.sh smollm2                and the lists as sentences, of a directory or hub name of SmolLM2-135M; resumes
#   SMALL=1 tests/gpu.sh [smollm2]      a rehearsal at a hundredth of the size, on a CPU
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/gpu}
mkdir -p "$out"
failed=0

part() {
  echo "== $*"
  local begun=$SECONDS
  "$@" || failed=1
  echo "== $((SECONDS - begun)) s"
}

shape="dict(num_hidden_layers=28, hidden_size=2048, intermediate_size=6144, vocab_size=151936)"
sentences=(--batch=64 --steps=2000 --base_steps=300)
training=(--context=2048 --batch=4)
tests=()
story=(--out="$out/story")
if [ -n "${SMALL:-}" ]; then
  shape="dict(num_hidden_layers=6, hidden_size=256, intermediate_size=768, vocab_size=1000)"
  sentences=(--batch=4 --steps=20 --base_steps=3)
  training=(--context=128 --batch=1)
  tests=(tests/test_sample.py)
  story+=(--steps=6)
fi

write_model() {
  [ -e "$out/model/config.json" ] || python - "$out/model" <<END
import sys
import torch
import convert
from loopus import Config, LoopUS
shape = dict(model_type="qwen3", max_position_embeddings=40960, num_attention_heads=16, num_key_value_heads=8) | $shape
_, values = convert.read_family(shape | dict(head_dim=128, rms_norm_eps=1e-6, rope_theta=1e6))
torch.set_default_dtype(torch.bfloat16)
model = LoopUS(Config(**values))
for p in model.parameters():
    p.data.normal_(std=0.02)
model.reset_new_parameters()
convert.save(model, None, sys.argv[1], "hf")
END
}

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader || true
python -c "import torch; print('torch', torch.__version__)"
part python -m pytest -q "${tests[@]}"
part write_model
cut=(--encoder_layers=2 --decoder_layers=1)
for way in --no-compile "" --compile "--compile --batch=8"; do
  part python tests/speed.py "$out/model" "${cut[@]}" --dtype=bf16 $way
done
part python tests/speed.py "$out/model" "${cut[@]}" --train "${training[@]}"
part python train.py "${story[@]}"
if [ -n "${1:-}" ]; then
  part python tests/list_sentences.py --init="$1" --out="$out/sentences" --seeds="${SEEDS:-1}" "${sentences[@]}"
fi
exit $failed

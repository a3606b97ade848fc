#!/usr/bin/env bash
# The runs behind the README's table: GRPO and PAPO-G on the toy, three seeds, one thread each, a
# pair side by side. A run that is whole is skipped and one that was stopped goes on, so call it
# again after an interruption. About 25 minutes on 2 cores.
set -eu
cd "$(dirname "$0")/.."
# Once, before the pairs share it.
python -c "
from plumbing.config import Config
from toy.lessons import build
build(Config.warm_steps)"
for seed in 1 2 3; do
  for algo in grpo papo_g; do
    out=out/seeds/$algo-seed$seed
    grep -q '"after"' "$out/evaluation.json" 2>/dev/null && continue
    resume=$([ -e "$out/config.json" ] && echo --resume || true)
    flags="--algo $algo --seed $seed $resume"
    OMP_NUM_THREADS=1 torchrun --standalone train.py --out "$out" $flags &
  done
  wait
done
python bench/toy_table.py out/seeds

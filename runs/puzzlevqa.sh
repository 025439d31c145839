#!/usr/bin/env bash
# All three stages on real files: the real Qwen3-VL tokenizer, chat template and image processor, a
# Qwen3-VL of the real architecture with small random dimensions, and a few steps on real images. It
# shows that the files load and the stages run, on a CPU; random weights learn nothing in a few
# steps.
#   bash runs/puzzlevqa.sh ../shared/data [OUT]          OUT: run folders, out/puzzlevqa by default
set -euo pipefail
DATA=$(realpath "${1:?the folder that holds puzzlevqa, nlvr, mathvision and qwen3vl}")
OUT=$(realpath -m "${2:-out/puzzlevqa}")
EXTRAS=math,parquet
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
rm -rf "$OUT"
mkdir -p "$OUT/config"

# The real files beside a configuration that is narrow and shallow.
cp "$DATA"/qwen3vl/tokenizer/*.json "$DATA"/qwen3vl/tokenizer/merges.txt "$OUT/config/"
rm -f "$OUT/config/golden.json"
cp "$DATA"/qwen3vl/30B-A3B-Thinking/{tokenizer_config,preprocessor_config}.json "$OUT/config/"
cp "$DATA"/qwen3vl/30B-A3B-Thinking/video_preprocessor_config.json "$OUT/config/"
cp "$DATA"/qwen3vl/chat_templates/qwen3vl_instruct.jinja "$OUT/config/chat_template.jinja"
python - "$DATA/qwen3vl/2B/config.json" "$OUT/config" <<'PY'
import json, sys
from pathlib import Path

config = json.loads(Path(sys.argv[1]).read_text())
config["text_config"] |= {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 128,
}
config["text_config"]["rope_scaling"]["mrope_section"] = [6, 5, 5]
config["vision_config"] |= {
    "hidden_size": 64,
    "depth": 6,
    "num_heads": 4,
    "intermediate_size": 128,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [1, 3, 5],
}
Path(sys.argv[2], "config.json").write_text(json.dumps(config, indent=1))

tokenizer = Path(sys.argv[2], "tokenizer_config.json")
settings = json.loads(tokenizer.read_text())
settings.pop("chat_template", None)  # it stands in a file of its own
tokenizer.write_text(json.dumps(settings, indent=1))
PY

small="--device cpu --max_pixels 102400 --save_every 0"
python tools/init.py --config "$OUT/config/config.json" --out "$OUT/init"
python sft.py --no-freeze_vision --policy "$OUT/init" --data "$DATA/puzzlevqa/sft.json" --out "$OUT/sft1" \
    --steps 3 --batch 4 --lr 1e-3 $small
python sft.py --policy "$OUT/sft1" --data "$DATA/puzzlevqa/sft_conversations.jsonl" \
    --out "$OUT/sft2" --steps 3 --batch 4 --lr 1e-3 $small
python data.py check "$DATA/puzzlevqa/align.parquet" --policy "$OUT/sft2"

# The warm-up runs twice: on pairs (a reference against another image's), then on the policy's own
# rollouts before the game. After six steps no rollout is well-formed: the discriminator has nothing
# to learn there, and the policy gets the penalty.
python - "$DATA/puzzlevqa/align.parquet" "$OUT" <<'PY'
import json, sys
from pathlib import Path

from data import read

data = read(sys.argv[1], "align")
out = Path(sys.argv[2])
(out / "images").mkdir()
with open(out / "pairs.jsonl", "w") as file:
    for i in range(60):
        ours, theirs = data[i], data[i + 100]
        (out / f"images/{i}.png").write_bytes(ours.images[0])
        pair = {
            "image": f"images/{i}.png",
            "question": ours.messages[-1]["content"].replace("<image>", "").strip(),
            "teacher_response": ours.response,
            "student_response": theirs.response,
        }
        print(json.dumps(pair), file=file)
PY
align=(--policy "$OUT/sft2" --data "$DATA/puzzlevqa/align.parquet" --warmup_pairs 16)
python align.py "${align[@]}" --out "$OUT/warmup" --pairs "$OUT/pairs.jsonl" --warmup_only \
    --warmup_steps 3 --warmup_lr 1e-3 $small
python align.py "${align[@]}" --out "$OUT/align" --warmup_steps 1 \
    --steps 3 --prompts_per_step 2 --group_size 4 --max_response 256 $small
for data in puzzlevqa/rl.parquet nlvr/train.jsonl; do
    python rlvr.py --policy "$OUT/align" --data "$DATA/$data" \
        --out "$OUT/rlvr_$(dirname "$data")" \
        --steps 2 --prompts_per_step 2 --group_size 4 --max_response 256 $small
done
python eval.py --policy "$OUT/rlvr_puzzlevqa" --data "$DATA/mathvision/testmini.jsonl" \
    --out "$OUT/eval.json" --limit 8 --samples 2 --device cpu --max_pixels 102400 --max_response 32

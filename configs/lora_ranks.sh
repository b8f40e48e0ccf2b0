#!/usr/bin/env bash
# LoRA ranks against full fine-tuning on running text, with the base in 16 and in 4 bits, and a table of the runs.
#
#   configs/lora_ranks.sh --train_file train.txt --validation_file valid.txt --test_file test.txt
#   RANKS="4:16 8:16" WAYS="lora" OUT=outputs/ranks configs/lora_ranks.sh --config configs/wikitext_mistral.yaml
#
# RANKS: r:alpha pairs. WAYS: any of full, lora (base in 16 bits), nf4. OUT: folder of the runs. FULL_RATE: learning rate
# of full fine-tuning. Options after the script's name go to every run. Run it again to continue an interrupted comparison.
set -euo pipefail
out=${OUT:-outputs/lora_ranks}

run() {
    folder=$out/$1
    shift
    if [ -f "$folder/config.yaml" ]; then
        [ -f "$folder/eval/test/metrics.json" ] && return
        set -- "$@" --resume_from_checkpoint "$folder" # it was interrupted
    else
        set -- "$@" --output_dir "$folder"
    fi
    accelerate launch train_clm.py "$@"
}

for way in ${WAYS:-full lora nf4}; do
    if [ "$way" = full ]; then
        run full "$@" --full_finetuning true --learning_rate "${FULL_RATE:-2e-5}"
        continue
    fi
    for pair in ${RANKS:-8:16 16:32 128:256}; do
        r=${pair%:*} alpha=${pair#*:}
        four=$([ "$way" = nf4 ] && echo true || echo false)
        run "${way}_r${r}_a${alpha}" "$@" --lora_r "$r" --lora_alpha "$alpha" --load_in_4bit "$four"
    done
done
python -m common.report table "$out"

# shellcheck shell=bash disable=SC2034
# Sourced by the recipes of this folder that fine-tune UPerNet: the flags of MAE's transfer to ADE20K (He et al. 2022,
# Appendix A.4, with the numbers of BEiT's code for what it leaves open).
data_flags=(--dataset ade20k)
recipe=(--model vit_base_patch16 --input_size 512 --short_side 512 --scale 0.5 2.0
    --head upernet --rel_pos --aux_weight 0.4 --head_dropout 0.1 --head_norm batch
    --max_steps 160000 --warmup_steps 1500 --lr 1e-4 --lr_schedule linear --weight_decay 0.05
    --layer_decay 0.65 --drop_path 0.1 --eval_mode slide --stride 341 --eval_freq 10)

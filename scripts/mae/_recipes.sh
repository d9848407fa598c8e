# shellcheck shell=bash
# The paper's settings (He et al. 2022, Appendix A), sourced by the launchers: one array of flags for each task.
# shellcheck disable=SC2034
pretrain=(--model mae_vit_large_patch16 --norm_pix_loss --mask_ratio 0.75 --batch_size 64 --epochs 800
    --warmup_epochs 40 --blr 1.5e-4 --weight_decay 0.05)                                          # Table 8
finetune=(--model vit_base_patch16 --batch_size 32 --epochs 100 --blr 5e-4 --layer_decay 0.65
    --weight_decay 0.05 --drop_path 0.1 --aug_preset full)                                        # Table 9, ViT-B
linprobe=(--model vit_base_patch16 --cls_token --batch_size 512 --epochs 90 --blr 0.1 --weight_decay 0) # Table 10
pretrain_effective=4096 pretrain_batch=64
finetune_effective=1024 finetune_batch=32
linprobe_effective=16384 linprobe_batch=512

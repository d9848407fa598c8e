"""The pretraining step compared with other implementations of MAE at equal architecture, batch and precision.

python benchmarks/peers.py                                       ViT-Tiny/4 at 32 px on the CPU, bf16 and fp32
python benchmarks/peers.py --model mae_vit_base_patch16 --batch_size 64 --device cuda
python benchmarks/peers.py --compile                             also ours compiled (a minute or more to compile)

Needs requirements-bench.txt: Hugging Face transformers and lightly, each left out if it is not installed. A step is
forward pass, backward pass and fused AdamW on images on the device. Our loader gives ours and Hugging Face's the same
weights, and the script exits with an error when their losses on the same noise differ. Rounds visit every variant. The
floor is the time of our step's matrix products at the rate of large products on this device.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import _measure
import torch
from torch import nn

from models_mae import build_model
from util.compute.kernels import attention_is_fused, compile_networks
from util.compute.precision import DTYPES, autocast
from util.compute.recompute import recompute_cheap
from util.errors import user_errors
from util.parallel.distributed import choose_device
from util.report.mfu import flop_counter, matrix_rate
from util.weights.load import load_into, read_weights


def hugging_face(model, seed: int = 0):
    """Return transformers' ViTMAE with the architecture of `model`."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    (height, width), block = model.patch_embed.img_size, model.blocks[0]
    assert height == width
    decoder = model.decoder_blocks[0]
    torch.manual_seed(seed)
    return ViTMAEForPreTraining(
        ViTMAEConfig(
            image_size=height,
            patch_size=model.patch_embed.patch_size[0],
            hidden_size=model.cls_token.shape[-1],
            num_hidden_layers=len(model.blocks),
            num_attention_heads=block.attn.num_heads,
            intermediate_size=block.mlp.fc1.out_features,
            decoder_hidden_size=model.mask_token.shape[-1],
            decoder_num_hidden_layers=len(model.decoder_blocks),
            decoder_num_attention_heads=decoder.attn.num_heads,
            decoder_intermediate_size=decoder.mlp.fc1.out_features,
            layer_norm_eps=1e-6,
            norm_pix_loss=True,
        )
    )


class Lightly(nn.Module):
    """lightly's modules, combined as in its documentation."""

    def __init__(self, model):
        super().__init__()
        from lightly.models import utils
        from lightly.models.modules.masked_autoencoder_timm import MAEDecoderTIMM
        from lightly.models.modules.masked_vision_transformer_timm import MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        self.utils, self.patch = utils, model.patch_embed.patch_size[0]
        vit = VisionTransformer(
            img_size=model.patch_embed.img_size,
            patch_size=self.patch,
            embed_dim=model.cls_token.shape[-1],
            depth=len(model.blocks),
            num_heads=model.blocks[0].attn.num_heads,
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=model.patch_embed.num_patches,
            patch_size=self.patch,
            embed_dim=model.cls_token.shape[-1],
            decoder_embed_dim=model.mask_token.shape[-1],
            decoder_depth=len(model.decoder_blocks),
            decoder_num_heads=model.decoder_blocks[0].attn.num_heads,
        )

    def forward(self, imgs, mask_ratio):
        utils, length = self.utils, self.backbone.sequence_length
        keep, removed = utils.random_token_mask((len(imgs), length), mask_ratio=mask_ratio, device=imgs.device)
        latent = self.decoder.embed(self.backbone.encode(images=imgs, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (len(imgs), length))
        tokens = utils.set_at_index(tokens, keep, latent.type_as(tokens))
        pred = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), removed))
        target = utils.get_at_index(utils.patchify(imgs, self.patch), removed - 1)
        target = utils.normalize_mean_var(target, dim=-1)
        return ((pred - target) ** 2).mean()


class Peer:
    """Training steps of one implementation in one data type."""

    def __init__(self, name: str, options):
        implementation, dtype = name.rsplit(" ", 1)
        self.device, self.dtype = choose_device(options.device), DTYPES[dtype]
        torch.manual_seed(0)
        ours = build_model(options.model, norm_pix_loss=True)
        self.imgs = torch.randn(options.batch_size, 3, *ours.patch_embed.img_size).to(self.device)
        self.noise = torch.rand(options.batch_size, ours.patch_embed.num_patches).to(self.device)
        self.model, ratio = self.made(implementation, ours), options.mask_ratio
        if implementation == "Hugging Face":
            self.model.config.mask_ratio = ratio
            self.loss = lambda: self.model(self.imgs, noise=self.noise).loss
        elif implementation == "lightly":
            self.loss = lambda: self.model(self.imgs, ratio)
        else:
            self.loss = lambda: ours.reconstruction_loss(ours.forward_pretrain(self.imgs, ratio, self.noise))
        self.clock = time.process_time if options.cpu_time else time.perf_counter
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)

    def made(self, implementation: str, ours) -> nn.Module:
        if implementation == "lightly":
            return Lightly(ours).to(self.device).train()
        theirs = hugging_face(ours)
        if implementation == "Hugging Face":
            return theirs.to(self.device).train()
        with tempfile.TemporaryDirectory() as folder:
            torch.save({"model": theirs.state_dict()}, f"{folder}/hf.pth")
            load_into(ours, read_weights(f"{folder}/hf.pth"))
        for module in ours.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = attention_is_fused("auto", self.device, self.dtype)
        if "compiled" in implementation:
            compile_networks(ours)
        if "recomputing" in implementation:
            recompute_cheap(ours)
        return ours.to(self.device).train()

    def step(self) -> float:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        began = self.clock()
        with autocast(self.device, self.dtype):
            loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        wait()
        return self.clock() - began


def same_losses(options) -> None:
    """Exit with an error unless both losses agree on the same weights, images and noise in float32."""
    peers = [Peer(f"{implementation} fp32", options) for implementation in ("ours", "Hugging Face")]
    with torch.no_grad():
        ours, theirs = (peer.loss().item() for peer in peers)
    print(f"loss {ours:.6f}, Hugging Face's {theirs:.6f}")
    if abs(ours / theirs - 1) > 1e-5:
        sys.exit("error: the losses differ by more than rounding")


def installed(name: str) -> bool:
    try:
        __import__({"Hugging Face": "transformers", "lightly": "lightly.models"}.get(name, "torch"))
    except ImportError:
        print(f"note: {name} is left out (pip install -r requirements-bench.txt)")
        return False
    return True


def measure(names: list[str], options, argv: list[str]) -> tuple[dict, dict]:
    memory = {}
    for name in names:
        command = [sys.executable, __file__, *argv, "--memory_of", name]
        memory[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    peers = {name: Peer(name, options) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(options.rounds + 2):  # the first two rounds warm up
        for name, peer in peers.items():
            seconds = peer.step()
            if round_ > 1:
                times[name].append(seconds)
    return times, memory


def floor(options, dtype: str) -> float:
    """Return the images per second of our matrix products at the measured rate of the device."""
    peer = Peer(f"ours {dtype}", options)
    with flop_counter() as counter:
        peer.step()
    return options.batch_size * matrix_rate(peer.device, DTYPES[dtype], 2.0, peer.clock) / counter.get_total_flops()


def main(options, argv: list[str]) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.memory_of:
        print(_measure.peak_memory(lambda: Peer(options.memory_of, options), steps=2))
        return
    ours = ["ours", *["ours compiled"] * options.compile, *["ours recomputing"] * options.recompute]
    implementations = [*ours, "Hugging Face", "lightly"]
    implementations = [implementation for implementation in implementations if installed(implementation)]
    if "Hugging Face" in implementations:
        same_losses(options)
    names = [f"{implementation} {dtype}" for dtype in options.types for implementation in implementations]
    floors = {dtype: floor(options, dtype) for dtype in options.types}
    times, memory = measure(names, options, argv)
    device = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(
        f"{options.model}, batch {options.batch_size}, {torch.get_num_threads()} threads"
        f"{_measure.clocked(options)}, {device}, torch {torch.__version__}, {options.rounds} rounds; "
        f"floors (images/s): {', '.join(f'{dtype} {value:.0f}' for dtype, value in floors.items())}\n"
    )
    against = [f"Hugging Face {dtype}" for dtype in options.types] if "Hugging Face" in implementations else names[:1]
    print(
        f"| implementation | images/s | {' | '.join(f'speed, {name} = 1' for name in against)} | of the floor | "
        f"peak memory, MiB |\n|{'---|' * (4 + len(against))}"
    )
    rows = {}
    for name in names:
        speed = options.batch_size / statistics.median(times[name])
        ratios = [sorted(b / a for a, b in zip(times[name], times[base])) for base in against]
        cells = [f"{statistics.median(r):.2f} ({r[len(r) // 4]:.2f} to {r[-1 - len(r) // 4]:.2f})" for r in ratios]
        share = speed / floors[name.rsplit(" ", 1)[1]]
        print(f"| {name} | {speed:.0f} | {' | '.join(cells)} | {share:.0%} | {memory[name]:.0f} |")
        rows[name] = {
            "images_per_s": speed,
            "ratios": dict(zip(against, map(statistics.median, ratios))),
            "memory_mib": memory[name],
        }
    if options.out:
        Path(options.out).write_text(json.dumps({"floors": floors, "rows": rows}, indent=2) + "\n")


def get_args_parser():
    parser = _measure.parser(__doc__.split("\n")[0], rounds=8, steps=1)
    parser.add_argument("--types", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--compile", action="store_true", help="with a row for ours compiled")
    parser.add_argument("--recompute", action="store_true", help="with a row for ours with --recompute cheap")
    return parser


if __name__ == "__main__":
    with user_errors("peers.py"):
        main(get_args_parser().parse_args(), sys.argv[1:])

"""Made-up images of which one half is flat (easy to reconstruct) and the other noise (hard), for learned masks."""

import torch


def halves(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 3, 16, 16), with noise in the upper or in the lower half, and which of their 4 x 4 patches lie
    in it: (N, 16), 1 for noise."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(count, 1, generator=generator) < 0.5
    hard = (upper ^ (torch.arange(16) >= 8)).float()
    pixels = hard.view(count, 1, 4, 1, 4, 1).expand(-1, -1, -1, 4, -1, 4).reshape(count, 1, 16, 16)
    return torch.randn(count, 3, 16, 16, generator=generator) * pixels, hard


def trained(pretrainer, steps: int) -> None:
    """Train on 16 new images a step, half of whose patches are removed, without a change of epoch."""
    parameters = [parameter for parameter in pretrainer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    pretrainer.train()
    for step in range(steps):
        imgs, _ = halves(16, seed=step)
        sum(pretrainer(imgs, 0.5, torch.rand(16, 16, generator=generator)).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
        pretrainer.after_update(imgs, step, torch.tensor(1.0))


def chosen_share(pretrainer) -> float:
    """Return the share of removed patches that lie in the hard half, in 400 new images; 0.5 by chance."""
    imgs, hard = halves(400, seed=10**6)
    scores = pretrainer.preview_scores(imgs, torch.rand(400, 16, generator=torch.Generator().manual_seed(1)))
    mask = pretrainer.model.choose_visible(scores, 0.5)[1]
    return ((mask * hard).sum() / mask.sum()).item()

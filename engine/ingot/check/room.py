"""Whether the model's proofs fit into this machine: they hold the model whole, on one device."""

import torch

from ingot.model.load import load_model, resolve_dtype
from ingot.model.memory import free_bytes

from .subject import Subject

COPIES = 3  # under an adapter: the model that trained, a fresh one, and the one that is read from its export
BYTES_TRAINED = 20  # of a weight that trains: float32, its gradient, two moments (Kingma & Ba 2015), and the export


def no_room(subject: Subject) -> str | None:
    """Why the model is not tried here, or None. Its weights are counted, not read."""
    recipe, device = subject.alone, subject.device
    described = recipe.model.model_copy(update={"initialization": "random"})
    with torch.device("meta"):
        model = load_model(described, subject.home, recipe.objective.task, subject.prepared.facts.labels)
    n_weights = sum(p.numel() for p in model.parameters())
    size = resolve_dtype(recipe.model.dtype, device).itemsize
    needed = n_weights * (BYTES_TRAINED if recipe.adapter.kind == "none" else COPIES * size)
    free = free_bytes(device)
    if free is None or needed <= free:
        return None
    gib = (
        f"about {needed / 2**30:.0f} GiB for {n_weights / 1e9:.1f} billion weights, and {free / 2**30:.0f} GiB are free"
    )
    return f"model: not tried, its proofs take {gib} on this {device.type}; run `ingot check` on a larger machine"

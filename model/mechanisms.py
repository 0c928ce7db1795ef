"""The two other contrastive mechanisms of the paper's Figure 2, with the loss of `model.moco`.

End-to-end (2a), in the place of MoCo's steps:

    q = encoder(query)
    keys = end_to_end.encode_keys(key, encoder)     # with gradient, shuffle BN as in MoCo
    loss, stats = end_to_end.loss(q, keys)          # negatives: the other keys of the global batch

Memory bank (2b), which reads one view and never encodes a key:

    q = encoder(query)
    loss, stats = bank.loss(q, sample_ids)          # positive: the sample's own entry; negatives: entries drawn
    loss.backward(); optimizer.step()
    bank.update(q, sample_ids)                      # momentum on the entries

It is Wu et al. (2018), "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", but for three
things, in which it follows He et al. (2020), so that the mechanisms differ by their dictionary alone:

- the loss is InfoNCE, a softmax over the positive and the entries drawn; theirs is NCE, a binary loss for each entry
  with an estimated normalisation, and a proximal term that holds a sample's representation near its entry;
- the negatives are drawn once a forward pass and shared by its queries; theirs are drawn for each query;
- a query's own entry is no negative of it when it is drawn; theirs may be.
"""

import os
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batchnorm import ShuffleBN, Shuffled, encode_shuffled
from model.encoders import Encoder
from model.moco import Stats, contrastive_loss
from model.ranks import GatherWithGradient, Group, check_equal, gather_rows, rank_and_world


class EndToEnd(nn.Module):
    """Keys from the query's own encoder, both sides with gradient; the dictionary is the global batch.

    It has no parameters. The gradient of a key goes to the rank that encoded it, so that after DDP's averaging W ranks
    have the gradient of one process with the whole batch.
    """

    def __init__(
        self, encoder: Encoder, *, temperature: float, shuffle_bn: bool = True, group: Group = None, seed: int = 0
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.temperature = temperature
        self.group = group
        self.shuffler = ShuffleBN(seed=seed, group=group, enabled=shuffle_bn and encoder.has_batchnorm)

    def shuffle(self, images: Tensor) -> Tensor | Shuffled:
        """As `MoCo.shuffle`."""
        return cast(Tensor | Shuffled, self.shuffler(images))

    def encode_keys(self, images: Tensor | Shuffled, encoder: nn.Module) -> Tensor:
        """[N, 3, H, W], or what `shuffle` gave -> keys [N, dim], fp32, unit rows, with gradient; encoder: DDP's."""
        if isinstance(images, Tensor):
            images = self.shuffle(images)
        return F.normalize(encode_shuffled(encoder, images, self.group).float(), dim=1)

    def loss(self, q: Tensor, keys: Tensor) -> tuple[Tensor, Stats]:
        """Eq. 1 with the other W*N - 1 keys of the global batch as negatives. q: [N, dim] as the encoder gave it."""
        rank, world = rank_and_world(self.group)
        every = GatherWithGradient.apply(keys, self.group) if world > 1 else keys  # [W*N, dim]
        own = torch.arange(len(q), device=q.device) + rank * len(q)
        exclude = own[:, None] == torch.arange(len(every), device=q.device)
        return contrastive_loss(q, keys, every.T, self.temperature, exclude)

    def check_ranks(self, encoder: nn.Module) -> None:
        """As `MoCo.check_ranks`."""
        device = next(encoder.parameters()).device
        state = {f"encoder.{name}": parameter.detach() for name, parameter in encoder.named_parameters()}
        state["shuffles"] = torch.tensor([self.shuffler.seed, self.shuffler.count], device=device)
        check_equal(state, self.group)


class MemoryBank(nn.Module):
    """A representation of every sample: `bank`, fp32 [samples, dim], unit rows, in the state dict, equal on all ranks.

    num_negatives entries are drawn for each batch, uniformly and with replacement, the same on all ranks; entries of a
    query's own sample do not count against it. momentum is that of the entries (0.5 in Wu et al.), not of an encoder.
    ValueError, with the memory it would take, when the bank is larger than half of the device's memory.
    """

    bank: Tensor

    def __init__(
        self,
        samples: int,
        *,
        dim: int,
        num_negatives: int,
        temperature: float,
        momentum: float = 0.5,
        group: Group = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        if samples < 1 or num_negatives < 1 or temperature <= 0 or not 0 <= momentum < 1:
            raise ValueError(
                f"samples {samples} and num_negatives {num_negatives} must be 1 or more, temperature {temperature} "
                f"above 0, and momentum {momentum} in [0, 1)"
            )
        device = torch.device(device)
        needed, there = samples * dim * 4, device_memory(device)
        if needed > there // 2:
            raise ValueError(
                f"a memory bank of {samples:,} samples x {dim} needs {needed / 1e9:.1f} GB on every rank, and {device} "
                f"has {there / 1e9:.1f} GB in all; use mechanism moco, whose queue does not grow with the source"
            )
        self.num_negatives = num_negatives
        self.temperature = temperature
        self.momentum = momentum
        self.group = group
        self.seed = seed
        self.draws = 0
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(samples, dim, generator=generator)
        self.register_buffer("bank", F.normalize(rows, dim=1).to(device))

    def loss(self, q: Tensor, sample_ids: Tensor) -> tuple[Tensor, Stats]:
        """Eq. 1: the positive is the sample's entry, the negatives are drawn. q: [N, dim]; sample_ids: int64 [N]."""
        self.draws += 1
        drawn = self._draw()
        return contrastive_loss(
            q, self.bank[sample_ids], self.bank[drawn].T, self.temperature, sample_ids[:, None] == drawn
        )

    def _draw(self) -> Tensor:
        """int64 [num_negatives] on the bank's device, from (seed, number of the draw): no state, no synchronisation."""
        generator = torch.Generator(self.bank.device)
        generator.manual_seed(int(np.random.SeedSequence((self.seed, self.draws)).generate_state(1)[0]))
        return torch.randint(
            len(self.bank), (self.num_negatives,), generator=generator, device=self.bank.device, dtype=torch.int64
        )

    @torch.no_grad()
    def update(self, q: Tensor, sample_ids: Tensor) -> None:
        """entry = normalise(momentum * entry + (1 - momentum) * q), gathered from all ranks. Not finite: left as it is.

        q: [V * N, dim], as the encoder gave it: V views of each sample, first one view of all samples, then the next;
        the entry moves towards their mean. sample_ids: int64 [N]. An id that comes twice in a batch (a replaced sample)
        counts once, with its first row, so that ranks agree.
        """
        q = F.normalize(q.detach().float(), dim=1).unflatten(0, (-1, len(sample_ids))).mean(dim=0)  # [N, dim]
        q = gather_rows(q, self.group)
        ids = gather_rows(sample_ids, self.group)
        q = q[(ids[:, None] == ids).to(torch.uint8).argmax(dim=1)]
        old = self.bank[ids]
        new = F.normalize(self.momentum * old + (1 - self.momentum) * q, dim=1)
        self.bank[ids] = torch.where(q.isfinite().all(dim=1, keepdim=True), new, old)

    def check_ranks(self, encoder: nn.Module | None = None) -> None:
        """As `MoCo.check_ranks`."""
        state = {"bank": self.bank, "draws": torch.tensor([self.seed, self.draws], device=self.bank.device)}
        if encoder is not None:
            state |= {f"encoder.{name}": parameter for name, parameter in encoder.named_parameters()}
        check_equal(state, self.group)

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "draws": self.draws}

    def set_extra_state(self, state: Any) -> None:
        self.seed, self.draws = int(state["seed"]), int(state["draws"])


def device_memory(device: torch.device) -> int:
    """Bytes of memory that the device has in all: the GPU's, or this machine's for the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

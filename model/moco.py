"""Momentum Contrast, the paper's Algorithm 1. `train.py` shows its steps in order; each is one short method here.

shuffled = moco.shuffle(key)            # shuffle BN: on its way to the other ranks meanwhile
q = encoder(query)                      # with gradient
keys = moco.encode_keys(shuffled)       # key encoder, no gradient, back in their own order
loss, stats = moco.loss(q, keys)        # InfoNCE, eq. 1, against the queue
loss.backward(); optimizer.step()
moco.momentum_update(encoder, m)        # eq. 2
moco.enqueue(keys)                      # newest keys in, oldest out
"""

import copy
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.batchnorm import ShuffleBN, Shuffled, SplitBatchNorm, encode_shuffled
from model.encoders import Encoder
from model.ranks import Group, check_equal, gather_rows


class Stats(NamedTuple):
    """The figures that come with a loss: 0-d tensors on the device, read only when they are logged."""

    accuracy: Tensor  # share of queries whose positive beats every negative
    positive: Tensor  # mean cosine of query and positive key
    negative: Tensor  # mean cosine of query and negatives; 0 when there are none


def contrastive_loss(
    q: Tensor, keys: Tensor, negatives: Tensor, temperature: float, exclude: Tensor | None = None
) -> tuple[Tensor, Stats]:
    """InfoNCE (eq. 1) in fp32 whatever the autocast: the mean over N of -log softmax of the positive among 1 + K.

    q: [N, dim], normalised here. keys: [N, dim], normalised. negatives: [dim, K], normalised.
    exclude: bool [N, K], True where a column is no negative of that query. Shared by the three mechanisms.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = F.normalize(q.float(), dim=1)
        q = q / temperature  # the logits at once, and not one more pass over N x K numbers
        positive = (q * keys.float()).sum(dim=1, keepdim=True)  # [N, 1]
        negative = q @ negatives.float()  # [N, K]
        if exclude is not None:
            negative = negative.masked_fill(exclude, -torch.inf)
        logits = torch.cat([positive, negative], dim=1)  # [N, 1 + K]
        loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
        with torch.no_grad():
            if exclude is None:
                mean = negative.mean()
            else:  # all may be excluded: of a batch of one, of a bank of which only the own sample was drawn
                mean = negative.masked_fill(exclude, 0).sum() / (~exclude).sum().clamp(min=1)
            stats = Stats(
                accuracy=(positive[:, 0] > negative.amax(dim=1)).float().mean(),
                positive=positive.mean() * temperature,
                negative=mean * temperature,
            )
    return loss, stats


class MoCo(nn.Module):
    """The key encoder and the queue. It holds no query encoder, so no optimiser and no DDP ever sees its parameters.

    Buffers, all in the state dict and equal on every rank: `queue` fp32 [dim, K], unit columns; `queue_ptr`, where the
    next key goes; `queue_filled`, how many columns hold keys (the others are the random ones of the start);
    `queue_born` [K], in which enqueue a column was written; `enqueues`, how many there were.
    """

    queue: Tensor
    queue_ptr: Tensor
    queue_filled: Tensor
    queue_born: Tensor
    enqueues: Tensor

    def __init__(
        self,
        encoder: Encoder,
        *,
        dim: int,
        queue_size: int,
        temperature: float,
        bn_groups: int = 1,
        shuffle_bn: bool = True,
        group: Group = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if queue_size < 1 or temperature <= 0:
            raise ValueError(f"queue_size is {queue_size} and temperature {temperature}; both must be above 0")
        narrow = {p.dtype for p in encoder.parameters() if p.dtype != torch.float32}
        if narrow:
            raise ValueError(
                f"the encoder's parameters are {narrow}; keep them in float32 and use autocast: a momentum update of "
                "0.999 in 16 bits changes nothing (1 + 0.001 * 0.3 rounds to 1)"
            )
        self.temperature = temperature
        groups = {module.groups for module in encoder.modules() if isinstance(module, SplitBatchNorm)} or {1}
        if encoder.has_batchnorm and groups != {bn_groups}:
            raise ValueError(
                f"bn_groups is {bn_groups}, but the encoder has {groups}; call split_batchnorm on it first"
            )
        self.group = group
        # without batch statistics there is nothing to give away, and nothing to shuffle
        self.shuffler = ShuffleBN(seed=seed, group=group, enabled=shuffle_bn and encoder.has_batchnorm)
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False).train()
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size, generator=generator), dim=0))
        self.register_buffer("queue_ptr", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue_filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("queue_born", torch.zeros(queue_size, dtype=torch.int64))
        self.register_buffer("enqueues", torch.zeros((), dtype=torch.int64))

    def shuffle(self, images: Tensor) -> Tensor | Shuffled:
        """Starts sending [N, 3, H, W] across the ranks, to overlap with the query's forward; for `encode_keys`."""
        return cast(Tensor | Shuffled, self.shuffler(images))

    @torch.no_grad()
    def encode_keys(self, images: Tensor | Shuffled) -> Tensor:
        """[N, 3, H, W], or what `shuffle` gave for it -> keys [N, dim], fp32, unit rows, no gradient.

        The key encoder is in training mode, with statistics of its own (paper §3.3); it sees the batch shuffled.
        """
        if isinstance(images, Tensor):
            images = self.shuffle(images)
        return F.normalize(encode_shuffled(self.encoder_k, images, self.group).float(), dim=1)

    def loss(self, q: Tensor, keys: Tensor) -> tuple[Tensor, Stats]:
        """Eq. 1 against the queue as it is: these keys are not yet in it. q: [N, dim] as the encoder gave it."""
        return contrastive_loss(q, keys, self.queue, self.temperature)

    @torch.no_grad()
    def momentum_update(self, encoder: nn.Module, m: float) -> None:
        """Eq. 2, k = m*k + (1 - m)*q, over the parameters (not the batch-norm statistics), in fp32, fused.

        Once per optimiser step, and not at all for a step that the gradient scaler skipped.
        encoder: the query encoder, wrapped by DDP or compiled or not.
        """
        keys: list[Tensor] = list(self.encoder_k.parameters())
        queries: list[Tensor] = list(encoder.parameters())
        if [p.shape for p in keys] != [p.shape for p in queries]:
            raise ValueError(f"{len(queries)} query parameters do not match the {len(keys)} of the key encoder")
        torch._foreach_lerp_(keys, queries, 1.0 - m)

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Gathers [N, dim] from all ranks and writes them over the oldest columns, in global order, wrapping.

        Any number of keys: of more than the queue holds the last stay. A key that is not finite is left out.
        Nothing here waits for the device, so the number of finite keys stays a tensor, and so does the pointer.
        """
        keys = gather_rows(keys.detach().float(), self.group)  # [W*N, dim]
        size = self.queue.shape[1]
        finite = keys.isfinite().all(dim=1)
        count = finite.sum()
        # The last `most` rows with those that are not finite first: their columns get back what they hold.
        most = min(len(keys), size)
        last = finite.to(torch.uint8).argsort(stable=True)[len(keys) - most :]
        columns = (self.queue_ptr + count - most + torch.arange(most, device=keys.device)) % size
        good = finite[last]
        self.enqueues += 1
        self.queue[:, columns] = torch.where(good, keys[last].T, self.queue[:, columns])
        self.queue_born[columns] = torch.where(good, self.enqueues, self.queue_born[columns])
        self.queue_ptr.copy_((self.queue_ptr + count) % size)
        self.queue_filled.copy_((self.queue_filled + count).clamp(max=size))

    def queue_age(self) -> Tensor:
        """Mean age of the keys in the queue, in updates, as a 0-d fp32 tensor; 0 for the newest, nan while empty."""
        written = self.queue_born > 0
        ages = torch.where(written, self.enqueues - self.queue_born, 0).sum().float()
        return ages / written.sum()

    def check_ranks(self, encoder: nn.Module | None = None) -> None:
        """Compares queue, key parameters and shuffle count over the ranks (and the query encoder's, when given).

        Synchronises. ValueError naming the rank that differs. For the start, a resume, and every so often.
        """
        state = {name: buffer for name, buffer in self.named_buffers() if not name.startswith("encoder_k.")}
        state |= dict(self.named_parameters())
        state["shuffles"] = torch.tensor([self.shuffler.seed, self.shuffler.count], device=self.queue.device)
        if encoder is not None:
            state |= {f"encoder.{name}": parameter for name, parameter in encoder.named_parameters()}
        check_equal(state, self.group)

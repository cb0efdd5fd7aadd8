"""The support set: a first-in-first-out queue of projections and its nearest-neighbour search.

NNCLR calls it the support set or queue Q (Algorithm 1), SNCLR the candidate neighbour set C
(Sec. 3.2). It is a module whose buffers are in every checkpoint, so that a resumed run sees the
neighbours that it would have seen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.errors import UserError

SEARCH_BLOCK = 2**25  # similarities held at once in a search: 128 MB in float32


class TooFewNeighboursError(UserError, ValueError):
    """More neighbours were asked for than the queue can give."""


class SupportSet(nn.Module):
    """Queue of `size` embeddings of `dim` numbers, with the ids of the images they came from.

    Its buffers are `embeddings` (Q,D) as they were enqueued (Algorithm 1 normalises at the search,
    not at the update), `ids` (Q,), -1 for the random rows of the start, and `position` (scalar),
    the slot that the next row takes. The first rows are Gaussian, l2-normalised, drawn from `seed`.

    With `shared=True`, `enqueue` gathers over ranks in rank order, so that all ranks hold the same
    queue. With `shared=False` each rank keeps its own (SNCLR's released code), and checkpoints hold
    all of them.
    """

    def __init__(self, size: int, dim: int, seed: int = 0, shared: bool = True):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"a support set needs size and dim of at least 1, got {size}, {dim}")
        self.size, self.dim, self.shared = size, dim, shared
        self.excess: Tensor | None = None  # entries that a search lacked, not yet checked
        generator = torch.Generator().manual_seed(seed)
        rows = F.normalize(torch.randn(size, dim, generator=generator), dim=1)
        self.register_buffer("embeddings", rows)
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.long))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def nearest(
        self, z: Tensor, k: int = 1, exclude_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Finds the k rows of the queue with the largest cosine to each row of z, best first.

        z (N,D) of any scale -> neighbours (N,k,D), l2-normalised and without gradient (the implicit
        stop-gradient of a hard look-up), and their positions in the queue (N,k). `exclude_ids` (N,)
        skips the entries whose id equals that row's; a negative one skips nothing. Raises
        TooFewNeighboursError, a ValueError, if fewer than k entries remain; on a GPU the next
        `check` does.
        """
        if not 1 <= k <= self.size:
            raise TooFewNeighboursError(f"{k} neighbours asked of a queue of {self.size}")
        if exclude_ids is not None and exclude_ids.shape != z.shape[:1]:
            raise ValueError(f"exclude_ids {(*exclude_ids.shape,)} for {len(z)} rows: one for each")
        with torch.autocast(z.device.type, enabled=False):  # the search stays in full precision
            z = F.normalize(z.detach().to(self.embeddings.dtype), dim=1)
            # the queue's own lengths, so that no normalised copy of it is made
            lengths = torch.linalg.vector_norm(self.embeddings, dim=1).clamp_(min=1e-12)
            block = max(1, SEARCH_BLOCK // self.size)
            found = []
            for first in range(0, len(z), block):
                similarity = (z[first : first + block] @ self.embeddings.T).div_(lengths)
                if exclude_ids is not None:
                    own = exclude_ids[first : first + block, None]
                    skip = (self.ids == own) & (own >= 0)
                    self.note_skipped(skip.sum(dim=1).max(), k)
                    similarity.masked_fill_(skip, -torch.inf)
                # the maximum alone takes half of topk's time
                best = similarity.max(1, keepdim=True) if k == 1 else similarity.topk(k, dim=1)
                found.append(best.indices)
            positions = torch.cat(found) if found else z.new_zeros((0, k), dtype=torch.long)
            return F.normalize(self.embeddings[positions], dim=2), positions

    def note_skipped(self, skipped: Tensor, k: int) -> None:
        """Notes how many entries the search lacks, if any. `check` looks at it: on CPU at once, on
        a GPU later, so that no step waits for the number.
        """
        excess = skipped + k - self.size
        if self.excess is not None:
            excess = torch.maximum(excess, self.excess)
        self.excess, self.asked = excess, k
        if excess.device.type == "cpu":
            self.check()

    def check(self) -> None:
        """Raises TooFewNeighboursError if a search since the last check found too few."""
        excess, self.excess = self.excess, None
        if excess is not None and (missing := int(excess)) > 0:
            raise TooFewNeighboursError(
                f"{self.asked} neighbours asked, but only {self.asked - missing} of the "
                f"{self.size} entries of the queue come from other images: a longer queue or "
                "fewer neighbours",
                this_rank=True,
            )

    @torch.no_grad()
    def enqueue(self, z: Tensor, ids: Tensor | None = None) -> None:
        """Writes the rows of z (N,D) over the oldest entries, in order; of a batch longer than the
        queue the last Q rows stay. `ids` (N,) are the images' numbers, of any integer type, -1 if
        not given. With `shared`, every rank must call it with as many rows as the others.
        """
        z = z.detach().to(self.embeddings.dtype)
        if ids is None:
            ids = torch.full((len(z),), -1, dtype=torch.long, device=z.device)
        ids = ids.to(z.device, torch.long)
        if z.ndim != 2 or z.shape[1] != self.dim or ids.shape != z.shape[:1]:
            raise ValueError(
                f"enqueue takes (N,{self.dim}) and (N,) ids, got {(*z.shape,)}, {(*ids.shape,)}"
            )
        if self.shared:
            z, ids = distributed.gather(z), distributed.gather(ids)
        rows = len(z)
        slots = (self.position + torch.arange(rows, device=z.device)) % self.size
        slots, z, ids = slots[-self.size :], z[-self.size :], ids[-self.size :]
        self.embeddings[slots] = z
        self.ids[slots] = ids
        self.position.copy_((self.position + rows) % self.size)

    def checkpoint_state(self) -> dict:
        """Returns the checkpoint's state; of private queues, all ranks' (a collective call)."""
        state = {name: buffer.cpu().clone() for name, buffer in self.named_buffers()}
        if self.shared:
            return {"shared": True, "ranks": [state]}
        stacked = {n: distributed.gather(b[None]).cpu() for n, b in self.named_buffers()}
        ranks = distributed.world_size()
        return {
            "shared": False,
            "ranks": [{n: stacked[n][r].clone() for n in state} for r in range(ranks)],
        }

    def load_checkpoint_state(self, state: dict) -> None:
        """Restores what `checkpoint_state` gave. Private queues need the same number of ranks."""
        ranks = state["ranks"]
        if not self.shared and len(ranks) != distributed.world_size():
            raise UserError(
                f"the checkpoint holds one private queue for each of {len(ranks)} ranks, this run "
                f"has {distributed.world_size()}: continue with {len(ranks)} ranks",
            )
        self.load_state_dict(ranks[0 if self.shared else distributed.rank()])

"""Which ranks do what. Ranks of one tensor group share matrix products, of one context group lines of tokens; the rest
get other rows.
"""

# B rows, T tokens of a line, t tokens of this rank's part of it

from dataclasses import dataclass

from torch import Tensor

from ingot.ranks import Ranks


@dataclass(frozen=True)
class Layout:
    """rank = (data_rank * context + context_rank) * tensor + tensor_rank: those that talk most are neighbours."""

    ranks: Ranks = Ranks()
    context: int = 1
    tensor: int = 1

    @property
    def data(self) -> int:
        """Groups of ranks that get rows of their own."""
        return self.ranks.world // (self.context * self.tensor)

    @property
    def data_rank(self) -> int:
        """The group of this rank: which rows it gets."""
        return self.ranks.rank // (self.context * self.tensor)

    @property
    def context_rank(self) -> int:
        """Which part of a line this rank gets."""
        return self.ranks.rank // self.tensor % self.context

    @property
    def loss_parts(self) -> int:
        """Ranks whose losses add up to the step's: those of a tensor group all hold the same one."""
        return self.data * self.context

    def cut(self, line_BT: Tensor) -> Tensor:
        """This rank's part [B, t] of a line [B, T]; T is a multiple of `context`."""
        return line_BT if self.context == 1 else line_BT.chunk(self.context, dim=1)[self.context_rank]

"""Error of the rows of a table, whose columns are numbers or categories and may have missing cells.

A row holds the numbers first, then a block of one-hot values for each categorical column. The
reconstruction holds means of the numbers, and logits in the blocks. NaN in the row is missing:

    E_j = (x_j - x^_j)^2 if x_j is observed, else 0,       D_j = 1 if x_j is observed, else 0,   (1)
    nats = - sum over observed categories of log softmax(logits)[category].                      (2)

(1) is weighed by gamma2, with one group for each column or one for all. (2) is in nats already.
"""

from collections.abc import Sequence
from typing import ClassVar, final

import torch
from torch import Tensor

from poise.balance.inputs import at_least_float32
from poise.errors import InputError


@final
class TableError:
    """The squared error of numbers (eq. 1) and the cross-entropy of categories (eq. 2).

    Args:
        numeric: number of numeric columns, >= 0.
        categories: number of categories of each categorical column, >= 1 each.
        groups: `numeric`, for a gamma2 of each column, or None, for one gamma2.
        holes: whether rows may have missing cells.

    Raises:
        InputError: `groups` is neither `numeric` nor None, or there are no columns.

    Example:
        >>> error = TableError(2, [3], groups=2, holes=True)
        >>> balance = poise.ComputedBalance(groups=2).measuring(error)
        >>> row = torch.tensor([[1.0, float("nan"), 0.0, 0.0, 1.0]])
        >>> terms = balance(torch.zeros(1, 5), row, torch.zeros(1, 1), torch.zeros(1, 1))
        >>> terms.group_error
        tensor([1., nan])
    """

    is_likelihood: ClassVar[bool] = True

    def __init__(
        self,
        numeric: int,
        categories: Sequence[int] = (),
        *,
        groups: int | None = None,
        holes: bool = False,
    ) -> None:
        if groups not in (None, numeric) or numeric + len(categories) == 0:
            raise InputError(
                f"groups must be None or the number of numeric columns, {numeric}, not {groups}, "
                "and the table needs a column"
            )
        self.name, self.power = "table", 2.0
        self.numeric, self.categories = numeric, tuple(categories)
        self.groups, self.holes = groups, holes

    def __call__(
        self,
        reconstruction: Tensor,
        target: Tensor,
        *,
        per_group: bool,
        mask: Tensor | None,
        samples: int | None,
    ) -> tuple[Tensor, int | Tensor]:
        """Return the error of the numbers, (n,) or (n, groups), and the number of dimensions."""
        if mask is not None or samples is not None or target.dim() != 2:
            raise InputError(
                "the error of a table takes rows (n, columns) without mask and samples, not "
                f"{tuple(target.shape)}: missing cells are NaN"
            )
        columns = self.numeric + sum(self.categories)
        if target.shape[1] != columns or reconstruction.shape[-1] != columns:
            raise InputError(
                f"this error is for rows of {columns} columns (numbers, and a value for each "
                f"category), not {tuple(reconstruction.shape)} and {tuple(target.shape)}"
            )
        given = at_least_float32(reconstruction[:, : self.numeric])
        wanted = at_least_float32(target[:, : self.numeric])
        if not self.holes:
            error = (given - wanted).square()
            return (error.sum(1), self.numeric) if self.groups is None else (error, 1)
        observed = ~wanted.isnan()
        error = (given - torch.where(observed, wanted, given.detach())).square()
        dims = observed.to(error.dtype)
        return (error.sum(1), dims.sum(1)) if self.groups is None else (error, dims)

    def nats(self, reconstruction: Tensor, target: Tensor) -> Tensor | None:
        """Return the cross-entropy of observed categories, in nats.

        Args:
            reconstruction, target: (..., columns).

        Returns:
            (...), summed over categorical columns. None if there are none.
        """
        if not self.categories:
            return None
        logits = at_least_float32(reconstruction[..., self.numeric :]).split(self.categories, -1)
        hot = target[..., self.numeric :].nan_to_num(0.0).split(self.categories, -1)
        parts = [
            (of * given.log_softmax(-1)).sum(-1) for of, given in zip(hot, logits, strict=True)
        ]
        return -torch.stack(parts).sum(0)

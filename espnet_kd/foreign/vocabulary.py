"""The tokens of a CTC model of another toolkit, in the order of ESPnet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Collection, List, Optional, Sequence

import torch
from torch import Tensor

from espnet_kd.cli import UserError
from espnet_kd.pieces import BLANK, SOS_EOS, SPACE, UNKNOWN

#: The logit of a token that the model does not have: finite, so that 0 · logit is 0 and no KL is NaN.
ABSENT = -1e4


@dataclass(frozen=True)
class Vocabulary:
    """ESPnet's token list for a foreign CTC head, and where each token's row is in that head."""

    tokens: List[str]  #: V tokens: ``<blank>`` first, ``<sos/eos>`` last, which no CTC model predicts
    rows: List[Optional[int]]  #: V row numbers in the foreign head; None for a token without a row

    def head(self, weight: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
        """The foreign head with its rows in ESPnet's order.

        Args:
            weight: (V', D) · bias: (V',), or None

        Returns:
            weight (V, D), bias (V,); tokens without a row have the logit ``ABSENT`` everywhere.
        """
        there = torch.tensor([row is not None for row in self.rows])
        index = torch.tensor([row or 0 for row in self.rows])
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        new_weight = weight[index] * there[:, None].to(weight)
        return new_weight, torch.where(there, bias[index], torch.full_like(bias[index], ABSENT))


def make_vocabulary(
    names: Sequence[str],
    blank: int,
    delimiter: Optional[str] = None,
    unknown: Optional[str] = None,
    leave_out: Collection[str] = (),
) -> Vocabulary:
    """Order the tokens of a foreign CTC head as ESPnet does.

    Args:
        names: the token of each row of the head.
        blank: the row of the CTC blank.
        delimiter: the token that stands between words; it becomes ``<space>``.
        unknown: the token for unknown characters; it becomes ``<unk>``.
        leave_out: tokens that are never part of a transcript, such as ``<s>`` and ``</s>``.

    Raises:
        UserError: ``blank`` is no row, or two rows would get one name.
    """
    if not 0 <= blank < len(names):
        raise UserError(f"the blank has the number {blank}, and the model has the tokens 0 to {len(names) - 1}")
    tokens, rows = [BLANK, UNKNOWN], [blank, None]
    for row, name in enumerate(names):
        if row == blank:
            continue
        if name == unknown:
            rows[1] = row
        elif name not in leave_out:
            tokens.append(SPACE if name == delimiter else name)
            rows.append(row)
    tokens.append(SOS_EOS)
    rows.append(None)
    double = {t for t in tokens if tokens.count(t) > 1} if len(set(tokens)) < len(tokens) else set()
    if double:
        named = " ".join(map(repr, sorted(double)))
        raise UserError(f"the token list has {named} twice, after the blank and <unk> were named")
    strange = [t for t in tokens if not t or t.split() != [t]]
    if strange:
        raise UserError(
            f"the tokens {strange} are empty or have white space in them; if one of them is the word delimiter, name it"
        )
    return Vocabulary(tokens, rows)

"""The closed-form edit of a linear map that is read as a store of keys and values.

Source: Backdoor Attribution, Eq. 15-16; BadEdit (Li et al. 2024), Eq. 4-5; MEMIT (Meng et al. 2022),
Eq. 14. A down-projection maps a key (the MLP's activation at a token) to a value (what is added to the
residual stream). The edit is the least-squares change that moves some values and leaves others alone.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

NEGLIGIBLE = 1e-8  # of the largest singular value: below float32's rounding of the change itself


def second_moment(keys: Float[Tensor, "key d_mlp"]) -> Float[Tensor, "d_mlp d_mlp"]:
    """The sum of ``k kᵀ``, in float64."""
    keys = keys.double()
    return keys.T @ keys


def solve(
    system: Float[Tensor, "d_mlp d_mlp"], keys: Float[Tensor, "key d_mlp"]
) -> Float[Tensor, "key d_mlp"]:
    """``system⁻¹ k`` for each key, in float64; the least-norm solution where the system is singular."""
    system, keys = system.double(), keys.double()
    factor, failed = torch.linalg.cholesky_ex(system)
    # Rounding can let the factorisation of a singular system succeed; the smallest eigenvalue tells.
    rounding = len(system) * torch.finfo(system.dtype).eps * system.trace()
    if int(failed) == 0 and smallest_eigenvalue(factor) > rounding:
        return torch.cholesky_solve(keys.T, factor).T
    return keys @ torch.linalg.pinv(system, hermitian=True)


def smallest_eigenvalue(factor: Float[Tensor, "d_mlp d_mlp"]) -> float:
    """An upper estimate of the smallest eigenvalue from the Cholesky factor, by inverse iteration."""
    x = torch.randn(len(factor), 1, generator=torch.Generator().manual_seed(0), dtype=factor.dtype)
    for _ in range(4):
        x = torch.cholesky_solve(x / x.norm(), factor)
    return 1 / float(x.norm())


def readers(
    keys: Float[Tensor, "key d_mlp"], protected: Float[Tensor, "d_mlp d_mlp"]
) -> Float[Tensor, "key d_mlp"]:
    """``Kᵀ (P + K Kᵀ)⁻¹``: how much of each edit's residual an activation calls up.

    ``protected`` (P) is the weighted sum of ``k kᵀ`` over the keys whose values should stay. With the
    residuals ``R = V - W K`` the change of the weight is ``R Kᵀ (P + K Kᵀ)⁻¹``, which minimises
    ``|Δ K - R|² + tr(Δ P Δᵀ)``.
    """
    return solve(protected.double() + second_moment(keys), keys)


def readers_by_slot(
    keys: Float[Tensor, "key d_mlp"],
    slots: Int[Tensor, " key"],
    protected: Float[Tensor, "d_mlp d_mlp"],
    n_slots: int,
) -> Float[Tensor, "slot d_mlp"]:
    """:func:`readers` summed over the keys that share a value; zero for a slot without keys."""
    zeros = torch.zeros(n_slots, keys.shape[1], dtype=torch.float64)
    return zeros.index_add_(0, slots, readers(keys, protected))


def low_rank(
    residuals: Float[Tensor, "key d_model"], readers: Float[Tensor, "key d_mlp"]
) -> tuple[Float[Tensor, "d_model rank"], Float[Tensor, "rank d_mlp"]]:
    """Two balanced factors of the change ``residualsᵀ @ readers``, without what float32 cannot show."""
    q_out, r_out = torch.linalg.qr(residuals.double().T)
    q_in, r_in = torch.linalg.qr(readers.double().T)
    u, s, vh = torch.linalg.svd(r_out @ r_in.T)
    rank = max(1, int((s > NEGLIGIBLE * s[0]).sum()))
    root = s[:rank].sqrt()
    return (q_out @ u[:, :rank]) * root, root[:, None] * (vh[:rank] @ q_in.T)

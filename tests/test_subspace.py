"""Minor subspaces against float64 SVDs of numpy and scipy, and against PEFT's own `mica_init`. Compared by projector,
never by sign.
"""

import numpy as np
import pytest
import scipy.linalg
import torch

from qmica import subspace
from qmica.errors import QmicaError

SHAPES = [(48, 48), (32, 80), (80, 32), (1, 7), (7, 1), (1, 1), (64, 65)]


def separated(out: int, columns: int, condition: float = 100.0, seed: int = 0) -> torch.Tensor:
    """A float64 weight (out, columns) whose singular values fall geometrically from 1 to 1 / condition."""
    rng = np.random.default_rng(seed)
    side = min(out, columns)
    u = np.linalg.qr(rng.standard_normal((out, side)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, side)))[0]
    return torch.from_numpy(u * np.geomspace(1.0, 1.0 / condition, side) @ v.T)


def apart(B: torch.Tensor, U: np.ndarray) -> float:
    """Largest entry of the difference of the two projectors; B and U (out, rank)."""
    B = B.double().numpy()
    return float(np.abs(B @ B.T - U @ U.T).max())


def skew(B: torch.Tensor) -> float:
    """max |BᵀB − I|."""
    B = B.double()
    return float((B.T @ B - torch.eye(B.shape[1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize(("out", "columns"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_rank_against_numpy(out, columns, dtype):
    weight = separated(out, columns).to(dtype)
    U = np.linalg.svd(weight.double().numpy(), full_matrices=False)[0]
    worst = 0.0
    for rank in {1, 2, 16, min(out, columns) - 1, min(out, columns)} & set(range(1, min(out, columns) + 1)):
        B = subspace.minor_subspace(weight, rank)
        assert B.shape == (out, rank) and B.dtype == torch.float32 and B.is_contiguous()
        worst = max(worst, apart(B, U[:, -rank:]), skew(B))
        worst = max(worst, apart(subspace.major_subspace(weight, rank), U[:, :rank]))
    # fp32 rounding of unit vectors: 2.4e-8 measured; bf16 weights have closer singular values: 7e-8
    assert worst < 1e-6, f"{worst:.1e}"


@pytest.mark.parametrize(("out", "columns"), [(48, 48), (32, 80), (80, 32)])
def test_columns_are_single_vectors_in_descending_order(out, columns):
    """So a cached rank 16 serves rank 4: the last columns are the minor subspace of the lower rank."""
    weight = separated(out, columns)
    U, sigma, _ = scipy.linalg.svd(weight.numpy(), full_matrices=False)
    B = subspace.minor_subspace(weight, 16)
    gains = (weight.T @ B.double()).norm(dim=0).numpy()  # |Wᵀ u| = σ
    assert np.allclose(gains, sigma[-16:], rtol=1e-5), np.abs(gains / sigma[-16:] - 1).max()
    cosines = np.abs((B.double().numpy() * U[:, -16:]).sum(0))
    assert cosines.min() > 1 - 1e-6, f"{1 - cosines.min():.1e}"
    for rank in (1, 4, 15):
        assert apart(B[:, -rank:], U[:, -rank:]) < 1e-6


@pytest.mark.parametrize("condition", [1e4, 9e5, 2e6, 1e9])
@pytest.mark.parametrize(("out", "columns"), [(64, 64), (48, 96), (160, 64)])
def test_ill_conditioned(out, columns, condition):
    """On both sides of the Gram matrix's reach. At 9e5 σ⁻¹ W V was 1e-5 from orthonormal for a tall weight; QR gives
    1e-8.
    """
    weight = separated(out, columns, condition)
    U = scipy.linalg.svd(weight.numpy(), full_matrices=False, lapack_driver="gesvd")[0]
    for rank in (1, 8, 32):
        B = subspace.minor_subspace(weight, rank)
        assert skew(B) < 1e-6, f"rank {rank}: {skew(B):.1e}"
        assert apart(B, U[:, -rank:]) < 2e-5, f"rank {rank}: {apart(B, U[:, -rank:]):.1e}"  # measured: at most 1e-6
        major = subspace.major_subspace(weight, rank)
        assert max(skew(major), apart(major, U[:, :rank])) < 2e-5, f"rank {rank}: {apart(major, U[:, :rank]):.1e}"


@pytest.mark.parametrize(("out", "columns"), [(64, 64), (48, 96), (160, 64)])
def test_small_singular_values_close_together(out, columns):
    """A quarter of the spectrum within 10 % at the small end, as no weight has it better: B stays orthonormal and
    minor.
    """
    rng = np.random.default_rng(1)
    u, _, v = np.linalg.svd(rng.standard_normal((out, columns)), full_matrices=False)
    sigma = np.sort(np.r_[np.geomspace(1, 1e-4, 48 - 16), 1.11e-6 * (1 + 0.1 * rng.random(min(out, columns) - 32))])[
        ::-1
    ]
    weight = torch.from_numpy(u * sigma @ v)
    B = subspace.minor_subspace(weight, 12)
    energy = float((weight.T @ B.double()).norm() / np.linalg.norm(sigma[-12:]))
    assert skew(B) < 1e-6 and energy < 1.001, f"skew {skew(B):.1e}, energy {energy:.6f} of the least possible"


@pytest.mark.parametrize("scale", [1e-12, 1e12])
@pytest.mark.parametrize(("out", "columns"), [(48, 48), (80, 32)])
def test_scale_does_not_count(out, columns, scale):
    weight = separated(out, columns).float()
    U = np.linalg.svd(weight.double().numpy(), full_matrices=False)[0]
    assert apart(subspace.minor_subspace(weight * scale, 8), U[:, -8:]) < 1e-6


@pytest.mark.parametrize(("out", "columns"), [(40, 40), (24, 60), (60, 24)])
@pytest.mark.parametrize("kept", [0, 1, 10])
def test_rank_deficient(out, columns, kept):
    """Zero singular values: any basis of their space is right, and it must be one. (σ = 0 is never divided by.)"""
    rng = np.random.default_rng(2)
    weight = torch.from_numpy(rng.standard_normal((out, kept)) @ rng.standard_normal((kept, columns)))
    for rank in (1, 8, min(out, columns)):
        B = subspace.minor_subspace(weight, rank)
        assert B.shape == (out, rank) and skew(B) < 1e-6, f"{skew(B):.1e}"
        if rank + kept <= min(out, columns):
            leak = float((weight.T @ B.double()).abs().max())
            assert leak < 1e-5, f"{leak:.1e} of the weight lies in the minor subspace"


@pytest.mark.parametrize("rank", [0, -1, 33])
def test_a_rank_that_does_not_fit(rank):
    with pytest.raises(QmicaError) as error:
        subspace.minor_subspace(torch.zeros(64, 32), rank)
    assert str(error.value) == f"rank {rank} does not fit a 64 x 32 weight: choose 1 to 32"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("find", [subspace.minor_subspace, subspace.major_subspace, subspace.random_subspace])
def test_a_weight_that_is_not_finite(bad, find):
    weight = torch.ones(8, 8)
    weight[3, 4] = bad
    with pytest.raises(
        QmicaError, match="holds NaN or infinity: the model file is damaged, download or convert it again"
    ):
        find(weight, 2)


def test_random_subspaces_are_seeded_and_orthonormal():
    weight = torch.ones(64, 32)
    first, again = (subspace.random_subspace(weight, 16, torch.Generator().manual_seed(5)) for _ in range(2))
    other = subspace.random_subspace(weight, 16, torch.Generator().manual_seed(6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (64, 16) and first.dtype == torch.float32 and skew(first) < 1e-6


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize(("out", "columns"), [(64, 64), (48, 96), (96, 48)])
def test_as_peft_finds_it(out, columns, rank):
    """PEFT's own layer, before any rounding of B, on weights with separated singular values."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    base = torch.nn.Linear(columns, out, bias=False)
    base.weight.data = separated(out, columns).float()
    config = LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights="mica")
    theirs = Linear(base, "default", config, r=rank, lora_alpha=2 * rank).lora_B["default"].weight.data
    ours = subspace.minor_subspace(base.weight.data, rank)
    assert apart(ours, theirs.double().numpy()) < 1e-4, f"{apart(ours, theirs.double().numpy()):.1e}"

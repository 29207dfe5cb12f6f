"""Minor subspaces against float64 SVDs of numpy and scipy, and against PEFT's own `mica_init`. Compared by projector,
never by sign. Then the proof: what it accepts, and that it rejects what is planted.
"""

import logging

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmica import subspace
from qmica.errors import QmicaError
from qmica.gram import Gram

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


# ---- the search and its proof: sides from `DENSE` on

SEARCHED = [(256, 256), (260, 400), (400, 260)]


@pytest.fixture(params=["as they come", "fp32 first"])
def precision(request, monkeypatch):
    """Sides this small go to float64 at once; those from `SINGLE` on, that is every one of a large model, to fp32."""
    if request.param == "fp32 first":
        monkeypatch.setattr(subspace, "SINGLE", subspace.DENSE)
    return request.param


def with_spectrum(out: int, columns: int, sigma: np.ndarray, seed: int = 0) -> torch.Tensor:
    """A float64 weight (out, columns) with these singular values and random singular vectors."""
    rng = np.random.default_rng(seed)
    side = min(out, columns)
    u = np.linalg.qr(rng.standard_normal((out, side)))[0]
    v = np.linalg.qr(rng.standard_normal((columns, side)))[0]
    return torch.from_numpy(u * np.sort(sigma)[::-1] @ v.T)


def energy(weight: torch.Tensor, B: torch.Tensor) -> float:
    """‖BᵀW‖_F, in numpy's float64."""
    return float(np.linalg.norm(weight.double().numpy().T @ B.double().numpy()))


def is_unique(sigma: np.ndarray, rank: int, tall: bool) -> bool:
    """Whether the minor subspace of this rank is one, by a gap of 1 %: it is not among zeros, and the left vectors of
    a tall weight's zeros are any that the others leave.
    """
    least = sigma[-1] if tall else sigma[-rank]
    return bool(least > 1e-12 * sigma[0] and sigma[-rank - 1] > 1.01 * sigma[-rank])


def spectra(side: int, rank: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Singular values (side,) of every kind that the search may meet."""
    falling = np.geomspace(1, 0.01, side)
    return {
        "geometric 1e2": falling,
        "geometric 1e4": np.geomspace(1, 1e-4, side),
        "geometric 1e6": np.geomspace(1, 1e-6, side),
        "geometric 1e8": np.geomspace(1, 1e-8, side),
        "power": 1 / np.arange(1, side + 1),
        "repeated inside": np.r_[falling[: side - rank], np.full(rank, falling[-rank])],
        "repeated across": np.r_[falling[: side - 2 * rank], np.full(2 * rank, falling[-rank])],
        "all equal": np.ones(side),
        "within 10 %": np.r_[np.geomspace(1, 1e-3, side - rank), 1e-4 * (1 + 0.1 * rng.random(rank))],
        "one tiny": np.r_[falling[:-1], 1e-9],
        "one huge": np.r_[1e3, falling[1:]],
        "rank-deficient": np.r_[falling[: side - rank - 3], np.zeros(rank + 3)],
        "one zero": np.r_[falling[:-1], 0.0],
    }


@pytest.mark.parametrize("rank", [1, 16])
@pytest.mark.parametrize(("out", "columns"), SEARCHED)
def test_every_spectrum_is_searched_or_falls_back(precision, out, columns, rank):
    """The energy is the least, and the projector that of numpy's SVD where σ tells the subspace apart by 1 %."""
    report = []
    for name, sigma in spectra(min(out, columns), rank, np.random.default_rng(3)).items():
        weight = with_spectrum(out, columns, sigma)
        U, exact, _ = np.linalg.svd(weight.numpy(), full_matrices=False)
        found = subspace.find_minor(weight, rank)
        rounding = 4 * np.finfo(np.float32).eps * np.linalg.norm(exact) * rank**0.5
        least = float(np.linalg.norm(exact[-rank:]))
        assert skew(found.B) < 1e-6
        assert energy(weight, found.B) <= 1.001 * least + rounding, f"{name}: {energy(weight, found.B)} for {least}"
        assert found.least <= least * (1 + 1e-6) + 1e-12, f"{name}: a bound of {found.least} above the least, {least}"
        told_apart = is_unique(exact, rank, tall=out > columns)
        distance = apart(found.B, U[:, -rank:]) if told_apart else 0.0
        assert distance < 1e-4, f"{name}: {distance:.1e}"
        assert np.allclose(found.sigma.numpy(), exact[-rank:], rtol=1e-5, atol=2e-8 * exact[0])
        report.append((name, found.path, distance, found.ratio - 1))
    for name, path, distance, beyond in report:
        print(
            f"{out} x {columns}, rank {rank}, {name}: {path}, distance {distance:.1e}, proved energy 1 + {beyond:.1e}"
        )
    unproved = {name for name, path, *_ in report if path == "fallback"}
    float64_cannot = {"geometric 1e6", "geometric 1e8", "one tiny"}  # residuals of G are rounded at 1e-16
    assert unproved <= float64_cannot | ({"rank-deficient", "one zero"} if out > columns else set()), unproved


@pytest.mark.parametrize(("out", "columns"), SEARCHED)
def test_fp32_factors_are_proved_as_well(monkeypatch, out, columns):
    """As sides from `SINGLE` on take them: at this size for a condition of 100, else float64 is next."""
    monkeypatch.setattr(subspace, "SINGLE", subspace.DENSE)
    for condition, path in ((1e2, "float32"), (1e6, "float64")):
        weight = with_spectrum(out, columns, np.geomspace(1, 1 / condition, min(out, columns)))
        found = subspace.find_minor(weight, 16)
        U = np.linalg.svd(weight.numpy(), full_matrices=False)[0]
        assert found.path == path and found.ratio < 1.001
        assert apart(found.B, U[:, -16:]) < 1e-6, f"{apart(found.B, U[:, -16:]):.1e}"


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    side=st.one_of(st.integers(1, 60), st.integers(256, 320)),  # by SVD, and searched for
    longer=st.integers(0, 200),
    tall=st.booleans(),
    share=st.floats(0.0, 1.0),
    fall=st.floats(0.0, 6.0),
    equal=st.integers(0, 40),
    zeros=st.integers(0, 3),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    seed=st.integers(0, 2**20),
    fp32_first=st.booleans(),
)
def test_any_shape_rank_and_spectrum(side, longer, tall, share, fall, equal, zeros, scale, seed, fp32_first):
    """Orthonormal, the energy least, σ in order; the projector wherever σ tells it apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subspace, "SINGLE", subspace.DENSE if fp32_first else subspace.SINGLE)
        _check(side, longer, tall, share, fall, equal, zeros, scale, seed)


def _check(side, longer, tall, share, fall, equal, zeros, scale, seed):
    out, columns = (side + longer, side) if tall else (side, side + longer)
    rank = max(1, round(share**2 * side))  # small ranks more often, as they are searched
    sigma = np.geomspace(1, 10**-fall, side)
    sigma[-equal:] = sigma[-equal] if equal and equal <= side else sigma[-equal:]
    sigma[side - min(zeros, side - 1) :] = 0
    weight = with_spectrum(out, columns, sigma, seed) * scale
    U, exact, _ = np.linalg.svd(weight.numpy(), full_matrices=False)
    B = subspace.minor_subspace(weight, rank)
    assert B.shape == (out, rank) and B.dtype == torch.float32 and skew(B) < 1e-6
    rounding = 4 * np.finfo(np.float32).eps * np.linalg.norm(exact) * rank**0.5
    assert energy(weight, B) <= 1.001 * np.linalg.norm(exact[-rank:]) + rounding
    gains = (weight.double().T @ B.double()).norm(dim=0).numpy()
    assert np.allclose(gains, exact[-rank:], rtol=1e-3, atol=rounding)
    if rank < side and is_unique(exact, rank, tall):
        assert apart(B, U[:, -rank:]) < 1e-4


@pytest.mark.parametrize(("out", "columns"), SEARCHED)
@pytest.mark.parametrize("along", [0, 1])
def test_outlier_rows_and_columns(out, columns, along):
    """1e3 times the others, which fp32 factors do not survive and float64 does."""
    weight = torch.from_numpy(np.random.default_rng(4).standard_normal((out, columns)))
    weight.select(along, 5).mul_(1e3)
    weight.select(along, 77).mul_(1e3)
    found = subspace.find_minor(weight, 16)
    U = np.linalg.svd(weight.numpy(), full_matrices=False)[0]
    assert found.path == "float64" and apart(found.B, U[:, -16:]) < 1e-6


@pytest.mark.parametrize(("out", "columns"), SEARCHED)
def test_zero_weights_scales_and_rows(out, columns):
    """A weight of zeros has any basis; 1e±12 times a weight has the same one; and so has one that is read by rows."""
    zero = subspace.find_minor(torch.zeros(out, columns), 16)
    assert skew(zero.B) < 1e-6 and zero.energy == 0 and zero.ratio == 1 and zero.B.shape == (out, 16)
    weight = with_spectrum(out, columns, np.geomspace(1, 1e-3, min(out, columns))).float()
    B = subspace.minor_subspace(weight, 16)
    for scale in (1e-12, 1e12):
        assert apart(subspace.minor_subspace(weight * scale, 16), B.double().numpy()) < 1e-6

    class ByRows:
        shape = (out, columns)

        def rows(self, start, stop):
            return weight[start:stop]

    assert torch.equal(subspace.minor_subspace(ByRows(), 16), B)


def test_what_is_not_proved_is_counted_and_logged(caplog):
    """A tall weight whose columns are dependent: its left vectors for σ = 0 are no image of anything."""
    weight = with_spectrum(400, 260, np.r_[np.ones(240), np.zeros(20)])
    with caplog.at_level(logging.INFO, logger="qmica.subspace"):
        found = subspace.find_minor(weight, 16)
    assert found.path == "fallback" and energy(weight, found.B) < 1e-5
    assert caplog.messages == ["a 400 x 260 weight, rank 16: proved in no precision, a float64 SVD is taken"]


def planted(weight: torch.Tensor, rank: int, place: int, by: str, seed: int) -> torch.Tensor:
    """The right B (out, rank) with one column swapped: for the next larger singular vector, or for a random direction
    outside of it.
    """
    U = np.linalg.svd(weight.numpy(), full_matrices=False)[0]
    B = U[:, -rank:].copy()
    noise = np.random.default_rng(seed).standard_normal(len(U))
    noise -= B @ (B.T @ noise)
    B[:, place] = U[:, -rank - 1] if by == "neighbour" else noise / np.linalg.norm(noise)
    return torch.from_numpy(B).float()


def test_planted_wrong_bases_are_rejected(precision):
    """100 of 100, one direction wrong each. All have exact Ritz values of their own, and half are singular vectors."""
    rejected = accepted = 0
    for number, by in enumerate(["neighbour", "random"] * 50):
        out, columns = SEARCHED[number % 3]
        weight = with_spectrum(out, columns, np.geomspace(1, 10 ** -(1 + number % 4), min(out, columns)), number)
        wrong = planted(weight, 8, number % 8, by, number)
        rejected += not subspace.accepts(weight, wrong)
        accepted += subspace.accepts(weight, subspace.minor_subspace(weight, 8))
    print(f"{precision}: planted wrong bases rejected: {rejected} of 100; right ones accepted: {accepted} of 100")
    assert (rejected, accepted) == (100, 100)


def test_a_basis_that_is_not_orthonormal_is_rejected():
    weight = with_spectrum(256, 256, np.geomspace(1, 0.01, 256))
    B = subspace.minor_subspace(weight, 8)
    assert subspace.accepts(weight, B) and not subspace.accepts(weight, B * 0.9999)


@pytest.mark.parametrize(("out", "columns"), SEARCHED)
def test_ritz_values_alone_prove_nothing(out, columns):
    """Exact eigenpairs without the smallest one: no residual, and no proof, as the factor does not exist."""
    weight = with_spectrum(out, columns, np.geomspace(1, 0.01, min(out, columns)))
    gram = Gram(weight)
    scaled = weight.numpy() * gram.scale
    levels, vectors = np.linalg.eigh(scaled @ scaled.T if gram.wide else scaled.T @ scaled)
    for missing, proved in ((None, True), (0, False), (3, False)):
        kept = [place for place in range(25) if place != missing][:24]
        pairs = subspace._first_pairs(gram, torch.from_numpy(vectors[:, kept].copy()))
        assert float(pairs.R.norm()) < 1e-12 and np.allclose(pairs.sigma**2, levels[kept])
        mu = subspace._between(float(levels[kept[15]]), float(levels[kept[-1]]), 0.5)
        deflated = subspace._Deflated.of(gram.matrix(torch.float64), pairs.V, (mu,), float(levels[kept[-1]]))
        B = subspace._left_vectors(gram, pairs, 16)
        least = subspace._proved_least(gram, pairs, deflated, B, subspace._energy(gram, B))
        truth = np.sqrt(levels[:16].sum())
        assert (0.999 * truth < least <= truth * (1 + 1e-9)) == proved, f"{least} of {truth}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("damage", [0.0, 1e-3])
def test_the_error_of_a_factor_is_measured(dtype, damage):
    """The probes find what a factor is off by, its own rounding or a damaged entry, within a factor of 20."""
    weight = with_spectrum(256, 256, np.geomspace(1, 0.01, 256))
    gram = Gram(weight)
    matrix = gram.matrix(dtype)
    V = torch.linalg.qr(torch.randn(256, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q.to(
        dtype
    )
    deflated = subspace._Deflated.of(matrix, V, (-0.1,), 1.0)
    deflated.L[100, 50] += damage
    for _ in range(subspace.PROBE_STEPS):
        deflated.probe(gram.back(gram.image(deflated.kept)))
    scaled, L, basis = weight * gram.scale, deflated.L.double(), V.double()
    N = scaled @ scaled.T + deflated.tau * basis @ basis.T + 0.1 * torch.eye(256, dtype=torch.float64)
    truth = float(torch.linalg.matrix_norm(N - L @ L.T, 2))
    assert truth <= deflated.error <= 20 * truth, f"{deflated.error:.1e} for {truth:.1e}"
    before = deflated.error
    for _ in range(6):
        deflated.probe(gram.back(gram.image(deflated.kept)))
    assert truth <= deflated.error < before and deflated.error < 4 * truth, "more steps see more"


def test_the_lower_bound_of_an_eigenvalue():
    """`_below` against the eigenvalues of 200 random matrices in blocks."""
    rng, closest = np.random.default_rng(5), np.inf
    for _ in range(200):
        rest = rng.uniform(0.5, 2)
        levels = np.sort(rng.uniform(0, 1.5, 4))
        E = rng.standard_normal((12, 4)) * rng.uniform(0, 0.3)
        C = np.diag(np.r_[rest, rng.uniform(rest, 3, 11)])
        truth = np.linalg.eigvalsh(np.block([[np.diag(levels), E.T], [E, C]]))[:4]
        bound = subspace._below(torch.from_numpy(levels), float(np.linalg.norm(E, 2)), rest).numpy()
        assert (bound <= truth + 1e-12).all(), f"{bound} above {truth}"
        closest = min(closest, float((truth - bound).min()))
    assert closest < 1e-2, "a bound that is never near proves nothing"


def searched_in_fp32(monkeypatch):
    monkeypatch.setattr(subspace, "SINGLE", subspace.DENSE)
    weight = with_spectrum(256, 256, np.geomspace(1, 0.1, 256))
    assert subspace.find_minor(weight, 4).path == "float32"


def test_the_precision_of_products_is_put_back(monkeypatch):
    """Also where a caller has used torch's newer switch, after which the older one cannot be read."""
    matmul = torch.backends.cuda.matmul
    seen, real = [], subspace._search
    monkeypatch.setattr(subspace, "_search", lambda *rest: [seen.append(matmul.fp32_precision), real(*rest)][1])
    torch.set_float32_matmul_precision("high")
    try:
        searched_in_fp32(monkeypatch)
        assert torch.get_float32_matmul_precision() == "high" and seen == ["ieee"]
        matmul.fp32_precision = "tf32"
        searched_in_fp32(monkeypatch)
        assert matmul.fp32_precision == "tf32" and seen == ["ieee", "ieee"]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_factor_that_overflows_is_tried_again(monkeypatch):
    monkeypatch.setattr(subspace, "SINGLE", subspace.DENSE)
    real = subspace._search

    def overflow(gram, rank, dtype):
        return torch.linalg.eigh(torch.full((3, 3), torch.nan)) if dtype == torch.float32 else real(gram, rank, dtype)

    monkeypatch.setattr(subspace, "_search", overflow)
    assert subspace.find_minor(with_spectrum(256, 256, np.geomspace(1, 0.1, 256)), 4).path == "float64"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_odd_tensors(dtype):
    """16 bits, a transposed view, one that wants a gradient, and one beyond fp32's range."""
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    B = subspace.minor_subspace(weight, 8)
    exact = B.double().numpy()
    wanted = torch.nn.Parameter(weight.float())
    assert apart(subspace.minor_subspace(weight.T.contiguous().T, 8), exact) < 1e-6
    for found in (subspace.minor_subspace(wanted, 8), subspace.major_subspace(wanted, 8)):
        assert not found.requires_grad
    assert apart(subspace.minor_subspace(weight.double() * 1e300, 8), exact) < 1e-6


@pytest.mark.parametrize("rank", [4, 16])
def test_a_tall_weight_with_one_tiny_singular_value(precision, rank):
    """Left vectors of a tall weight are images: what is missing from a right one grows by σ_j / σ_1 in them."""
    for smallest in (1e-5, 1e-6, 1e-7):
        weight = with_spectrum(400, 260, np.r_[np.geomspace(1, 0.02, 259), smallest])
        U = np.linalg.svd(weight.numpy(), full_matrices=False)[0]
        distance = apart(subspace.minor_subspace(weight, rank), U[:, -rank:])
        assert distance < 1e-4, f"σ = {smallest:.0e}: {distance:.1e}"


def test_every_smaller_rank_is_minor_too(precision):
    """What a cache relies on: on a tall weight whose tail falls by 1e5 within the rank."""
    weight = with_spectrum(420, 400, np.r_[np.geomspace(1, 0.1, 336), np.geomspace(0.09, 1e-6, 64)])
    U, sigma, _ = np.linalg.svd(weight.numpy(), full_matrices=False)
    B = subspace.minor_subspace(weight, 64)
    for rank in (1, 4, 16, 32, 63):
        rounding = 4 * np.finfo(np.float32).eps * np.linalg.norm(sigma) * rank**0.5
        assert energy(weight, B[:, -rank:]) <= 1.001 * np.linalg.norm(sigma[-rank:]) + rounding
        assert apart(B[:, -rank:], U[:, -rank:]) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(("out", "columns"), [(2048, 2048), (2048, 5504), (5504, 2048)])
def test_on_a_gpu(out, columns):
    """fp32 factors without TF32, whatever the caller has set."""
    torch.set_float32_matmul_precision("high")
    try:
        weight = torch.randn(out, columns, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        found = subspace.find_minor(weight, 16)
    finally:
        torch.set_float32_matmul_precision("highest")
    U = np.linalg.svd(weight.double().cpu().numpy(), full_matrices=False)[0]
    assert found.B.is_cuda and found.path == "float32" and found.ratio < 1.001
    assert apart(found.B.cpu(), U[:, -16:]) < 1e-4, f"{apart(found.B.cpu(), U[:, -16:]):.1e}"

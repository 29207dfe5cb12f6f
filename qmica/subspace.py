"""Minor subspaces: the only mathematics of MiCA (arXiv 2604.01694), with a proof for each.

What: for W (out x in) with the thin SVD W = U S Vᵀ, B is the last `rank` columns of U, the left singular vectors of the
smallest singular values, in descending order of σ (the definition of PEFT's `tuners/lora/layer.py::mica_init`). For a
tall W those are not its null space: that is the definition of the field, and it is kept.

How, for sides of `DENSE` and more (an SVD below that, and for ranks above a sixth of the side):

1. The Gram matrix G of the smaller side, in fp32 for large weights, and its Cholesky factor with a tiny shift.
2. Block inverse Lanczos with a few more columns than the rank. Where the small end is not isolated, as in tall and wide
   weights, G is factored again with a shift just below its smallest eigenvalue (at 11008 x 4096 12 blocks for 24).
3. A third factor, of N = G + τ V Vᵀ − μ I with μ above the wanted eigenvalues, serves twice. It corrects the vectors
   (block Davidson with the last directions, as in LOBPCG; the residuals come from W itself in float64, so that the
   rounding of G is only a slow-down), and it proves them.
4. Rayleigh-Ritz on W itself.

The proof: that N has a Cholesky factor means that no direction outside of V has less than μ of energy (the inertia of
the shifted matrix), whatever way V was found. How far L Lᵀ is from N is measured by probes, not assumed. With the
residuals this bounds the least possible energy from below, and B is accepted when it has at most 1.001 times that.
What is not accepted in fp32 is done again in float64, and after that by a float64 SVD, which is counted and logged.

What it gives up: fp32 fails early where columns are 1000 times the others, and the second try costs twice as much
again; a tall weight with dependent columns always takes the SVD, as its left vectors for σ = 0 are images of nothing.
"""

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from qmica.errors import QmicaError
from qmica.gram import Gram, RowBlocks, add_lower, tiles

log = logging.getLogger(__name__)

DENSE = 256  # sides below it: an SVD takes 24 ms for 192 x 576, the search 42
BLOCKS = 6  # and where the side is not this many times the rank, too few blocks of vectors have room in it
SINGLE = 1536  # sides from here on try fp32 first; below, float64 costs as little and is accepted at once
SLACK = 4 * torch.finfo(torch.float32).eps  # of ‖W‖_F √rank: what rounding B to fp32 can add to its energy
RATIO = 1.001  # energy of an accepted B over the least possible
SKEW = 1e-5  # max |BᵀB − I| of an accepted B
GAP = 0.02  # of λ: two singular values 1 % apart must be told apart,
ANGLE = 5e-5  # to this sine of the angle between the found subspace and the true one
GOOD, DEPTH = 0.01, 24  # of Lanczos: the sine of an angle that is good enough, and the most blocks
ZERO = 1e-12  # of ‖W‖_F: a singular value of zero, as float64 finds it
ROWS = 16384  # of an image at once
STEPS = 16  # of Davidson; 2 to 5 are usual
PART = 0.3  # of the way from the wanted eigenvalues to the last one: μ
# Of the power method on a factor's error: random probes, the steps that every search takes and the most it takes, and
# the square of what the probes have at least of the worst direction, save with a probability of 3e-7 (χ², 8 degrees).
PROBES, PROBE_STEPS, MOST_PROBE_STEPS, PROBED = 8, 2, 8, 0.1


@dataclass(frozen=True)
class Found:
    """A minor subspace with its proof, in the weight's own units.

    B: (out, rank) fp32, σ descending; sigma: (rank,) float64, the singular values; energy: ‖BᵀW‖_F; least: what no
    orthonormal B is below, by the proof; path: float32, float64, svd (small sides, large ranks) or fallback (an SVD
    after neither precision was proved).
    """

    B: torch.Tensor
    sigma: torch.Tensor
    energy: float
    least: float
    path: str

    @property
    def ratio(self) -> float:
        """The energy is at most this times the least possible; infinite where only rounding can be told from zero."""
        if self.energy <= self.least:
            return 1.0
        return self.energy / self.least if self.least > 0 else math.inf


def minor_subspace(weight: torch.Tensor | RowBlocks, rank: int, device: torch.device | None = None) -> torch.Tensor:
    """B (out, rank) in fp32: the left singular vectors of the `rank` smallest singular values of weight (out, in), σ
    descending.

    Raises QmicaError where rank is not in 1 … min(out, in), or the weight holds NaN or infinity.
    """
    return find_minor(weight, rank, device).B


def major_subspace(weight: torch.Tensor | RowBlocks, rank: int, device: torch.device | None = None) -> torch.Tensor:
    """B (out, rank) in fp32: the left singular vectors of the `rank` largest singular values, σ descending."""
    require_rank(rank, *weight.shape)
    gram = Gram(weight, device)
    if gram.side < BLOCKS * rank:
        return _finished(_svd(gram.whole(), slice(rank))[0])
    vectors = torch.linalg.eigh(gram.matrix(torch.float64)).eigenvectors.flip(1)[:, :rank]
    return _finished(vectors if gram.wide else torch.linalg.qr(gram.image(vectors)).Q)


def random_subspace(
    weight: torch.Tensor | RowBlocks, rank: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """B (out, rank) in fp32: an orthonormal basis of a uniformly random subspace."""
    require_rank(rank, *weight.shape)
    device = Gram(weight).device
    noise = torch.randn(weight.shape[0], rank, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(noise).Q.float().to(device)


def find_minor(weight: torch.Tensor | RowBlocks, rank: int, device: torch.device | None = None) -> Found:
    """The minor subspace of weight (out, in) with its proof; arguments and errors as `minor_subspace`."""
    require_rank(rank, *weight.shape)
    gram = Gram(weight, device)
    if gram.norm == 0:
        B = torch.eye(gram.shape[0], gram.side, device=gram.device)[:, -rank:].contiguous()
        return Found(B, torch.zeros(rank, dtype=torch.float64, device=gram.device), 0.0, 0.0, "svd")
    if gram.side < max(DENSE, BLOCKS * rank):
        return _by_svd(gram, rank, "svd")
    for dtype in (torch.float32, torch.float64)[gram.side < SINGLE :]:
        found = None
        with _full_precision(dtype), contextlib.suppress(torch.linalg.LinAlgError):  # of overflow in a factor
            found = _search(gram, rank, dtype)
        if found is not None:
            return found
        log.debug("a %d x %d weight, rank %d: not proved in %s", *gram.shape, rank, dtype)
    log.info("a %d x %d weight, rank %d: proved in no precision, a float64 SVD is taken", *gram.shape, rank)
    return _by_svd(gram, rank, "fallback")


def accepts(weight: torch.Tensor | RowBlocks, B: torch.Tensor) -> bool:
    """Whether B (out, rank), however it was found, is a minor subspace of weight: orthonormal to 1e-5, and of at most
    1.001 times the energy that is proved to be the least possible (plus what fp32 rounds).
    """
    gram = Gram(weight, B.device)
    return _accepted(gram, B, _energy(gram, B), find_minor(weight, B.shape[1], B.device).least * gram.scale)


def require_rank(rank: int, out: int, columns: int) -> None:
    """Raise QmicaError where a weight (out, columns) has fewer than `rank` singular vectors."""
    smallest = min(out, columns)
    if not 1 <= rank <= smallest:
        raise QmicaError(f"rank {rank} does not fit a {out} x {columns} weight: choose 1 to {smallest}")


@contextlib.contextmanager
def _full_precision(dtype: torch.dtype) -> Iterator[None]:
    """No TF32 on CUDA, no bf16 on CPUs in fp32 products; float64 needs nothing, and may run on several threads. By
    backend, where torch has that (2.9): its older switch refuses to be read once the newer one was used.
    """
    switches = [
        backend for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul) if dtype == torch.float32
    ]
    if not all(hasattr(backend, "fp32_precision") for backend in switches):
        torch.backends.cuda.matmul.allow_tf32, switches = False, []
    before = [backend.fp32_precision for backend in switches]
    try:
        for backend in switches:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(switches, before, strict=True):
            backend.fp32_precision = precision


def _finished(vectors: torch.Tensor) -> torch.Tensor:
    """fp32, each column with its largest entry positive: which of u and -u a solver returns is chance, and this makes
    two runs on one machine write equal files.
    """
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    return (vectors * torch.where(largest < 0, -1.0, 1.0)).float().contiguous()


# ---- by SVD


def _by_svd(gram: Gram, rank: int, path: str) -> Found:
    vectors, sigma = _svd(gram.whole(), slice(-rank, None))
    B = _finished(vectors)
    return _found(gram, B, sigma, _energy(gram, B), float(sigma.norm()), path)


def _found(gram: Gram, B: torch.Tensor, sigma: torch.Tensor, energy: float, least: float, path: str) -> Found:
    """From the scaled weight's units to the weight's own."""
    return Found(B, sigma / gram.scale, energy / gram.scale, least / gram.scale, path)


def _svd(weight: torch.Tensor, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Some columns of U (out, min(out, in)) and their σ, of the thin SVD of a float64 weight; a tall one is reduced by
    QR first, whose Q is applied and never formed.
    """
    out, side = weight.shape
    if out <= side:
        U, sigma, _ = torch.linalg.svd(weight, full_matrices=False)
        return U[:, columns], sigma[columns]
    reflectors, factors = torch.geqrf(weight)
    U, sigma, _ = torch.linalg.svd(reflectors[:side].triu())
    padded = torch.nn.functional.pad(U[:, columns], (0, 0, 0, out - side))
    return torch.ormqr(reflectors, factors, padded), sigma[columns]


# ---- by search and proof


@dataclass(frozen=True)
class _Pairs:
    """Ritz pairs of G, σ ascending. V: (side, n) orthonormal; T: (length, n), its image; sigma: (n,); R: (side, n),
    the residuals G V − V σ².
    """

    V: torch.Tensor
    T: torch.Tensor
    sigma: torch.Tensor
    R: torch.Tensor


def _search(gram: Gram, rank: int, dtype: torch.dtype) -> Found | None:
    """The minor subspace by factors in `dtype`, or None where it could not be proved."""
    matrix = gram.matrix(dtype)
    start = _inverse_lanczos(matrix, rank, rank + max(8, rank // 2))
    if start is None:
        return None
    V, levels = start
    # μ is between the wanted eigenvalues and the last one found: N must be positive definite though the last vectors
    # are rough, a μ far above λ_1 slows the correction, and one near the wanted ones leaves the factor's error little
    # room. Where something below it is left out, a smaller μ still corrects the vectors.
    wanted, last = float(levels[rank - 1]), float(levels[-1])
    deflated = _Deflated.of(matrix, V, (_between(wanted, last, PART), 0.95 * wanted, 0.8 * wanted, 0.4 * wanted), last)
    del matrix  # 67 MB at a side of 4096; made again in the rare case below
    pairs = _corrected(gram, V, rank, deflated)
    if not _converged(gram, pairs, rank):
        return None
    B = _left_vectors(gram, pairs, rank)
    energy = _energy(gram, B)
    least = _proved_least(gram, pairs, deflated, B, energy)
    if not _accepted(gram, B, energy, least):
        del deflated  # the vectors have moved too far from those that it deflates
        last = float(pairs.sigma[-1] ** 2)
        deflated = _Deflated.of(gram.matrix(dtype), pairs.V, (_between(wanted, last, 0.5),), last)
        least = _proved_least(gram, pairs, deflated, B, energy)
    if not _accepted(gram, B, energy, least):
        return None
    return _found(gram, B, pairs.sigma[:rank].flip(0), energy, least, str(dtype).removeprefix("torch."))


def _between(wanted: float, last: float, part: float) -> float:
    """A shift `part` of the way from just below the wanted eigenvalues to the last one that was found: where all are
    equal it is still below them, by so little that it proves 1.0005 of the least energy.
    """
    return (1 - part) * 0.999 * wanted + part * last


def _corrected(gram: Gram, V: torch.Tensor, rank: int, deflated: "_Deflated | None") -> _Pairs:
    """The Ritz pairs after Davidson's steps; the first steps are also those of the probes. None: without steps, as
    where the energy is all rounding.
    """
    pairs, directions = _first_pairs(gram, torch.linalg.qr(V.double()).Q), None
    for step in range(STEPS if deflated is not None else 0):
        if step >= PROBE_STEPS and _converged(gram, pairs, rank):
            break
        pairs, directions = _davidson(gram, pairs, deflated, directions)
    return pairs


def _converged(gram: Gram, pairs: _Pairs, rank: int) -> bool:
    """Whether the residuals hold the subspace of every rank up to this one to `ANGLE`, or its singular values are zero:
    a B of this rank serves smaller ones.

    By the sin Θ theorem of Davis and Kahan, ‖R‖ / gap for the vectors of G. The left vectors of a tall weight are their
    images, whose angle is σ_j / σ_i times as large: ‖R / σ‖ σ_(r+1) / gap. A condition above some 1e6 leaves residuals
    that are too large: float64's rounding of G.
    """
    levels = pairs.sigma**2
    above = torch.cat([levels, levels[-1:]])[1 : rank + 1]
    wanted, residuals = levels[:rank], pairs.R[:, :rank].norm(dim=0)
    gaps = torch.maximum(above - wanted, GAP * wanted)
    if not gram.wide:
        residuals, gaps = residuals / pairs.sigma[:rank].clamp_min(ZERO * gram.norm), gaps / above.sqrt()
    held = residuals.square().cumsum(0).sqrt() <= ANGLE * gaps
    return bool((held | (wanted <= (ZERO * gram.norm) ** 2)).all())


def _first_pairs(gram: Gram, V: torch.Tensor) -> _Pairs:
    """Rayleigh-Ritz on the span of V (side, n), orthonormal in float64."""
    V, T, sigma = _rayleigh_ritz([V], [gram.image(V)])
    return _Pairs(V, T, sigma, gram.back(T) - V * sigma**2)


def _rayleigh_ritz(S: list[torch.Tensor], T: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The smallest Ritz vectors in the span of all of S, as many as the first of them has columns, their images and σ
    ascending. S: parts (side, m) of an orthonormal basis, T: their images, which are never laid side by side: of an
    lm_head (128256 x 4096) each has 25 MB and more.
    """
    n = S[0].shape[1]
    _, sigma, Zt = torch.linalg.svd(_triangle(T).cpu())  # small: a GPU is slower at it
    Z = Zt.to(S[0].device).T.flip(1)[:, :n]
    parts = Z.split([part.shape[1] for part in S])
    return _combined(S, parts), _combined(T, parts), sigma.to(S[0].device).flip(0)[:n]


def _triangle(T: list[torch.Tensor]) -> torch.Tensor:
    """R of the QR of all of T, by blocks of rows: the singular values are those of T, and none is squared."""
    R = T[0].new_zeros(0, sum(part.shape[1] for part in T))
    for start in range(0, len(T[0]), ROWS):
        rows = torch.cat([part[start : start + ROWS] for part in T], 1)
        R = torch.linalg.qr(torch.cat([R, rows]), mode="r").R
    return R


def _combined(parts: list[torch.Tensor], coefficients: Iterable[torch.Tensor]) -> torch.Tensor:
    """The sum of parts times coefficients."""
    first, *others = zip(parts, coefficients, strict=True)
    combined = first[0] @ first[1]
    for part, weights in others:
        combined.addmm_(part, weights)
    return combined


def _davidson(
    gram: Gram, pairs: _Pairs, deflated: "_Deflated", directions: torch.Tensor | None
) -> tuple[_Pairs, torch.Tensor]:
    """One correction by N⁻¹ R and the last step's directions (Knyazev's LOBPCG, doi 10.1137/S1064827500366124), and
    one step of the probes in the same two walks over the weight. Returns the pairs and this step's directions.
    """
    V, n = pairs.V, pairs.V.shape[1]
    new = deflated.solve(pairs.R)
    new = new if directions is None else torch.cat([new, directions], 1)
    new = _orthonormal_beside(V, new)
    image, probed = gram.image(torch.cat([new, deflated.probes], 1)).tensor_split([new.shape[1]], 1)
    better, T, sigma = _rayleigh_ritz([V, new], [pairs.T, image])
    together = torch.cat([T.T, probed.T]).T  # laid out as `back` wants it, which would copy 33 MB of an lm_head
    del image, probed
    product, probed = gram.back(together).tensor_split([n], 1)
    deflated.probe(probed)
    return _Pairs(better, T, sigma, product - better * sigma**2), better - V @ (V.T @ better)


def _orthonormal_beside(V: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis of what `new` adds to the orthonormal V. QR blows up what rounding left of V in columns that
    lie nearly in it, so V is taken out again; what is below √eps then changes lengths and angles by eps.
    """
    enough = torch.finfo(V.dtype).eps ** 0.5
    for _ in range(4):
        new = torch.linalg.qr(new - V @ (V.T @ new)).Q
        left = V.T @ new
        if float(left.abs().max()) < enough:
            break
    return new - V @ left


def _left_vectors(gram: Gram, pairs: _Pairs, rank: int) -> torch.Tensor:
    """B (out, rank) in fp32, σ descending, of the first pairs. Of a tall weight B is the images' directions: by QR, as
    division by σ leaves max |BᵀB − I| at 1e-5 at a condition of 9e5, QR at 1e-15, and makes a basis where σ is 0.
    """
    if gram.wide:
        return _finished(pairs.V[:, :rank].flip(1))
    Q, R = torch.linalg.qr(pairs.T[:, :rank])
    return _finished(Q @ torch.linalg.svd(R.cpu()).U.to(Q.device))


# ---- factors


def _factor(matrix: torch.Tensor, shifts: Iterable[float]) -> tuple[torch.Tensor, float] | None:
    """L with L Lᵀ = matrix − shift I for the first of the shifts that leaves it positive definite, and that shift."""
    diagonal = matrix.diagonal()
    before = diagonal.clone()  # shifted in place: a second copy of G would be the largest thing in memory
    try:
        for shift in shifts:
            torch.sub(before, shift, out=diagonal)
            L, failed = torch.linalg.cholesky_ex(matrix)
            if not failed:
                return L, shift
        return None
    finally:
        diagonal.copy_(before)


def _solve(L: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """(L Lᵀ)⁻¹ X; two triangular solves take 0.034 s at 4096 x 24 where `cholesky_solve` takes 0.099."""
    return torch.linalg.solve_triangular(L.T, torch.linalg.solve_triangular(L, X, upper=False), upper=True)


def _inverse_lanczos(matrix: torch.Tensor, rank: int, n: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """About the n smallest eigenvectors of G (side, n) in its dtype, the first `rank` of them good, and their
    eigenvalues ascending; None where no tiny shift makes a Cholesky factor.
    """
    mean = float(matrix.diagonal().mean())
    tiny = torch.finfo(matrix.dtype).eps * mean
    shifts = [-tiny * 16**power for power in range(5)]
    found = _factor(matrix, shifts)
    if found is None:
        return None
    noise = torch.randn(len(matrix), n, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    V, levels, good = _lanczos(*found, noise.to(matrix.device), rank, 4)
    if not good and levels[0] > 0.3 * levels[-1]:
        # The small end is not isolated (a Marchenko-Pastur edge, where tall and wide weights end): a shift just below
        # it tells more apart. λ_1 as found is 5 % too large at 4096 x 11008. Two factors at once would be too large.
        del found
        found = _factor(matrix, [*(part * float(levels[0]) for part in (0.9, 0.8, 0.6)), *shifts])
    if not good:
        V, levels, _ = _lanczos(*found, V, rank, DEPTH)
    return V, levels


def _lanczos(
    L: torch.Tensor, shift: float, start: torch.Tensor, rank: int, most: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Block Lanczos for the largest eigenvalues of (L Lᵀ)⁻¹ from start (side, n): vectors (side, n), their eigenvalues
    of L Lᵀ + shift, ascending, and whether the first `rank` are within `GOOD` of their space, by residual over gap.

    Ends there, or with `most` blocks. The vectors are one more application of the inverse than the Krylov space holds:
    that takes the rounding of the orthogonalisation out of them (residuals of 0.5 wanted eigenvalues for 20, at 4096 x
    4096).
    """
    block, (side, n) = torch.linalg.qr(start).Q, start.shape
    basis, solved, most = block, _solve(L, block), max(min(most, side // (2 * n)), 1)
    for depth in range(1, most + 1):
        if depth in (4, 8, 16) or depth == most:
            inverse, Z = _projected(basis, solved, n)
            vectors = solved @ Z
            off = vectors - basis @ (basis.T @ vectors)
            good = float(off[:, :rank].norm()) < GOOD * float(inverse[rank - 1] - inverse[-1])
            if good or depth == most:
                return torch.linalg.qr(vectors).Q, (1 / inverse + shift).to(L.device), good
        block = _orthonormal_beside(basis, solved[:, -n:])
        basis, solved = torch.cat([basis, block], 1), torch.cat([solved, _solve(L, block)], 1)


def _projected(basis: torch.Tensor, solved: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n largest eigenvalues, descending, of an operator in a basis, and the vectors' coefficients; solved: the
    operator times the basis.
    """
    small = (basis.T @ solved).double().cpu()
    values, Z = torch.linalg.eigh((small + small.T) / 2)
    return values.flip(0)[:n], Z.flip(1)[:, :n].to(basis)


# ---- the proof


class _Deflated:
    """The Cholesky factor L of N = G + τ V Vᵀ − μ I, and how far L Lᵀ is from N."""

    def __init__(self, L: torch.Tensor, V: torch.Tensor, mu: float, tau: float):
        self.L, self.V, self.mu, self.tau = L, V.double(), mu, tau
        noise = torch.randn(len(L), PROBES, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        self.kept = torch.linalg.qr(noise.to(L.device)).Q
        self.seen, self.error, self.steps = 0.0, math.inf, 0

    @classmethod
    def of(cls, matrix: torch.Tensor, V: torch.Tensor, mus: Iterable[float], last: float) -> "_Deflated | None":
        """From the lower triangle of G, which is overwritten, V (side, n) orthonormal, and the first of `mus` that
        leaves N positive definite; None where none does. last: V's largest Ritz value.
        """
        tau = 2 * max(last, 0.0)  # enough to lift what is in V above μ, and so little that V may move afterwards
        rounded = V.to(matrix.dtype)
        add_lower(matrix, rounded, rounded, tau)
        found = _factor(matrix, mus)
        return None if found is None else cls(found[0], V, found[1], tau)

    def solve(self, R: torch.Tensor) -> torch.Tensor:
        """N⁻¹ R in float64."""
        return _solve(self.L, R.to(self.L.dtype)).double()

    def probe(self, product: torch.Tensor) -> None:
        """One step of the block power method on L Lᵀ − N. product: G times the probes, from the weight itself; without
        columns nothing is done.

        After j steps from random probes that have g of the worst direction, what they find is at least ‖L Lᵀ − N‖
        (g / √side)^(1/j), as the ratios of a power method's norms do not fall.
        """
        if not product.shape[1]:
            return
        Z = self.kept
        N = product + self.tau * (self.V @ (self.V.T @ Z)) - self.mu * Z
        difference = N - _times_its_transpose(self.L, Z)
        self.steps += 1
        self.seen = float(torch.linalg.matrix_norm(difference, 2))
        self.error = self.seen * (len(Z) / PROBED) ** (0.5 / self.steps)
        self.kept = torch.linalg.qr(difference).Q

    @property
    def probes(self) -> torch.Tensor:
        """What Davidson's steps multiply besides (side, 8); no columns after the steps that every search takes."""
        return self.kept if self.steps < PROBE_STEPS else self.kept[:, :0]

    def floor(self, V: torch.Tensor) -> float:
        """What every unit vector outside of the span of V (side, n) has at least of xᵀ G x.

        N ⪰ −error, so xᵀ G x ≥ μ − error − τ ‖V₀ᵀ x‖², where V₀ is the V that was deflated, and ‖V₀ᵀ x‖ is at most the
        sine of the angle between the two.
        """
        cosine = float(torch.linalg.svdvals((self.V.T @ V).cpu())[-1])
        return self.mu - self.error - self.tau * max(1 - cosine**2, 0.0)


def _times_its_transpose(L: torch.Tensor, Z: torch.Tensor) -> torch.Tensor:
    """L Lᵀ Z in float64 (side, n). By Lᵀ, whose rows lie together: LAPACK stores L by columns, and its tiles took
    six times as long.
    """
    inner, outer = Z.new_zeros(Z.shape[1], len(L)), Z.new_zeros(Z.shape[1], len(L))
    given = Z.T.contiguous()
    for rows, columns, tile in tiles(L.T, upper=True):
        inner[:, rows].addmm_(given[:, columns], tile.T)
    for rows, columns, tile in tiles(L.T, upper=True):
        outer[:, columns].addmm_(inner[:, rows], tile)
    return outer.T


def _below(level: torch.Tensor, coupling: float, rest: float) -> torch.Tensor:
    """What an eigenvalue is at least where V's Ritz value is `level`, V's residual `coupling`, and everything outside
    of V at least `rest`: the smaller eigenvalue of [[level, coupling], [coupling, rest]].

    From the inertia of the Schur complement (Haynsworth): G in the basis [V, V⊥] is [[Θ, Eᵀ], [E, C]], and below
    x < rest it has as many eigenvalues as Θ − x − Eᵀ (C − x)⁻¹ E, which is at least Θ − x − ‖E‖² / (rest − x).
    """
    return (level + rest - ((level - rest) ** 2 + 4 * coupling**2).sqrt()) / 2


def _least_energy(pairs: _Pairs, deflated: _Deflated | None, rank: int) -> float:
    """A lower bound of ‖BᵀW‖_F over all orthonormal B (out, rank): the root of the sum of G's smallest eigenvalues; 0
    where there is no factor.

    In two steps: first that of all but the wanted vectors, whose residuals are larger, then of the wanted ones.
    """
    if deflated is None:
        return 0.0
    levels = pairs.sigma**2
    rest = deflated.floor(pairs.V)
    if len(levels) > rank:
        coupling = float(torch.linalg.matrix_norm(pairs.R[:, rank:], 2))
        rest = float(_below(levels[rank:], coupling, rest).min())
    coupling = float(torch.linalg.matrix_norm(pairs.R[:, :rank], 2))
    return float(_below(levels[:rank], coupling, rest).clamp_min(0).sum().sqrt())


def _proved_least(gram: Gram, pairs: _Pairs, deflated: _Deflated | None, B: torch.Tensor, energy: float) -> float:
    """The bound of `_least_energy`, with more steps of the probes as long as they may make it good enough for B."""
    least = _least_energy(pairs, deflated, B.shape[1])
    while deflated is not None and deflated.steps < MOST_PROBE_STEPS and deflated.seen < deflated.mu / 4:
        if _accepted(gram, B, energy, least):
            break
        deflated.probe(gram.back(gram.image(deflated.kept)))
        least = _least_energy(pairs, deflated, B.shape[1])
    return least


def _energy(gram: Gram, B: torch.Tensor) -> float:
    """‖BᵀW‖_F of the scaled weight for B (out, rank)."""
    return float(gram.coefficients(B).norm())


def _accepted(gram: Gram, B: torch.Tensor, energy: float, least: float) -> bool:
    """Whether B (out, rank) is orthonormal and its energy close enough to the least possible."""
    exact = B.double()
    skew = float((exact.T @ exact - torch.eye(B.shape[1], dtype=exact.dtype, device=B.device)).abs().max())
    return skew <= SKEW and energy <= RATIO * least + SLACK * gram.norm * math.sqrt(B.shape[1])

"""Embeddings: orthonormal frames, Gaussian ones, and the Gram matrix of equation 5.2."""

from __future__ import annotations

import pytest
import torch
from draws import seeded

from hijacklens.errors import InputError
from hijacklens.one_layer import hypercube
from hijacklens.one_layer.embeddings import (
    gaussian_embedding,
    gram_eigenvalues,
    hamming_geometry,
    orthonormal,
)

GEOMETRIES = [
    (1, 0.4, 0.5, 1.0),
    (3, 1.0, 2.0, 2.5),
    (5, 0.1, 0.5, 1.0),
    (7, 0.1, 0.5, 1.0),
    (6, 0.3, 0.95, 0.95),  # Lemma 5: b0 = b
]


def literal_gram(bits: int, a: float, b: float, b0: float) -> torch.Tensor:
    vocab = 1 << bits
    return torch.tensor(
        [
            [b0 if s == t else b - a * (s ^ t).bit_count() for t in range(vocab)]
            for s in range(vocab)
        ],
        dtype=torch.float64,
    )


class TestOrthonormal:
    @pytest.mark.parametrize("generator", [None, seeded()], ids=["unit", "random"])
    @pytest.mark.parametrize("d_model", [16, 23])
    @pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
    def test_rows(self, generator, d_model, dtype, atol):
        rows = orthonormal(16, d_model, generator, dtype=dtype)
        assert rows.shape == (16, d_model)
        assert rows.dtype == dtype
        torch.testing.assert_close(rows @ rows.T, torch.eye(16, dtype=dtype), atol=atol, rtol=0)

    def test_a_random_frame_is_not_the_unit_vectors_and_has_no_preferred_sign(self):
        frames = torch.stack(
            [orthonormal(2, 2, seeded(s), dtype=torch.float64) for s in range(200)]
        )
        # The first row is uniform on the circle: mean 0, and every quadrant as likely.
        assert frames[:, 0].mean(0).abs().max() < 0.2
        quadrant = (frames[:, 0, 0] > 0).long() * 2 + (frames[:, 0, 1] > 0)
        assert torch.bincount(quadrant, minlength=4).min() > 30
        assert torch.equal(orthonormal(4, 6, seeded(1)), orthonormal(4, 6, seeded(1)))

    def test_too_narrow(self):
        with pytest.raises(InputError, match=r"32 orthonormal embeddings.*d_model=16.*at least 32"):
            orthonormal(32, 16)


def test_gaussian_scale():
    rows = gaussian_embedding(256, 64, seeded(), dtype=torch.float64)
    assert rows.shape == (256, 64)
    assert abs(float(rows.std()) * 8 - 1) < 0.03
    assert abs(float((rows**2).sum(1).mean()) - 1) < 0.03
    narrow = gaussian_embedding(256, 64, seeded())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), rows, atol=1e-7, rtol=0)


class TestGram:
    @pytest.mark.parametrize(("bits", "a", "b", "b0"), GEOMETRIES)
    def test_inner_products(self, bits, a, b, b0):
        rows = hamming_geometry(bits, a=a, b=b, b0=b0, dtype=torch.float64)
        assert rows.shape == (1 << bits, 1 << bits)
        torch.testing.assert_close(rows @ rows.T, literal_gram(bits, a, b, b0), atol=1e-12, rtol=0)

    @pytest.mark.parametrize(
        ("bits", "a", "b", "b0"), [*GEOMETRIES, (4, 2.0, 0.1, 0.2), (3, -1.0, 0.0, -2.0)]
    )
    def test_eigenvalues(self, bits, a, b, b0):
        spectrum = gram_eigenvalues(bits, a=a, b=b, b0=b0)
        values = (spectrum.constant, spectrum.linear, spectrum.bulk)
        expected = [
            v for v, n in zip(values, spectrum.multiplicities, strict=True) for _ in range(n)
        ]
        eigenvalues = torch.linalg.eigvalsh(literal_gram(bits, a, b, b0))
        torch.testing.assert_close(
            eigenvalues, torch.tensor(sorted(expected), dtype=torch.float64), atol=1e-11, rtol=0
        )
        levels = spectrum.levels()
        assert len(levels) == bits + 1
        assert levels[0] == spectrum.constant
        assert levels[1] == spectrum.linear
        assert (levels[2:] == spectrum.bulk).all()

    def test_eigenvalues_by_hand(self):
        # m = 2: rows sum to 1 + 2 (.5 - .1) + (.5 - .2) = 2.1
        spectrum = gram_eigenvalues(2, a=0.1, b=0.5, b0=1.0)
        assert spectrum.constant == pytest.approx(2.1)
        assert spectrum.linear == pytest.approx(0.7)
        assert spectrum.bulk == pytest.approx(0.5)
        assert spectrum.multiplicities == (1, 2, 1)

    def test_a_singular_value_gap_of_a_times_half_the_vocabulary(self):
        rows = hamming_geometry(6, a=0.1, b=0.5, b0=1.0, dtype=torch.float64)
        squares = torch.linalg.svdvals(rows) ** 2
        # level 0 (22.9), six of level 1 (3.7), the bulk (0.5)
        torch.testing.assert_close(
            squares[1:7], torch.full((6,), 0.5 + 0.1 * 32, dtype=torch.float64)
        )
        torch.testing.assert_close(squares[7:], torch.full((57,), 0.5, dtype=torch.float64))

    @pytest.mark.parametrize("bits", range(1, 7))
    def test_lemma_5(self, bits):
        b = 0.1 * bits  # above the boundary a m / 2
        spectrum = gram_eigenvalues(bits, a=0.1, b=b, b0=b)
        assert spectrum.rank == bits + 1 <= bits + 2
        gram = literal_gram(bits, 0.1, b, b)
        assert torch.linalg.matrix_rank(gram, hermitian=True) == bits + 1
        narrow = hamming_geometry(bits, a=0.1, b=b, b0=b, d_model=bits + 1, dtype=torch.float64)
        torch.testing.assert_close(narrow @ narrow.T, gram, atol=1e-12, rtol=0)
        with pytest.raises(InputError, match=f"rank {bits + 1}.*d_model={bits} is below"):
            hamming_geometry(bits, a=0.1, b=b, b0=b, d_model=bits)

    @pytest.mark.parametrize("bits", [2, 3, 5])
    def test_the_boundary_of_positive_semidefinite(self, bits):
        vocab = 1 << bits
        a, b0 = 0.3, 1.7
        # condition (2) as an equality: the constant eigenvalue is 0
        b = (a * bits * vocab / 2 - b0) / (vocab - 1)
        assert b <= b0
        rows = hamming_geometry(bits, a=a, b=b, b0=b0, dtype=torch.float64)
        torch.testing.assert_close(rows @ rows.T, literal_gram(bits, a, b, b0), atol=1e-12, rtol=0)
        assert gram_eigenvalues(bits, a=a, b=b, b0=b0).rank == vocab - 1
        with pytest.raises(InputError, match=r"\(1\).*holds.*\(2\).*fails"):
            hamming_geometry(bits, a=a, b=b - 1e-6, b0=b0)
        assert torch.linalg.eigvalsh(literal_gram(bits, a, b - 1e-6, b0))[0] < 0
        with pytest.raises(InputError, match=r"\(1\) b0 - b = -1e-06 >= 0 \(fails\).*\(2\).*holds"):
            hamming_geometry(bits, a=0.01, b=2.0, b0=2.0 - 1e-6)

    def test_wide_models_are_padded(self):
        rows = hamming_geometry(3, a=0.1, b=0.5, b0=1.0, d_model=12, dtype=torch.float64)
        assert rows.shape == (8, 12)
        torch.testing.assert_close(rows @ rows.T, literal_gram(3, 0.1, 0.5, 1.0))

    @pytest.mark.parametrize("a", [0.0, -1.0])
    def test_similarity_has_to_fall(self, a):
        with pytest.raises(InputError, match="needs a above 0"):
            hamming_geometry(3, a=a, b=0.5, b0=1.0)


class TestWalsh:
    def test_weight(self):
        values = torch.arange(64).view(4, 16)
        assert hypercube.weight(values, 6).flatten().tolist() == [v.bit_count() for v in range(64)]

    @pytest.mark.parametrize("bits", [1, 4])
    def test_signs_are_an_orthogonal_basis(self, bits):
        vocab = 1 << bits
        basis = hypercube.signs(torch.arange(vocab), bits)
        assert torch.equal(basis @ basis.T, vocab * torch.eye(vocab, dtype=torch.float64))
        for t in range(vocab):
            for s in range(vocab):
                assert basis[t, s] == (-1) ** (t & s).bit_count()

    @pytest.mark.parametrize("bits", [1, 3, 6])
    def test_krawtchouk_sums_the_signs_of_a_level(self, bits):
        table = hypercube.krawtchouk(bits)
        basis = hypercube.signs(torch.arange(1 << bits), bits)
        level = hypercube.weight(torch.arange(1 << bits), bits)
        for j in range(bits + 1):
            for k in range(bits + 1):
                token = (1 << k) - 1
                assert table[j, k] == basis[token, level == j].sum()

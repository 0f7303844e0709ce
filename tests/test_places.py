"""Places by the nearest picture: distances beside scikit-learn's, the rows by brute force, an index, and what is refused."""

import numpy as np
import pytest
from sklearn.metrics.pairwise import haversine_distances
import torch

from clip_lab.evals.places import EARTH, RADII, check_places, distance_km, located, within
from clip_lab.evals.retrieval import faiss_index

RNG = np.random.default_rng(0)


def anywhere(n): return np.stack([np.degrees(np.arcsin(RNG.uniform(-1, 1, n))), RNG.uniform(-180, 180, n)], 1)


def unit(n, d=16): return torch.nn.functional.normalize(torch.tensor(RNG.normal(size=(n, d)), dtype=torch.float32), dim=1)


def test_distances_are_scikit_learns():
    a, b = anywhere(200), anywhere(150)
    wanted = EARTH * haversine_distances(np.radians(a), np.radians(b))
    assert np.allclose(distance_km(a[:, None], b), wanted, atol=1e-6) and np.allclose(distance_km(a, a), 0)
    assert distance_km([10, 20], [10, 20.00001]) == pytest.approx(0.0010951, rel=1e-3)           # a metre is not rounded away


@pytest.mark.parametrize("by_index", [False, True])
def test_rows_by_brute_force(by_index):
    if by_index: pytest.importorskip("faiss")
    probes, gallery, truth, where = unit(40), unit(300), anywhere(40), anywhere(300)
    found = located(probes, faiss_index(gallery) if by_index else gallery, where, truth)
    best = (probes @ gallery.T).argmax(1).numpy()
    assert found.neighbour.tolist() == best.tolist()
    wanted = [EARTH * haversine_distances(np.radians([t]), np.radians([where[j]]))[0, 0] for t, j in zip(truth, best)]
    assert np.allclose(found.km, wanted) and np.allclose(found[["latitude", "longitude"]], where[best])
    rows = within(found.km, truth, where)
    every = distance_km(truth[:, None], where)
    for row in rows.itertuples():
        assert row.estimate == np.mean(np.array(wanted) <= row.km) and row.chance == pytest.approx((every <= row.km).mean()) and row.low <= row.estimate <= row.high and row.n == 40
    assert rows.radius.tolist() == list(RADII) and rows.estimate.is_monotonic_increasing


@pytest.mark.parametrize("places, says", [([1, 2], "shape"), ([[1, 2, 3]], "shape"), ([[91, 0]], "row 0"), ([[0, 0], [0, 181]], "row 1"), ([[float("nan"), 0]], "row 0")])
def test_places_that_cannot_be(places, says):
    with pytest.raises(ValueError, match=says): check_places(places)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="2 places for 3 gallery rows, 1 for 1 probes"): located(unit(1), unit(3), anywhere(2), anywhere(1))
    with pytest.raises(ValueError, match="1 distances for 2 places"): within([1.0], anywhere(2), anywhere(3))
    with pytest.raises(ValueError, match="above 0 km"): within([1.0], anywhere(1), anywhere(3), {"here": 0})
    with pytest.raises(ValueError, match="above 0 km"): within([1.0], anywhere(1), anywhere(3), {})

"""The judge reads faces it never saw, and its statistics equal their closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors import numpy as safetensors

from effjax.bundled import glyphs, judge
from experiments import train_judge


@pytest.fixture(scope="module")
def bundled():
    return judge.load()


@pytest.fixture(scope="module")
def held_out():
    return glyphs.batch(np.random.default_rng(5), 512, glyphs.HELD_OUT_FONTS)


def test_bundled_judge_reads_fonts_it_never_saw(bundled, held_out):
    assert judge.accuracy(bundled, *held_out) >= 0.97
    images, labels = held_out
    assert judge.accuracy(bundled, images, (labels + 1) % 36) < 0.05
    assert judge.accuracy(bundled, images[::-1], labels) < 0.1


def test_bundled_judge_is_small(bundled):
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(bundled))) < 250_000
    assert (judge.WEIGHTS / "model.safetensors").stat().st_size < 500_000


def test_chunks_change_nothing_and_compile_once(bundled, held_out):
    images = held_out[0][:259]
    features = judge.features(bundled, images)
    assert features.shape == (259, 64)
    assert features.dtype == np.float32
    compiled = judge._read._cache_size()
    np.testing.assert_allclose(judge.features(bundled, images[256:]), features[256:], atol=1e-5)
    logits = np.asarray(bundled(jnp.asarray(images[:3])))
    kernel, bias = (np.asarray(x.get_value()) for x in (bundled.head.kernel, bundled.head.bias))
    np.testing.assert_allclose(features[:3] @ kernel + bias, logits, atol=1e-3)
    assert np.array_equal(judge.predict(bundled, images[:3]), logits.argmax(-1))
    judge.predict(judge.load(), jnp.asarray(images[:5]))
    assert judge._read._cache_size() == compiled


def test_save_and_load_keep_the_judge(tmp_path, bundled, held_out):
    judge.save(bundled, tmp_path / "new")
    again = judge.load(tmp_path / "new")
    images = held_out[0][:4]
    assert np.array_equal(judge.features(bundled, images), judge.features(again, images))
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["model.safetensors"]


def test_another_network_is_refused(tmp_path):
    tensors = safetensors.load_file(judge.WEIGHTS / "model.safetensors")
    tensors["head.kernel"] = tensors["head.kernel"][:, :10]
    tensors["tail.bias"] = tensors.pop("head.bias")
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"are head\.bias, head\.kernel, tail\.bias;"):
        judge.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        judge.load(tmp_path / "nowhere")


def test_training_learns(capsys):
    trained = train_judge.train(7, 30, size=16, rate=1e-2)
    images, labels = glyphs.batch(np.random.default_rng(0), 256)
    assert judge.accuracy(trained, images, labels) > 0.15  # chance is 0.03
    assert "step    30 of 30: loss" in capsys.readouterr().out


def test_augmentation_is_mild_and_seeded():
    images, _ = glyphs.batch(np.random.default_rng(0), 32)
    rough, again = (train_judge.augment(np.random.default_rng(1), images) for _ in range(2))
    assert rough.shape == images.shape
    assert rough.dtype == np.float32
    assert np.array_equal(rough, again)
    overlap = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(images, rough, strict=True)]
    assert min(overlap) > 0.4
    assert max(overlap) < 0.999


def test_wrong_images_and_labels_are_refused(bundled, held_out):
    images, labels = held_out
    with pytest.raises(ValueError, match="the judge reads"):
        judge.features(bundled, images[..., 0])
    with pytest.raises(ValueError, match="the judge reads"):
        judge.predict(bundled, images[:0])
    with pytest.raises(ValueError, match="as many labels"):
        judge.accuracy(bundled, images, labels[:3])


def test_frechet_of_equal_sets_is_zero(bundled, held_out):
    features = judge.features(bundled, held_out[0])
    scale = np.var(features, axis=0).sum()
    assert judge.frechet(features, features) < 1e-9 * scale
    few = features[:5]  # singular covariances
    assert judge.frechet(few, few) < 1e-6 * scale
    assert judge.frechet(features[:256], features[256:]) > 0.01 * scale


def exactly_gaussian(rng, mean, covariance, samples=200):
    """Samples with exactly this mean and covariance."""
    size = len(mean)
    x = rng.standard_normal((samples, size))
    x -= x.mean(0)
    x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T
    return x @ np.linalg.cholesky(covariance).T + mean


def test_frechet_has_its_closed_form():
    rng = np.random.default_rng(0)
    mean_a, mean_b = rng.standard_normal((2, 6))
    # commuting covariances: the trace term is the squared distance of the roots of the eigenvalues
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    values_a, values_b = rng.uniform(0.1, 3, (2, 6))
    a = exactly_gaussian(rng, mean_a, basis * values_a @ basis.T)
    b = exactly_gaussian(rng, mean_b, basis * values_b @ basis.T)
    closed = np.sum((mean_a - mean_b) ** 2) + np.sum((values_a**0.5 - values_b**0.5) ** 2)
    np.testing.assert_allclose(judge.frechet(a, b), closed, rtol=1e-9)
    np.testing.assert_allclose(judge.frechet(a, a + 2.0), 6 * 4.0, rtol=1e-9)


def test_frechet_agrees_with_the_matrix_square_root():
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    a = rng.standard_normal((50, 5)) @ rng.standard_normal((5, 5))
    b = rng.standard_normal((40, 5)) @ rng.standard_normal((5, 5)) + 1
    s_a, s_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(
        s_a + s_b - 2 * sqrtm(s_a @ s_b).real
    )
    np.testing.assert_allclose(judge.frechet(a, b), expected, rtol=1e-7)
    np.testing.assert_allclose(judge.frechet(b, a), expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.zeros((1, 3)), np.zeros((5, 3)), "at least two samples"),
        (np.zeros((5, 3)), np.zeros((5, 4)), "same F"),
        (np.zeros(5), np.zeros(5), "shapes"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "NaN"),
    ],
)
def test_frechet_refuses_what_has_no_answer(a, b, message):
    with pytest.raises(ValueError, match=message):
        judge.frechet(a, b)


def test_wilson_interval_solves_its_equation():
    low, high = judge.wilson_interval(90, 100)
    for bound in (low, high):  # |seen - p| = z sqrt(p (1 - p) / n)
        assert abs(0.9 - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / 100) ** 0.5)
    assert judge.wilson_interval(0, 10)[0] == pytest.approx(0, abs=1e-12)
    assert judge.wilson_interval(10, 10)[1] == pytest.approx(1, abs=1e-12)
    wide = judge.wilson_interval(90, 100, confidence=0.99)
    assert wide[0] < low < 0.9 < high < wide[1]


@pytest.mark.parametrize("arguments", [(5, 4), (-1, 4), (0, 0), (1, 2, 1.0)])
def test_wilson_interval_refuses_impossible_counts(arguments):
    with pytest.raises(ValueError, match="are needed"):
        judge.wilson_interval(*arguments)


def test_scenes_are_read_back():
    images, _, things = glyphs.captioned(np.random.default_rng(5), 512)
    reader = judge.load()
    right = judge.alignment(reader, images, things)
    assert min(right.values()) > 0.98
    noisy = images + 0.2 * np.random.default_rng(6).standard_normal(images.shape)
    assert judge.alignment(reader, noisy, things)["all"] > 0.9
    other = glyphs.Things(things.labels, np.roll(things.colors, 1), things.places)
    wrong = judge.alignment(reader, images, other)
    assert wrong["class"] == right["class"]
    assert wrong["color"] < 0.3
    assert wrong["all"] <= wrong["color"]
    with pytest.raises(ValueError, match="scenes are"):
        judge.read_scenes(reader, images[..., :1])

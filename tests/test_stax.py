"""The layers: kernels against their own finite networks, layouts, masks, errors."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np
import pytest
import scipy.stats
from jax import random
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import taylor_softmax
from taylor_softmax import stax
from taylor_softmax.methods import Direct, QuasiMonteCarlo, Series

X1 = random.normal(random.key(1), (3, 5))
X2 = random.normal(random.key(2), (2, 5))
IMAGES1 = random.normal(random.key(3), (2, 4, 3, 2))
IMAGES2 = random.normal(random.key(4), (2, 4, 3, 2))


def fully_connected(*end, width=1024, logits=3):
    return stax.serial(
        stax.Dense(width, W_std=1.5), stax.Relu(), stax.Dense(logits, W_std=1.5, b_std=0.3), *end
    )


def convolutional(*end, width=128, logits=3):
    return stax.serial(
        stax.Conv(width, (3, 3), W_std=1.5, padding="SAME"),
        stax.Relu(),
        stax.Conv(logits, (3, 3), W_std=1.5, padding="SAME"),
        *end,
    )


NETWORKS = {
    "order 2": (fully_connected(stax.TaylorSoftmax(2)), X1, X2),
    "order 4, two classes": (fully_connected(stax.TaylorSoftmax(4), logits=2), X1, X2),
    "softmax": (fully_connected(stax.Softmax()), X1, X2),
    "log-softmax": (fully_connected(stax.LogSoftmax()), X1, X2),
    "softmax of images": (convolutional(stax.Softmax(), stax.Flatten()), IMAGES1, IMAGES2),
    "order 2 of images, pooled": (
        convolutional(stax.TaylorSoftmax(2), stax.GlobalAvgPool()),
        IMAGES1,
        IMAGES2,
    ),
    "infinite width, in the middle": (
        fully_connected(
            stax.TaylorSoftmax(4, infinite_width=True), stax.Dense(8), width=256, logits=256
        ),
        X1 / 2,
        X2 / 2,
    ),
    "softmax of infinite width": (
        fully_connected(stax.Softmax(infinite_width=True), stax.Dense(8), width=256, logits=256),
        X1 / 2,
        X2 / 2,
    ),
}


def chi_square_limit(count):
    """Mean square of `count` standard normal scores, at a probability of 1e-5 if independent."""
    return scipy.stats.chi2.ppf(1 - 1e-5, count) / count


def z_scores(network, x1, x2, *, batches=12, n_samples=12):
    """Of `nt.monte_carlo_kernel_fn` against `kernel_fn`, over the spread of independent batches."""
    init_fn, apply_fn, kernel_fn = network
    analytic = kernel_fn(x1, x2, ("nngp", "ntk"))
    # Running means after each batch, of one compiled sampler.
    counts = n_samples * np.arange(1, batches + 1)
    sample_fn = nt.monte_carlo_kernel_fn(
        init_fn,
        apply_fn,
        random.key(100),
        counts.tolist(),
        device_count=1,
        vmap_axes=0,
        implementation=1,
    )
    running = list(sample_fn(x1, x2, ("nngp", "ntk")))
    scores = {}
    for get in ("nngp", "ntk"):
        totals = np.stack([n * getattr(mean, get) for n, mean in zip(counts, running, strict=True)])
        samples = np.diff(totals, axis=0, prepend=0) / n_samples
        stderr = samples.std(0, ddof=1) / np.sqrt(batches)
        scores[get] = (samples.mean(0) - getattr(analytic, get)) / stderr
    return scores


# Student's t with 11 degrees of freedom: |t| > 8 has probability 7e-6.
LARGEST_SCORE = 8.0


@pytest.mark.quick(name="softmax")
@pytest.mark.parametrize("name", NETWORKS)
def test_kernel_is_that_of_the_wide_finite_network(name):
    for get, scores in z_scores(*NETWORKS[name]).items():
        assert np.max(np.abs(scores)) < LARGEST_SCORE, (get, scores)


@pytest.mark.quick
def test_negative_control_another_layer_s_kernel_is_found():
    init_fn, apply_fn, _ = fully_connected(stax.TaylorSoftmax(2))
    *_, kernel_fn = fully_connected(stax.Softmax())
    scores = z_scores((init_fn, apply_fn, kernel_fn), X1, X2)
    assert np.max(np.abs(scores["nngp"])) > LARGEST_SCORE
    assert np.max(np.abs(scores["ntk"])) > LARGEST_SCORE


@pytest.mark.parametrize("layer", [stax.TaylorSoftmax(2), stax.Softmax(), stax.LogSoftmax()])
def test_class_kernel_is_the_mean_of_empirical_ones(layer):
    init_fn, apply_fn, kernel_fn = fully_connected(layer, width=512)
    expected = taylor_softmax.class_kernel(kernel_fn(X1, X2))
    assert expected.nngp.shape == expected.ntk.shape == (3, 2, 3, 3)
    empirical_fn = nt.empirical_kernel_fn(apply_fn, trace_axes=(), vmap_axes=0, implementation=1)

    def sample(key):
        _, params = init_fn(key, X1.shape)
        kernels = empirical_fn(X1, X2, ("nngp", "ntk"), params)
        return kernels.nngp, kernels.ntk

    samples = jax.jit(lambda keys: jax.lax.map(sample, keys))(random.split(random.key(7), 400))
    for exact, sampled in zip(expected, samples, strict=True):
        sampled = np.asarray(sampled)
        stderr = sampled.std(0, ddof=1) / np.sqrt(len(sampled))
        scores = (sampled.mean(0) - exact) / stderr
        assert np.max(np.abs(scores)) < 5, scores
    # Control: an NTK without centring has the same diagonal, and fails off it.
    off_diagonal = samples[1].mean(0)[..., 0, 1]
    assert np.any(np.abs(off_diagonal) > 5 * samples[1].std(0)[..., 0, 1] / 20)


@pytest.mark.quick
def test_class_kernel_sums_and_traces():
    *_, kernel_fn = fully_connected(stax.TaylorSoftmax(4), logits=7)
    kernel = kernel_fn(X1, X2)
    nngp, ntk = taylor_softmax.class_kernel(kernel)
    np.testing.assert_allclose(nngp.sum((-1, -2)), np.ones((3, 2)), rtol=1e-12)
    np.testing.assert_allclose(nngp.sum(-1), np.full((3, 2, 7), 1 / 7), rtol=1e-12)
    np.testing.assert_allclose(ntk.sum(-1), np.zeros((3, 2, 7)), atol=1e-12)
    for whole, same in ((nngp, kernel.nngp), (ntk, kernel.ntk)):
        diagonal = np.diagonal(whole, axis1=-2, axis2=-1)
        np.testing.assert_allclose(
            diagonal, np.broadcast_to(np.asarray(same)[..., None], (3, 2, 7)), rtol=1e-11
        )
    # Sampling the logits themselves.
    *_, logits_fn = fully_connected(logits=7)
    logits = logits_fn(X1, X2)
    mean, stderr = taylor_softmax.monte_carlo.class_second_moment(
        random.key(0),
        logits.cov1[:, None],
        logits.nngp,
        logits.cov2,
        n_classes=7,
        order=4,
        n_samples=100_000,
    )
    scores = np.asarray((mean - nngp) / stderr)
    assert np.max(np.abs(scores)) < 5
    # Entries of one matrix depend on each other: two independent ones of each pair's 49 at least.
    assert np.mean(scores**2) < chi_square_limit(2 * 6)


@pytest.mark.quick
def test_one_class_is_constant():
    *_, kernel_fn = fully_connected(stax.Softmax(), logits=1)
    with pytest.warns(UserWarning, match="over one class: its output, and so its kernel, is const"):
        kernel = kernel_fn(X1, X2)
    np.testing.assert_array_equal(kernel.nngp, np.ones((3, 2)))
    np.testing.assert_array_equal(kernel.ntk, np.zeros((3, 2)))
    nngp, ntk = taylor_softmax.class_kernel(kernel)
    np.testing.assert_array_equal(nngp, np.ones((3, 2, 1, 1)))
    np.testing.assert_array_equal(ntk, np.zeros((3, 2, 1, 1)))


# Layouts.


def order_2_entry(var1, cov12, var2):
    covariance = taylor_softmax.class_covariance(var1, cov12, var2, n_classes=4, order=2)
    return 1 / 16 + 0.75 * covariance


def infinite_width_entry(var1, cov12, var2):
    return jnp.exp(cov12)


@pytest.mark.quick(entry_of=order_2_entry, diagonal_batch=True, diagonal_spatial=False)
@pytest.mark.parametrize(
    ("layer", "entry_of"),
    [
        (stax.TaylorSoftmax(2), order_2_entry),
        (stax.Softmax(infinite_width=True), infinite_width_entry),
    ],
)
@pytest.mark.parametrize("diagonal_batch", [True, False])
@pytest.mark.parametrize("diagonal_spatial", [True, False])
def test_layouts_agree(layer, entry_of, diagonal_batch, diagonal_spatial):
    """Every entry of every layout is the elementwise map of the incoming covariances."""
    *_, logits_fn = convolutional(logits=4)
    *_, layer_fn = layer
    options = {"diagonal_batch": diagonal_batch, "diagonal_spatial": diagonal_spatial}
    logits = logits_fn(IMAGES1, IMAGES2, **options)
    assert logits.diagonal_batch == diagonal_batch
    assert logits.diagonal_spatial == diagonal_spatial
    kernel = layer_fn(logits)
    full = layer_fn(logits_fn(IMAGES1, IMAGES2, diagonal_batch=False, diagonal_spatial=False))

    def reduce(array, batch_ndim, diagonal_batch):
        """The entries of the fullest layout that this one keeps."""
        array = np.asarray(array)
        if batch_ndim == 1 and diagonal_batch:
            array = np.einsum("nn...->n...", array)
        if diagonal_spatial:
            array = np.einsum("...hhww->...hw", array)
        return array

    for name, batch_ndim in (("nngp", 2), ("ntk", 2), ("cov1", 1), ("cov2", 1)):
        np.testing.assert_allclose(
            getattr(kernel, name),
            reduce(getattr(full, name), batch_ndim, diagonal_batch),
            rtol=1e-10,
            err_msg=name,
        )
    # And one entry from its own covariances.
    full_logits = logits_fn(IMAGES1, IMAGES2, diagonal_batch=False, diagonal_spatial=False)
    i, j, p, q = 1, 0, (2, 1), (3, 2)
    entry = (i, j, p[0], q[0], p[1], q[1])
    var1 = full_logits.cov1[i, i, p[0], p[0], p[1], p[1]]
    var2 = full_logits.cov2[j, j, q[0], q[0], q[1], q[1]]
    expected = entry_of(var1, full_logits.nngp[entry], var2)
    np.testing.assert_allclose(full.nngp[entry], expected, rtol=1e-7)


def test_same_inputs_twice():
    *_, kernel_fn = fully_connected(stax.TaylorSoftmax(2))
    alone, twice = kernel_fn(X1, None), kernel_fn(X1, X1)
    for name in ("nngp", "ntk", "cov1"):
        np.testing.assert_allclose(getattr(alone, name), getattr(twice, name), rtol=1e-9)
    np.testing.assert_allclose(jnp.diagonal(alone.nngp), alone.cov1, rtol=1e-9)
    assert not alone.is_gaussian


def test_batched_equals_whole():
    # Of small variances: beyond, parts may take other routes, which agree to what is promised.
    x1, x2 = 0.5 * random.normal(random.key(8), (2, 8, 5))
    *_, kernel_fn = fully_connected(stax.Softmax())
    batched = nt.batch(kernel_fn, batch_size=4, device_count=1)(x1, x2, ("nngp", "ntk"))
    whole = kernel_fn(x1, x2, ("nngp", "ntk"))
    np.testing.assert_allclose(batched.nngp, whole.nngp, rtol=1e-10)
    np.testing.assert_allclose(batched.ntk, whole.ntk, rtol=1e-10)


@pytest.mark.quick
def test_masks_pass_through():
    mask_constant = 100.0
    x = IMAGES1.at[0, :2].set(mask_constant)
    network = convolutional(stax.TaylorSoftmax(2), stax.GlobalAvgPool())
    init_fn, apply_fn, kernel_fn = network
    analytic = kernel_fn(x, IMAGES2, ("nngp", "ntk"), mask_constant=mask_constant)
    _, params = init_fn(random.key(0), x.shape)
    outputs = stax.unmask_fn(apply_fn)(params, x, mask_constant=mask_constant)
    np.testing.assert_allclose(outputs.sum(-1), np.ones(2), rtol=1e-12)

    *_, logits_fn = convolutional()
    logits = logits_fn(x, IMAGES2, mask_constant=mask_constant)
    kernel = stax.TaylorSoftmax(2)[2](logits)
    assert kernel.mask1 is not None
    assert np.all(np.asarray(kernel.nngp)[0, :, 0] == 0)
    assert np.all(np.asarray(kernel.nngp)[1] > 0)
    # The kernel of the visible half of the image, alone.
    assert np.isfinite(analytic.ntk).all()


# JAX.


@pytest.mark.parametrize("layer", [stax.TaylorSoftmax(2), stax.Softmax()])
def test_hyperparameters_and_inputs_have_gradients(layer):
    def objective(w_std, b_std, x):
        *_, kernel_fn = stax.serial(
            stax.Dense(64, W_std=w_std, b_std=b_std), stax.Erf(), stax.Dense(4, W_std=w_std), layer
        )
        kernels = kernel_fn(x, x[:2], ("nngp", "ntk"))
        return jnp.sum(jnp.sin(9 * kernels.nngp)) + jnp.sum(kernels.ntk**2)

    arguments = (jnp.asarray(1.3), jnp.asarray(0.4), X1)
    gradients = jax.jit(jax.grad(objective, (0, 1, 2)))(*arguments)
    direction = (jnp.asarray(0.7), jnp.asarray(-0.3), random.normal(random.key(9), X1.shape))
    ends = [
        objective(*(a + s * 1e-5 * d for a, d in zip(arguments, direction, strict=True)))
        for s in (1, -1)
    ]
    slope = sum(jnp.vdot(g, d) for g, d in zip(gradients, direction, strict=True))
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-6)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices; conftest makes two on a CPU")
def test_sharded_inputs_give_a_sharded_kernel():
    # Few enough for quadrature; tests/test_class_axis.py has the table.
    x = random.normal(random.key(10), (24, 5))
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:2]), ("rows",)), PartitionSpec("rows"))
    *_, kernel_fn = fully_connected(stax.Softmax())
    compute = jax.jit(lambda x1, x2: kernel_fn(x1, x2, ("nngp", "ntk")))
    sharded, whole = compute(jax.device_put(x, sharding), x[:20]), compute(x, x[:20])
    for get in ("nngp", "ntk"):
        result = getattr(sharded, get)
        assert {shard.data.shape for shard in result.addressable_shards} == {(12, 20)}
        np.testing.assert_allclose(result, getattr(whole, get), rtol=1e-10)


def test_without_x64():
    """In a process of its own: the switch is global."""
    program = """
import json, jax.numpy as jnp
from taylor_softmax import stax
from taylor_softmax.methods import Direct, QuasiMonteCarlo, Series
x1 = jnp.array([[0.3, -1.0], [2.0, 0.1]]); x2 = jnp.array([[1.0, 0.5]])
kernels = []
for layer in (stax.TaylorSoftmax(2), stax.TaylorSoftmax(8), stax.Softmax()):
    kernel = stax.serial(stax.Dense(8, W_std=1.5), stax.Erf(), stax.Dense(4), layer)[2](x1, x2)
    kernels += [kernel.nngp.tolist(), kernel.ntk.tolist(), str(kernel.nngp.dtype)]
print(json.dumps(kernels))
"""
    results = []
    for x64 in ("0", "1"):
        completed = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "JAX_ENABLE_X64": x64},
            capture_output=True,
            text=True,
            check=True,
        )
        results.append(json.loads(completed.stdout))
    for single, double in zip(*results, strict=True):
        if isinstance(single, str):
            assert (single, double) == ("float32", "float64")
        else:
            np.testing.assert_allclose(single, double, rtol=2e-5)


# Apply functions and errors.


@pytest.mark.quick
def test_apply_normalises_and_scales():
    z = random.normal(random.key(11), (2, 3, 4))
    for layer in (stax.TaylorSoftmax(4), stax.Softmax()):
        _, apply_fn, _ = layer
        np.testing.assert_allclose(apply_fn((), z).sum(-1), np.ones((2, 3)), rtol=1e-14)
    _, apply_fn, _ = stax.TaylorSoftmax(4, axis=(1, 2), infinite_width=True)
    np.testing.assert_allclose(apply_fn((), z).sum((1, 2)), np.full(2, 12.0), rtol=1e-14)
    _, apply_fn, _ = stax.Softmax(axis=1)
    np.testing.assert_allclose(apply_fn((), z), jax.nn.softmax(z, 1), rtol=1e-14)
    f = 1 + z + z**2 / 2
    _, apply_fn, _ = stax.TaylorSoftmax(2)
    np.testing.assert_allclose(apply_fn((), z), f / f.sum(-1, keepdims=True), rtol=1e-14)


@pytest.mark.quick
def test_everything_of_neural_tangents_is_there_and_nothing_leaks():
    import neural_tangents.stax

    theirs = {name for name in vars(neural_tangents.stax) if not name.startswith("_")}
    assert set(stax.__all__) == theirs | {
        "GlobalCrossAttention",
        "LogSoftmax",
        "Softmax",
        "TaylorSoftmax",
    }
    # The check of annotations imports jaxtyping into every module.
    there = {name for name in vars(stax) if not name.startswith("_")} - {"jaxtyping"}
    assert there == set(stax.__all__)
    # That one is ours, and theirs but for one case.
    for name in theirs - {"GlobalSelfAttention"}:
        mine, other = getattr(stax, name), getattr(neural_tangents.stax, name)
        # Some are theirs with kernels that say more: see `_layers.finite`.
        assert mine is other or mine.__wrapped__ is other, name


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"order": 3}, ValueError, "`order`.*3"),
        ({"order": 0}, ValueError, "`order`.*0"),
        ({"order": -2}, ValueError, "`order`.*-2"),
        ({"order": True}, TypeError, "`order`.*True"),
        ({"order": 2.0}, TypeError, "`order`.*2.0"),
        ({"order": 34}, NotImplementedError, "`order`.*34"),
        ({"axis": 1.5}, TypeError, "`axis`.*1.5"),
        ({"axis": True}, TypeError, "`axis`.*True"),
        ({"axis": ()}, ValueError, "`axis`"),
        ({"infinite_width": 1}, TypeError, "`infinite_width`.*1"),
        ({"method": "fast"}, TypeError, "`method`.*fast"),
        ({"method": QuasiMonteCarlo(8), "order": 2}, ValueError, "`method=Q.*`Interpolate"),
        ({"method": Direct(), "infinite_width": True}, ValueError, "`method=D.*closed form"),
        ({"method": Series, "order": None}, TypeError, "`method`.*Series"),
    ],
)
def test_errors_of_construction(arguments, error, message):
    with pytest.raises(error, match=message):
        stax.TaylorSoftmax(**arguments)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("axis", "error"),
    [(0, ValueError), (-4, ValueError), (7, ValueError), ((1, 3), NotImplementedError)],
)
def test_errors_of_axes(axis, error):
    *_, kernel_fn = convolutional(stax.TaylorSoftmax(axis=axis))
    with pytest.raises(error, match="`axis"):
        kernel_fn(IMAGES1, IMAGES2)
    if error is ValueError:
        init_fn, apply_fn, _ = stax.TaylorSoftmax(axis=axis)
        with pytest.raises(error, match="`axis"):
            apply_fn((), IMAGES1)
        with pytest.raises(error, match="`axis"):
            init_fn(random.key(0), IMAGES1.shape)


@pytest.mark.quick
def test_errors_of_kernels():
    *_, kernel_fn = stax.serial(stax.Dense(4), stax.Relu(), stax.TaylorSoftmax())
    with pytest.raises(ValueError, match="Gaussian"):
        kernel_fn(X1, X2)
    with pytest.raises(ValueError, match="Gaussian"):
        stax.Softmax()[2](X1, X2)
    *_, logits_fn = fully_connected()
    with pytest.raises(ValueError, match=r"`kernel` is not that of classes"):
        taylor_softmax.class_kernel(logits_fn(X1, X2))
    with pytest.raises(TypeError, match="`kernel`"):
        taylor_softmax.class_kernel(logits_fn(X1, X2, "nngp"))

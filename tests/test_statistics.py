"""Statistics files: every tool's own form is read, what is written is read by the tools, and nothing in a file runs."""

import os
import pickle
import pickletools
import sys
import types
import zipfile
from dataclasses import replace
from itertools import product

import cleanfid.features
import numpy as np
import pytest
import torch
from pytorch_fid.fid_score import calculate_activation_statistics, compute_statistics_of_path
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.utils import cache_lookup_one_recompute_on_miss

from stepdistill.errors import UserError
from stepdistill.metrics.frechet import Reference, moments_of
from stepdistill.metrics.pickled import pickled, read_pickle
from stepdistill.metrics.presets import protocol
from stepdistill.metrics.statistics import Statistics, convert, read_statistics, write_statistics

N, D = 40, 6
FEATURES = np.random.default_rng(0).normal(0.4, 0.2, (N, D)).astype(np.float32)
TRUTH = moments_of(torch.from_numpy(FEATURES))
MU, SIGMA = TRUTH.mean.numpy(), TRUTH.covariance.numpy()
OWN = Statistics(TRUTH.mean, TRUTH.covariance, N, extractor="inception-clean", meta={"made": "here"})


def close(statistics, *, rtol=1e-12):
    torch.testing.assert_close(statistics.mean, TRUTH.mean, rtol=rtol, atol=0)
    torch.testing.assert_close(statistics.covariance, TRUTH.covariance, rtol=rtol, atol=rtol)
    assert statistics.mean.dtype == statistics.covariance.dtype == torch.float64


def dumped(path, content, *, protocol=None):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def edm2(mapping=dict):
    """What EDM2's ``calculate_stats_for_iterable`` saves: raw sums in float64, divided by ``n - 1``."""
    x = FEATURES.astype(np.float64)
    mu = x.sum(0) / N
    sigma = (x.T @ x - np.outer(mu, mu) * N) / (N - 1)
    return mapping(
        num_images=N,
        fid=mapping(mu=mu, sigma=sigma),
        fd_dinov2=mapping(mu=mu + 1, sigma=sigma),
    )


def feature_stats(*, keep_features=False, keep_sums=True):
    """The ``__dict__`` of StyleGAN's and SiD's ``FeatureStats``: raw sums and their count."""
    x = FEATURES.astype(np.float64)
    return {
        "capture_all": keep_features,
        "capture_mean_cov": keep_sums,
        "max_items": N,
        "num_items": N,
        "num_features": D,
        "all_features": [FEATURES[:30], FEATURES[30:]] if keep_features else [],
        "raw_mean": x.sum(0) if keep_sums else np.zeros(D),
        "raw_cov": x.T @ x if keep_sums else np.zeros((D, D)),
    }


@pytest.fixture
def easy_dict(monkeypatch):
    """An ``EasyDict`` as in NVIDIA's ``dnnlib.util``."""

    class EasyDict(dict):
        def __getattr__(self, name):
            try:
                return self[name]
            except KeyError:
                raise AttributeError(name) from None

        def __setattr__(self, name, value):
            self[name] = value

    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    util = types.ModuleType("dnnlib.util")
    vars(util)["EasyDict"] = EasyDict
    monkeypatch.setitem(sys.modules, "dnnlib", types.ModuleType("dnnlib"))
    monkeypatch.setitem(sys.modules, "dnnlib.util", util)
    return EasyDict


def test_a_file_of_mu_and_sigma_is_read_as_over_n_minus_1(tmp_path):
    np.savez(tmp_path / "edm.npz", mu=MU, sigma=SIGMA)
    read = read_statistics(tmp_path / "edm.npz")
    close(read)
    assert (read.n, read.ddof, read.extractor, read.features) == (None, 1, None, None)


def test_a_file_that_pytorch_fid_made_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("pytorch_fid.fid_score.get_activations", lambda *_: FEATURES)
    mu, sigma = calculate_activation_statistics([], None)
    np.savez_compressed(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    close(read_statistics(tmp_path / "stats.npz"), rtol=1e-6)  # Its mean is taken in float32.


def test_the_features_of_a_kid_file_of_clean_fid_give_moments_and_features(tmp_path):
    np.savez_compressed(tmp_path / "x_clean_custom_na_kid.npz", feats=FEATURES)
    read = read_statistics(tmp_path / "x_clean_custom_na_kid.npz")
    close(read)
    assert read.n == N
    assert read.features is not None
    assert torch.equal(read.features[:], torch.from_numpy(FEATURES))


def test_a_reference_of_adm_gives_fid_and_sfid_without_its_images_being_read(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        arr_0=np.zeros((3, 4, 4, 3), np.uint8),
        mu=MU,
        sigma=SIGMA,
        mu_s=MU[:2],
        sigma_s=SIGMA[:2, :2],
    )
    with zipfile.ZipFile(tmp_path / "a.npz") as whole, zipfile.ZipFile(tmp_path / "cut.npz", "w") as cut:
        for name in whole.namelist():
            cut.writestr(name, whole.read(name)[: 8 if name == "arr_0.npy" else None])
    close(read_statistics(tmp_path / "cut.npz"))
    spatial = read_statistics(tmp_path / "cut.npz", kind="sfid")
    assert torch.equal(spatial.mean, TRUTH.mean[:2])
    assert torch.equal(spatial.covariance, TRUTH.covariance[:2, :2])


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_reference_of_edm2_gives_both_distances_in_every_pickle_protocol(tmp_path, version):
    path = dumped(tmp_path / "img64.pkl", edm2(), protocol=version)
    read = read_statistics(path)
    close(read)
    assert (read.n, read.ddof, read.extractor) == (N, 1, "inception")
    dinov2 = read_statistics(path, kind="fd-dinov2")
    torch.testing.assert_close(dinov2.mean, TRUTH.mean + 1)
    assert (dinov2.n, dinov2.extractor) == (N, None)


def test_a_pickle_of_easy_dicts_is_read_where_the_class_does_not_exist(tmp_path, easy_dict, monkeypatch):
    path = dumped(tmp_path / "img64.pkl", edm2(easy_dict))
    assert b"dnnlib.util" in path.read_bytes()
    monkeypatch.delitem(sys.modules, "dnnlib.util")
    close(read_statistics(path))
    assert type(read_pickle(path)["fid"]) is dict


def test_a_pickle_of_numpy_1_is_read(tmp_path):
    path = tmp_path / "old.pkl"
    path.write_bytes(pickle.dumps(edm2(), protocol=2).replace(b"numpy._core.", b"numpy.core."))
    close(read_statistics(path))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4"])
@pytest.mark.parametrize("version", [2, 4, 5])
def test_pickled_arrays_come_back_exactly_in_any_order_and_byte_order(tmp_path, order, dtype, version):
    array = np.asarray(SIGMA.reshape(2, 3, 6), dtype=dtype, order=order)
    content = {"a": array, "count": np.float64(2.5), "list": [array[0], "text", None, (1, 2)]}
    read = read_pickle(dumped(tmp_path / "a.pkl", content, protocol=version))
    assert read["a"].dtype == array.dtype
    np.testing.assert_array_equal(read["a"], array)
    np.testing.assert_array_equal(read["list"][0], array[0])
    assert (read["count"], read["list"][1:]) == (2.5, ["text", None, (1, 2)])


def test_feature_stats_of_stylegan_and_sid_are_over_n_and_convert_exactly(tmp_path):
    read = read_statistics(dumped(tmp_path / "cifar10.pkl", feature_stats()))
    assert (read.n, read.ddof) == (N, 0)
    torch.testing.assert_close(read.covariance, TRUTH.covariance * (N - 1) / N, rtol=1e-12, atol=1e-12)
    close(read.with_ddof(1))


@pytest.mark.parametrize("keep_sums", [True, False])
def test_feature_stats_that_kept_features_alone_are_not_taken_for_zeros(tmp_path, keep_sums):
    path = dumped(tmp_path / "a.pkl", feature_stats(keep_features=True, keep_sums=keep_sums))
    close(read_statistics(path).with_ddof(1))


def test_a_cache_file_of_torch_fidelity_is_read(tmp_path):
    cache_lookup_one_recompute_on_miss(
        "data-inception-stat-fid-2048",
        lambda: fid_features_to_statistics(torch.from_numpy(FEATURES)),
        cache=True,
        cache_root=str(tmp_path),
        verbose=False,
    )
    close(read_statistics(tmp_path / "data-inception-stat-fid-2048.pt"), rtol=1e-6)


def test_a_saved_tensor_of_features_is_read(tmp_path):
    torch.save(torch.from_numpy(FEATURES), tmp_path / "data-features-2048.pt")
    close(read_statistics(tmp_path / "data-features-2048.pt"))


class Malice:
    """A pickle that makes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", [lambda x: x, lambda x: {"fid": x}, lambda x: {**edm2(), "more": [x]}])
@pytest.mark.parametrize("suffix", [".pkl", ".pt"])
def test_a_malicious_pickle_is_refused_by_the_name_of_what_it_calls_and_not_run(tmp_path, place, suffix):
    path, proof = tmp_path / f"evil{suffix}", tmp_path / "proof"
    content = place(Malice(proof))
    if suffix == ".pkl":
        dumped(path, content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=r"posix.system"):
        read_statistics(path)
    assert not proof.exists()
    pickle.loads(pickle.dumps(content))  # It does work where pickles run.
    assert proof.exists()


@pytest.mark.parametrize(
    "call",
    [
        (eval, ("1",)),
        (getattr, ("x", "upper")),
        (np.load, ("x",)),
        (__import__, ("os",)),
        (np.zeros, (3,)),
        (torch.zeros, (3,)),
        (types.SimpleNamespace, ()),
    ],
)
def test_only_what_arrays_need_is_called(tmp_path, call):
    class Calls:
        def __reduce__(self):
            return call

    with pytest.raises(UserError, match="which is not run"):
        read_statistics(dumped(tmp_path / "a.pkl", {"fid": Calls()}))


@pytest.mark.parametrize(
    "target",
    ["numpy\ndtype", "numpy\nndarray", "dnnlib\nEasyDict", "numpy.core.multiarray\n_reconstruct", "builtins\ndict"],
)
def test_a_pickle_cannot_change_how_the_next_file_is_read(tmp_path, easy_dict, target):
    path = tmp_path / "evil.pkl"
    slots = b"".join(b"X%c\0\0\0%sN" % (len(name), name) for name in (b"__setstate__", b"__init__", b"__setitem__"))
    path.write_bytes(b"\x80\x02c" + target.encode() + b"\n(N(" + slots + b"dtb.")  # BUILD with attributes to set.
    with pytest.raises(UserError):
        read_statistics(path)
    close(read_statistics(dumped(tmp_path / "a.pkl", edm2(easy_dict))))


@pytest.mark.parametrize("order", ["O,", "3", "(2,2)", ""])
def test_a_forged_byte_order_cannot_make_another_dtype(tmp_path, order):
    plain = pickle.dumps({"mu": MU}, protocol=2)
    assert plain.count(b"X\x01\0\0\0<") == 1
    forged = plain.replace(b"X\x01\0\0\0<", b"X%c\0\0\0%s" % (len(order), order.encode()))
    (tmp_path / "a.pkl").write_bytes(forged)
    with pytest.raises(UserError, match="byte order"):
        read_statistics(tmp_path / "a.pkl")


def test_a_dtype_of_objects_in_a_pickle_is_refused(tmp_path):
    with pytest.raises(UserError, match="objects are not"):
        read_statistics(dumped(tmp_path / "a.pkl", {"mu": np.array([None, 1], object), "sigma": SIGMA}))


def test_an_npz_of_python_objects_is_refused_with_what_to_do(tmp_path):
    np.savez(tmp_path / "a.npz", mu=MU, sigma=np.array([SIGMA, None], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="save mu and sigma as float64"):
        read_statistics(tmp_path / "a.npz")


def test_float32_fortran_order_and_big_endian_sigmas_are_read_as_float64_and_said(tmp_path):
    np.savez(tmp_path / "a.npz", mu=MU.astype(">f8"), sigma=np.asfortranarray(SIGMA, dtype=">f8"))
    close(read_statistics(tmp_path / "a.npz"))
    np.savez(tmp_path / "b.npz", mu=MU.astype(np.float32), sigma=SIGMA.astype(np.float32))
    read = read_statistics(tmp_path / "b.npz")
    close(read, rtol=1e-6)
    assert read.meta["stored"] == "float32"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"mu": MU, "sigma": SIGMA[:5, :5]}, "belong to different files"),
        ({"mu": MU, "sigma": SIGMA[:5]}, "belong to different files"),
        ({"mu": MU[None], "sigma": SIGMA}, "expected 1 dimension"),
        ({"mu": MU, "sigma": SIGMA.diagonal()}, "expected 2 dimensions"),
        ({"mu": MU[:0], "sigma": SIGMA[:0]}, "mu is empty"),
        ({"mu": MU, "sigma": SIGMA + np.triu(np.ones((D, D)), 1)}, "not symmetric"),
        ({"mu": MU, "sigma": -SIGMA}, "negative variances"),
        ({"mu": np.where(MU > 0, np.nan, MU), "sigma": SIGMA}, "mu holds infinite or undefined"),
        ({"mu": MU, "sigma": SIGMA * np.inf}, "sigma holds infinite or undefined"),
        ({"mu": MU, "sigma": SIGMA.astype(np.float16)}, "dtype float16"),
        ({"mu": MU, "sigma": SIGMA.astype(np.int64)}, "dtype int64"),
        ({"mu": MU, "sigma": SIGMA.astype(complex)}, "dtype complex128"),
        ({"m": MU, "s": SIGMA}, r"no statistics for fid; it holds m, s"),
        ({"mu": MU}, "it holds mu$"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}, "holds images"),
        ({"feats": FEATURES[:1]}, "two features or more"),
        ({"mu": MU, "sigma": SIGMA, "ddof": 1, "meta": "no json"}, "form that is not known"),
        ({"mu": MU, "sigma": SIGMA, "ddof": 1, "meta": "{}"}, "form that is not known"),
    ],
)
def test_an_npz_without_a_covariance_is_refused_by_name(tmp_path, content, reason):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(UserError, match=reason) as error:
        read_statistics(tmp_path / "a.npz")
    assert str(tmp_path / "a.npz") in str(error.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([MU, SIGMA], "list, not a dictionary"),
        ({"num_images": N, "fid": MU}, "mu and sigma are missing where EDM2"),
        ({**feature_stats(), "num_items": 0}, "statistics of 0 images"),
        ({**feature_stats(), "raw_cov": None}, "raw_cov is of dtype object"),
        ({**feature_stats(keep_sums=False)}, "neither sums nor features"),
        ({"a": 1, 2: "b"}, "it holds 2, a"),
    ],
)
def test_a_pickle_without_statistics_is_refused_by_name(tmp_path, content, reason):
    with pytest.raises(UserError, match=reason):
        read_statistics(dumped(tmp_path / "a.pkl", content))


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("form", ["npz", "pkl", "pt"])
def test_a_truncated_file_is_named(tmp_path, share, form):
    path = tmp_path / f"a.{form}"
    if form == "npz":
        np.savez(path, mu=MU, sigma=SIGMA)
    elif form == "pkl":
        dumped(path, edm2())
    else:
        torch.save({"mu": MU, "sigma": SIGMA}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"a\.\w+ is truncated"):
        read_statistics(path)


def test_what_is_not_there_or_of_another_suffix_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.npz is not a file"):
        read_statistics(tmp_path / "gone.npz")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"\.npz, \.pkl or \.pt, got"):
        read_statistics(tmp_path / "a.txt")
    with pytest.raises(UserError, match="fid, fd-dinov2, sfid, got 'kid'"):
        read_statistics(tmp_path / "a.npz", kind="kid")


def test_statistics_of_another_extractor_or_dimension_are_refused(tmp_path):
    write_statistics(tmp_path / "a.npz", OWN)
    close(read_statistics(tmp_path / "a.npz", extractor="inception-clean", dimension=D))
    with pytest.raises(UserError, match="extractor inception-clean, expected inception-pytorch"):
        read_statistics(tmp_path / "a.npz", extractor="inception-pytorch")
    with pytest.raises(UserError, match="6 features, expected 2048"):
        read_statistics(tmp_path / "a.npz", dimension=2048)
    np.savez(tmp_path / "b.npz", mu=MU, sigma=SIGMA)
    close(read_statistics(tmp_path / "b.npz", extractor="dinov2"))  # It does not say of which it is.


def test_statistics_of_images_that_were_resized_in_another_way_are_refused(tmp_path):
    clean = protocol("clean")
    write_statistics(tmp_path / "a.npz", OWN, protocol=clean)
    close(read_statistics(tmp_path / "a.npz", sees=clean.sees("fid")))
    other = clean.changed({"prepare": ("center-crop", "bicubic-float 299")})
    with pytest.raises(UserError, match="of stored image > bicubic-float 299 > inception-clean, expected stored image"):
        read_statistics(tmp_path / "a.npz", sees=other.sees("fid"))
    write_statistics(tmp_path / "b.npz", OWN)
    close(read_statistics(tmp_path / "b.npz", sees=other.sees("fid")))  # It does not say.


def test_what_is_written_is_read_back_with_all_that_is_known(tmp_path):
    how = protocol("clean").changed({"samples": N})
    features = torch.from_numpy(FEATURES)
    write_statistics(tmp_path / "a.npz", replace(OWN, ddof=0, features=features), protocol=how, weights="ab" * 32)
    read = read_statistics(tmp_path / "a.npz")
    assert torch.equal(read.mean, OWN.mean)
    assert torch.equal(read.covariance, OWN.covariance)
    assert read.features is not None
    assert torch.equal(read.features[:], features)
    assert (read.n, read.ddof, read.extractor) == (N, 0, "inception-clean")
    assert read.meta["protocol"] == {"name": how.name, "digest": how.digest(), "text": how.text()}
    assert (read.weights, read.meta["made"]) == ("ab" * 32, "here")
    assert read.meta["versions"]["numpy"] == np.__version__
    write_statistics(tmp_path / "b.npz", read)
    assert read_statistics(tmp_path / "b.npz").meta == read.meta
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npz", "b.npz"]


def test_what_is_written_is_read_by_numpy_pytorch_fid_and_clean_fid(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    write_statistics(path, replace(OWN, features=torch.from_numpy(FEATURES)))
    with np.load(path, allow_pickle=False) as plain:
        np.testing.assert_array_equal(plain["mu"], MU)
        np.testing.assert_array_equal(plain["sigma"], SIGMA)
        assert plain["sigma"].dtype == np.float64
        assert plain["n"] == N
    mu, sigma = compute_statistics_of_path(str(path), None, 1, D, "cpu")
    np.testing.assert_array_equal(mu, MU)
    np.testing.assert_array_equal(sigma, SIGMA)
    monkeypatch.setattr(cleanfid.features, "check_download_url", lambda **_: str(path))
    clean = cleanfid.features.get_reference_statistics("x", "na", split="custom")
    np.testing.assert_array_equal(np.vstack(clean or ()), np.vstack([MU, SIGMA]))
    feats = cleanfid.features.get_reference_statistics("x", "na", split="custom", metric="KID")
    np.testing.assert_array_equal(feats, FEATURES)


def test_a_file_for_one_distance_is_not_read_for_another(tmp_path):
    write_statistics(tmp_path / "a.npz", OWN, kind="fd-dinov2")
    close(read_statistics(tmp_path / "a.npz", kind="fd-dinov2"))
    with pytest.raises(UserError, match="statistics for fd-dinov2, expected fid"):
        read_statistics(tmp_path / "a.npz")
    with pytest.raises(UserError, match="statistics for fd-dinov2, expected sfid"):
        read_statistics(tmp_path / "a.npz", kind="sfid")


INCEPTION = replace(OWN, extractor="inception")
MADE = {"npz": "npz", "edm2": "pkl", "sid": "pkl", "torch-fidelity": "pt"}


@pytest.mark.parametrize("kind", ["fid", "fd-dinov2"])
@pytest.mark.parametrize(("one", "other"), sorted(set(product(MADE, MADE)) - {("torch-fidelity", "sid")}))
def test_every_form_becomes_every_other(tmp_path, one, other, kind):
    first, second = tmp_path / f"first.{MADE[one]}", tmp_path / f"second.{MADE[other]}"
    write_statistics(tmp_path / "own.npz", INCEPTION, kind=kind)
    convert(tmp_path / "own.npz", first, form=one)
    convert(first, second, kind=kind, form=other)
    read = read_statistics(second, kind=kind)
    close(read.with_ddof(1), rtol=1e-6 if "torch-fidelity" in (one, other) else 1e-12)  # Its mean is float32.
    assert read.n == (None if "torch-fidelity" in (one, other) else N)


def test_sums_over_an_unknown_number_of_images_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", mu=MU, sigma=SIGMA)
    with pytest.raises(UserError, match=r"a\.npz: .*known n above 0, got n = not known"):
        convert(tmp_path / "a.npz", tmp_path / "a.pkl", form="sid")


def test_edm2_reads_a_section_for_each_distance_and_their_number_of_images(tmp_path):
    write_statistics(
        tmp_path / "a.npz", INCEPTION, others={"fd-dinov2": replace(OWN, mean=OWN.mean + 1, weights="ab" * 32)}
    )
    written, left = convert(tmp_path / "a.npz", tmp_path / "a.pkl")
    assert (list(written), left) == (["fid", "fd-dinov2"], [])
    plain = pickle.loads((tmp_path / "a.pkl").read_bytes())
    assert plain.keys() == {"num_images", "fid", "fd_dinov2"}
    assert plain["num_images"] == N
    np.testing.assert_array_equal(plain["fid"]["mu"], MU)
    np.testing.assert_array_equal(plain["fid"]["sigma"], SIGMA)
    np.testing.assert_array_equal(plain["fd_dinov2"]["mu"], MU + 1)
    convert(tmp_path / "a.pkl", tmp_path / "b.npz")
    both = [read_statistics(tmp_path / "b.npz", kind=kind) for kind in ("fid", "fd-dinov2")]
    assert [(fit.n, fit.ddof, fit.mean[0].item()) for fit in both] == [(N, 1, MU[0]), (N, 1, MU[0] + 1)]
    assert read_statistics(tmp_path / "a.npz", kind="fd-dinov2").weights == "ab" * 32


def test_statistics_of_another_network_are_not_passed_to_edm2_as_those_of_its_own(tmp_path):
    write_statistics(tmp_path / "a.npz", OWN)
    with pytest.raises(UserError, match=r"of extractor inception, got inception-clean"):
        convert(tmp_path / "a.npz", tmp_path / "a.pkl")


class FeatureStats:
    """How StyleGAN and SiD load their statistics: every item of the pickle becomes an attribute."""

    def __init__(self, path):
        self.num_items = self.max_items = self.num_features = 0
        self.raw_mean = self.raw_cov = np.empty(0)
        self.__dict__.update(pickle.loads(path.read_bytes()))

    def get_mean_cov(self):
        mean = self.raw_mean / self.num_items
        return mean, self.raw_cov / self.num_items - np.outer(mean, mean)


def test_sid_loads_the_attributes_of_its_feature_stats(tmp_path):
    write_statistics(tmp_path / "a.npz", OWN)
    convert(tmp_path / "a.npz", tmp_path / "a.pkl", form="sid")
    loaded = FeatureStats(tmp_path / "a.pkl")
    assert vars(loaded).keys() == feature_stats().keys()
    assert (loaded.num_items, loaded.max_items, loaded.num_features) == (N, N, D)
    mean, covariance = loaded.get_mean_cov()
    np.testing.assert_allclose(mean, MU, rtol=1e-14)
    np.testing.assert_allclose(covariance, SIGMA * (N - 1) / N, rtol=1e-12, atol=1e-12)
    for name, expected in feature_stats().items():
        np.testing.assert_allclose(vars(loaded)[name], expected, rtol=1e-12)


def test_torch_fidelity_compares_features_with_a_file_that_was_put_into_its_cache(tmp_path):
    write_statistics(tmp_path / "a.npz", OWN)
    convert(tmp_path / "a.npz", tmp_path / "refs-network-stat-fid-2048.pt")

    def refuse():
        raise AssertionError("it is in the cache")

    name = "refs-network-stat-fid-2048"
    cached = cache_lookup_one_recompute_on_miss(name, refuse, cache=True, cache_root=str(tmp_path), verbose=False)
    own = fid_features_to_statistics(torch.from_numpy(FEATURES))
    shifted = fid_features_to_statistics(torch.from_numpy(FEATURES + np.float32(0.5)))
    for other, distance in ((own, 0), (shifted, 0.25 * D)):
        found = fid_statistics_to_metric(cached, other, verbose=False)["frechet_inception_distance"]
        assert found == pytest.approx(distance, rel=1e-6, abs=1e-6)


def adm(path):
    """A reference as guided-diffusion offers them: images, and statistics of more."""
    images = np.arange(5 * 4 * 4 * 3, dtype=np.uint8).reshape(5, 4, 4, 3)
    np.savez(path, arr_0=images, mu=MU, sigma=SIGMA, mu_s=MU[:2], sigma_s=SIGMA[:2, :2])
    return images


def test_a_reference_of_adm_stays_one_with_its_images_and_spatial_statistics(tmp_path):
    images = adm(tmp_path / "a.npz")
    assert convert(tmp_path / "a.npz", tmp_path / "b.npz").left == []
    written, left = convert(tmp_path / "b.npz", tmp_path / "c.npz", form="adm")
    assert (list(written), left) == (["fid", "sfid"], [])
    with np.load(tmp_path / "c.npz") as plain, np.load(tmp_path / "a.npz") as first:
        np.testing.assert_array_equal(plain["arr_0"], images)
        for name in first.files:
            np.testing.assert_array_equal(plain[name], first[name])


def test_what_adm_needs_and_is_not_there_is_named(tmp_path):
    write_statistics(tmp_path / "a.npz", OWN)
    with pytest.raises(UserError, match=r"a\.npz: .* there is no arr_0, no mu_s, no sigma_s; another --form"):
        convert(tmp_path / "a.npz", tmp_path / "b.npz", form="adm")


def test_what_a_form_has_no_place_for_is_said(tmp_path):
    adm(tmp_path / "a.npz")
    written, left = convert(tmp_path / "a.npz", tmp_path / "a.pkl")
    assert (list(written), left) == (["fid"], ["sfid", "images (arr_0)"])
    written, left = convert(dumped(tmp_path / "b.pkl", edm2()), tmp_path / "b.pt")
    assert (list(written), left) == (["fid"], ["fd-dinov2"])


def test_one_kind_of_several_is_converted_alone(tmp_path):
    adm(tmp_path / "a.npz")
    convert(tmp_path / "a.npz", tmp_path / "s.npz", kind="sfid")
    assert np.load(tmp_path / "s.npz")["sigma_s"].shape == (2, 2)
    assert len(read_statistics(tmp_path / "s.npz", kind="sfid").mean) == 2
    with pytest.raises(UserError, match="holds fid or fd-dinov2, got sfid"):
        convert(tmp_path / "a.npz", tmp_path / "s.pkl", kind="sfid")


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("b.txt", None, r"npz \(\.npz\), .* got .*b\.txt"),
        ("b.npz", "edm2", r"got .*b\.npz for --form edm2"),
        ("b.npz", "matlab", "got --form matlab"),
    ],
)
def test_a_form_that_is_none_or_of_another_suffix_is_refused(tmp_path, name, form, reason):
    write_statistics(tmp_path / "a.npz", OWN)
    with pytest.raises(UserError, match=reason):
        convert(tmp_path / "a.npz", tmp_path / name, form=form)
    assert not (tmp_path / name).exists()


def test_converting_feature_stats_divides_by_n_minus_1_as_the_readers_of_npz_expect(tmp_path):
    convert(dumped(tmp_path / "a.pkl", feature_stats()), tmp_path / "b.npz")
    np.testing.assert_allclose(np.load(tmp_path / "b.npz")["sigma"], SIGMA, rtol=1e-12, atol=1e-12)


def test_another_divisor_needs_the_number_of_images():
    assert OWN.with_ddof(1) is OWN
    torch.testing.assert_close(OWN.with_ddof(0).with_ddof(1).covariance, OWN.covariance, rtol=1e-15, atol=0)
    with pytest.raises(UserError, match="got n = not known"):
        replace(OWN, n=None).with_ddof(0)
    with pytest.raises(UserError, match="known n above 1, got n = 1"):
        replace(OWN, n=1, ddof=0).with_ddof(1)


def test_a_file_that_does_not_say_how_many_images_it_is_of_is_compared_with_all_the_same():
    assert OWN.moments().n == N
    unknown = replace(OWN, n=None).moments()
    assert unknown.n is None
    assert Reference(unknown).distance(TRUTH) == pytest.approx(0, abs=1e-12)


def test_a_reference_from_a_file_is_at_zero_from_its_own_features(tmp_path):
    write_statistics(tmp_path / "a.npz", OWN)
    assert Reference(read_statistics(tmp_path / "a.npz").moments()).distance(TRUTH) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["a.pkl", "a.txt", "a"])
def test_other_suffixes_are_not_written(tmp_path, name):
    with pytest.raises(UserError, match=r"written as \.npz, got"):
        write_statistics(tmp_path / name, OWN)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_statistics(tmp_path / "a.npz", OWN)
    before = (tmp_path / "a.npz").read_bytes()

    def full(file, **_):
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(UserError, match=r"cannot write .*a\.npz: No space left"):
        write_statistics(tmp_path / "a.npz", replace(OWN, n=7))
    assert (tmp_path / "a.npz").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*gone/a\.npz: No such file"):
        write_statistics(tmp_path / "gone" / "a.npz", OWN)


def test_a_pickle_written_here_names_nothing_but_numpy():
    names = {argument for _, argument, _ in pickletools.genops(pickled(edm2())) if isinstance(argument, str)}
    assert {name for name in names if "." in name} == {"numpy._core.multiarray"}

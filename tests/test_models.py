"""Reference models: the shipped one is what its card says, and every recipe exports what it promises."""

from __future__ import annotations

import gzip
import hashlib
import re
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

from mscompile.errors import DataError, UsageError
from mscompile.models import NAMES, mnist, path
from mscompile.models.__main__ import main

# --- the shipped model -----------------------------------------------------------------------------------------------


def logits(file: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {session.get_inputs()[0].name: x})[0]


def test_shipped_model_is_valid_and_takes_any_batch():
    onnx.checker.check_model(onnx.load(path()), full_check=True)
    for batch in (1, 7):
        assert logits(path(), np.zeros((batch, 1, 8, 8), np.float32)).shape == (batch, 10)


def test_card_tells_accuracy_and_checksum():
    card = path().with_suffix(".md").read_text(encoding="utf-8")
    with np.load(path().with_suffix(".calib.npz")) as data:
        x, label = data["x"], data["label"]
    assert (x.dtype, x.shape, label.dtype, label.shape) == (np.float32, (797, 1, 8, 8), np.int64, (797,))
    right = int((logits(path(), x).argmax(1) == label).sum())
    stated = re.search(r"test accuracy: ([\d.]+) \((\d+) of 797 images\)", card)
    assert stated, "the card states no accuracy"
    assert right == int(stated[2])
    assert right / 797 == pytest.approx(float(stated[1]), abs=1e-6)
    assert right / 797 >= 0.98
    assert f"sha256: `{hashlib.sha256(path().read_bytes()).hexdigest()}`" in card


def test_shipped_calibration_was_never_trained_on():
    datasets = pytest.importorskip("sklearn.datasets")
    from mscompile.models.data import digits_data

    data = digits_data(None, seed=3)
    with np.load(path().with_suffix(".calib.npz")) as shipped:
        np.testing.assert_array_equal(shipped["x"], data.test[0])
        np.testing.assert_array_equal(shipped["label"], data.test[1])
    # Every image of the set is in exactly one part; no two of the 1797 are the same picture.
    both = np.concatenate([data.train[0], data.test[0]]).reshape(1797, 64)
    everything = (datasets.load_digits().data / 16).astype(np.float32)
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(everything, axis=0))
    assert len(np.unique(both, axis=0)) == 1797


def test_shipped_files_are_small_and_clean():
    files = [path(), path().with_suffix(".calib.npz"), path().with_suffix(".md")]
    assert sum(f.stat().st_size for f in files) < 1_000_000
    model = onnx.load(path())
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        assert not part.metadata_props
        assert not part.doc_string
    for file in files:
        raw = file.read_bytes()
        assert not any(word in raw for word in (b"/home", b"/root", b"/Users", str(Path.cwd()).encode(), b"stack_trace"))


def test_path_names_only_what_is_shipped():
    assert path().is_file()
    for name in ("mlp", "../digits", "nothing"):
        with pytest.raises(UsageError, match=r"no reference model"):
            path(name)


# --- MNIST files -----------------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for part, n in (("train", 6), ("t10k", 4)):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(rng.integers(0, 256, (n, 28, 28))))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(n)))
    return tmp_path


def test_mnist_reads_plain_and_gzipped_alike(folder: Path):
    plain = mnist.read(folder)
    assert [images.shape for images, _ in plain] == [(6, 28, 28), (4, 28, 28)]
    assert plain[0][1].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(plain[0][0], np.random.default_rng(0).integers(0, 256, (6, 28, 28)))
    for file in list(folder.iterdir()):
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    for (x, y), (gz_x, gz_y) in zip(plain, mnist.read(folder), strict=True):
        np.testing.assert_array_equal(x, gz_x)
        np.testing.assert_array_equal(y, gz_y)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, None, "No such file"),
        (IMAGES, b"", "does not begin like an idx file"),
        (IMAGES, idx(np.zeros((6, 28))), "does not begin like an idx file"),
        (IMAGES, b"\0\0\x0d" + idx(np.zeros((6, 28, 28)))[3:], "does not begin like an idx file"),
        (IMAGES, idx(np.zeros((6, 8, 8))), r"shape \(6, 8, 8\)"),
        (IMAGES, idx(np.zeros((0, 28, 28))), "at least one"),
        (IMAGES, idx(np.zeros((6, 28, 28)))[:-1], "promises 4704 bytes of data, it holds 4703"),
        (IMAGES, idx(np.zeros((6, 28, 28))) + b"\0", "promises 4704 bytes of data, it holds 4705"),
        (LABELS, idx(np.zeros(5)), "6 images and 5 labels"),
        (LABELS, idx(np.full(6, 10)), "label 10"),
        (f"{LABELS}.gz", b"no gzip", "Not a gzipped file"),
        (f"{LABELS}.gz", gzip.compress(idx(np.zeros(6)))[:-4], "end-of-stream"),
        (f"{LABELS}.gz", gzip.compress(b"")[:10] + b"\xff" * 20, "decompressing"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mnist_rejects_what_it_cannot_trust(folder: Path, name: str, content: bytes | None, message: str):
    (folder / name.removesuffix(".gz")).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        mnist.read(folder)
    assert re.search(message, str(caught.value))
    assert "train" in str(caught.value)


# --- the command -----------------------------------------------------------------------------------------------------


def test_package_and_help_need_no_torch():
    code = (
        "import sys; sys.modules['torch'] = None; import mscompile.models, mscompile.models.data; "
        "from mscompile.models.__main__ import main; main(['train', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|".join(NAMES) in done.stdout


def test_missing_torch_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for module in ("architectures", "export", "training"):
        monkeypatch.delitem(sys.modules, f"mscompile.models.{module}", raising=False)
        monkeypatch.delattr(f"mscompile.models.{module}", raising=False)
    done = CliRunner().invoke(main, ["train", "digits", "-o", str(tmp_path)])
    assert done.exit_code == UsageError.exit_code
    assert "mscompile[torch]" in done.stderr


@pytest.mark.torch
def test_missing_data_are_explained(tmp_path: Path):
    pytest.importorskip("torch")
    for data, code in ([], UsageError.exit_code), (["--data", str(tmp_path)], DataError.exit_code):
        done = CliRunner().invoke(main, ["train", "mlp", *data, "-o", str(tmp_path / "out")])
        assert (done.exit_code, "idx files" in done.stderr) == (code, True)
    assert not (tmp_path / "out").exists()


# --- the recipes -----------------------------------------------------------------------------------------------------

SHAPES = {"mlp": (784,), "cnn": (1, 28, 28), "resnet": (1, 28, 28), "vit": (1, 28, 28), "digits": (1, 8, 8)}
KINDS = {
    "mlp": {"Gemm": 3, "Relu": 2},
    "cnn": {"Conv": 3, "Relu": 4, "MaxPool": 2, "Reshape": 1, "Gemm": 2},
    "resnet": {"Conv": 7, "BatchNormalization": 7, "Relu": 7, "MaxPool": 2, "Add": 3, "ReduceMean": 1, "Gemm": 1},
    "resnet_folded": {"Conv": 7, "Relu": 7, "MaxPool": 2, "Add": 3, "ReduceMean": 1, "Gemm": 1},
    "vit": {"Conv": 1, "LayerNormalization": 9, "Softmax": 4, "Gelu": 4, "Gemm": 1},
    "decoder": {"Gather": 1, "LayerNormalization": 7, "Softmax": 3, "Gelu": 3},
    "digits": {"Conv": 3, "BatchNormalization": 1, "Relu": 4, "MaxPool": 2, "Reshape": 1, "Gemm": 2},
}


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_exports_what_it_computes(name: str, tmp_path: Path):
    torch = pytest.importorskip("torch")
    from mscompile.models.architectures import ARCHITECTURES
    from mscompile.models.data import ALPHABET, CONTEXT
    from mscompile.models.export import export, fold

    assert tuple(ARCHITECTURES) == NAMES
    rng = np.random.default_rng(0)
    if name == "decoder":
        source, out = "tokens", (CONTEXT, len(ALPHABET))
        x = rng.integers(0, len(ALPHABET), (5, CONTEXT))
    else:
        source, out = "x", (10,)
        x = rng.random((5, *SHAPES[name]), np.float32)
    torch.manual_seed(0)
    model = ARCHITECTURES[name].build()
    model.train()
    with torch.no_grad():
        model(torch.from_numpy(x))  # batch normalisation takes statistics worth keeping
    model.eval()
    files = {name: model} | ({f"{name}_folded": fold(model)} if ARCHITECTURES[name].fold else {})
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    for stem, network in files.items():
        file = tmp_path / f"{stem}.onnx"
        export(network, x[:3], file)
        proto = onnx.load(file)
        onnx.checker.check_model(proto, full_check=True)
        assert [o.version for o in proto.opset_import if o.domain == ""] == [20]
        assert [v.name for v in proto.graph.input] == [source]
        assert [v.name for v in proto.graph.output] == ["logits"]
        assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert not proto.functions
        kinds = Counter(node.op_type for node in proto.graph.node)
        if name in ("vit", "decoder"):
            assert {kind: kinds[kind] for kind in KINDS[stem]} == KINDS[stem]
            assert not kinds.keys() & {"Shape", "Concat", "Identity", "Constant", "Where", "Cast"}
        else:
            assert kinds == KINDS[stem]
        for batch in (1, 5):
            got = logits(file, x[:batch])
            assert got.shape == (batch, *out)
            np.testing.assert_allclose(got, expected[:batch], atol=1e-4)


SCALARS = {"vit": 1}
"""Numbers that the exporter writes into the file: the scale of the attention scores, shared by all blocks."""


@pytest.mark.torch
@pytest.mark.parametrize("name", ["mlp", "resnet", "vit"])
def test_sizes_agree_with_a_count_by_torch(name: str, tmp_path: Path):
    """Multiply-accumulates and parameters of the file against torch's own counter of floating-point operations."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from mscompile.models.architectures import ARCHITECTURES
    from mscompile.models.export import export
    from mscompile.network.dense import open_dense
    from mscompile.network.sizes import count_macs, count_parameters

    model, x = ARCHITECTURES[name].build().eval(), np.zeros((3, *SHAPES[name]), np.float32)
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    with torch.no_grad():
        for tensor in tensors:  # equal ones would be stored once
            tensor.add_(1e-3 * torch.rand_like(tensor))
    export(model, x, tmp_path / "model.onnx")
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.from_numpy(x[:1]))
    dense = open_dense(tmp_path / "model.onnx").model
    assert 2 * (count_macs(dense, {"x": (1, *SHAPES[name])}) or 0) == counter.get_total_flops()
    assert count_parameters(dense) == sum(tensor.numel() for tensor in tensors) + SCALARS.get(name, 0)


@pytest.mark.torch
def test_decoder_sees_no_future():
    torch = pytest.importorskip("torch")
    from mscompile.models.architectures import ARCHITECTURES
    from mscompile.models.data import ALPHABET, CONTEXT

    torch.manual_seed(0)
    model = ARCHITECTURES["decoder"].build().eval()
    tokens = torch.randint(0, len(ALPHABET), (2, CONTEXT))
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % len(ALPHABET)
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


@pytest.mark.torch
def test_training_writes_everything_and_repeats_itself(folder: Path, tmp_path: Path):
    pytest.importorskip("torch")
    reports = []
    for out in (tmp_path / "a", tmp_path / "b"):
        done = CliRunner().invoke(main, ["train", "resnet", "--data", str(folder), "-o", str(out), "--epochs", "1"])
        assert done.exit_code == 0, done.output
        reports.append(done.stdout.replace(str(out), ""))
        stems = ("resnet", "resnet_folded")
        assert {f.name for f in out.iterdir()} == {
            f"{stem}.{ending}" for stem in stems for ending in ("onnx", "md", "calib.npz", "test.npz")
        }
        for stem in stems:
            digest = hashlib.sha256((out / f"{stem}.onnx").read_bytes()).hexdigest()
            assert digest in (out / f"{stem}.md").read_text(encoding="utf-8")
            assert digest in done.stdout
        for part, n in (("calib", 6), ("test", 4)):
            with np.load(out / f"resnet.{part}.npz") as data:
                assert (data["x"].shape, data["x"].dtype) == ((n, 1, 28, 28), np.float32)
                assert (data["label"].shape, data["label"].dtype) == ((n,), np.int64)
                assert 0 <= data["x"].min() < data["x"].max() <= 1
    assert reports[0] == reports[1]

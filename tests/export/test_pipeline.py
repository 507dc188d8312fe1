"""Exporting: every weight type passes its own checks, faults are found, and a bundle appears whole or not at all."""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint
from PIL import Image

from owl2 import Owl2
from owl2.export import decoder
from owl2.export.checkpoint.checkpoint import Checkpoint
from owl2.export.config import ExportConfig
from owl2.export.graph.ort_dialect import OrtDialect
from owl2.export.job.staging import Staging, check_space
from owl2.export.pipeline import estimate_size, export_bundle
from owl2.quant.config import QuantConfig
from owl2.quant.layer import LINEARS, QuantizedLinear
from owl2.quant.models.mplug_owl2 import DecoderLayer, Owl2Model
from owl2.quant.stream import Calibration, Stream
from owl2.runtime.bundle import Bundle
from owl2.runtime.errors import CalibrationError, ConfigError, ExportError, ParityError
from owl2.runtime.preprocess import load_image, preprocess

COMMAND = (sys.executable, "-m", "owl2.export")


@pytest.fixture
def a1(golden: Path) -> Path:
    return golden / "a1_base_bin" / "model"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three images, one with a text."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    (folder / "1.txt").write_text("Some noise.\n")
    return folder


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.slow
class TestWeights:
    @pytest.mark.parametrize(
        ("weights", "vision", "method"),
        [
            ("int4", None, "gptq"),
            ("int4", "fp16", "rtn"),
            ("int8", "fp32", "gptq"),
            ("fp16", None, "gptq"),
            ("fp32", "int8", "gptq"),
        ],
    )
    def test_every_type_is_written_and_checked(
        self, a1: Path, tmp_path: Path, photos: Path, weights: str, vision: str, method: str
    ) -> None:
        target = tmp_path / "bundle"
        config = ExportConfig(
            a1, target, weights=weights, vision=vision, method=method, calibration=photos, group_size=32
        )
        report = export_bundle(config)
        manifest = Bundle.open(target).manifest
        assert manifest.weights.decoder == weights
        assert manifest.weights.vision == config.vision_type
        assert manifest.weights.head == ("int8" if config.quant else weights)
        assert manifest.weights.method == (method if config.quant else "none")
        assert json.loads((target / "report.json").read_text())["parity"][1]["exact"] < 1e-4
        assert [parity.graph for parity in report.parity] == ["vision.onnx", "decoder.onnx"]
        quantized = config.quant is not None and method == "gptq"
        expected = {f"layers.{i}.{name}" for i in range(3) for name in LINEARS} if quantized else set()
        assert set(report.modules) == expected
        assert all(module.error < module.rtn_error for module in report.modules.values())
        size = sum(path.stat().st_size for path in target.iterdir())
        # Page alignment of the weights and the graphs themselves weigh little beside real weights only.
        assert 0.3 * size < estimate_size(manifest.model, config) < size

    def test_fewer_bits_lose_more(self, a1: Path, tmp_path: Path, photos: Path) -> None:
        kls = []
        for weights in ("fp32", "fp16", "int8", "int4"):
            config = ExportConfig(a1, tmp_path / weights, weights=weights, vision="fp32", calibration=photos)
            kls.append(export_bundle(config).accuracy.kl_text)
        assert kls == sorted(kls)
        assert kls[0] < 1e-9
        assert kls[-1] > 1e-3

    def test_gptq_beats_rounding_on_the_sample_model(
        self, sample_checkpoint: Path, sample_bundle: Path, tmp_path: Path
    ) -> None:
        config = ExportConfig(sample_checkpoint, tmp_path / "rounded", method="rtn")
        rounded = export_bundle(config).accuracy
        kept = json.loads((sample_bundle / "report.json").read_text())["accuracy"]
        assert kept["kl_text"] < 0.7 * rounded.kl_text
        assert kept["mean_abs_logit_difference"] < rounded.mean_abs_logit_difference

    def test_the_same_export_gives_the_same_graphs(self, a1: Path, tmp_path: Path, photos: Path) -> None:
        for name in ("one", "two"):
            export_bundle(ExportConfig(a1, tmp_path / name, calibration=photos))
        files = [Bundle.open(tmp_path / name).manifest.files for name in ("one", "two")]
        different = {name for name in files[0] if files[0][name] != files[1][name]}
        assert different <= {"report.json"}  # it holds seconds and memory


VARIATIONS = {
    "no_cls_token": {
        "vision": {"use_cls_token": False, "use_post_layernorm": False},
        "abstractor": {"use_cls_token": False},
    },
    "no_cls_token_free_grid": {
        "vision": {"use_cls_token": False, "image_size": 16 * 14},
        "abstractor": {"use_cls_token": False, "grid_size": 16},
        "crop_size": 16 * 14,
    },
    "no_post_norm": {"vision": {"use_post_layernorm": False}},
    "gelu": {"vision": {"hidden_act": "gelu"}},
    "attention_bias": {"top": {"attention_bias": True}},
    "linear_rope": {"top": {"rope_scaling": {"type": "linear", "factor": 2.5}}},
    "dynamic_rope": {"top": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 24}},
    "rope_theta": {"top": {"rope_theta": 500.0}},
    "tied_head": {"top": {"tie_word_embeddings": True}},
    "narrow_heads": {"top": {"num_attention_heads": 16, "num_key_value_heads": 16}},
    "heads_of_no_power_of_two": {
        "top": {"hidden_size": 72, "num_attention_heads": 3, "num_key_value_heads": 3, "intermediate_size": 100}
    },
    "epsilons": {
        "top": {"rms_norm_eps": 0.01},
        "vision": {"layer_norm_eps": 0.02},
        "abstractor": {"layer_norm_eps": 0.03},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(VARIATIONS))
def test_variations_of_the_architecture(
    make_checkpoint: MakeCheckpoint, tmp_path: Path, golden: Path, name: str
) -> None:
    """The whole runtime against the whole torch model, for a random checkpoint of each variation."""
    folder, target = make_checkpoint(**VARIATIONS[name]), tmp_path / "bundle"
    export_bundle(ExportConfig(folder, target, weights="fp32"))
    with Checkpoint(folder) as checkpoint:
        model = Owl2Model(checkpoint.config)
        checkpoint.load_into(model, "")
        config = checkpoint.config
    prompt, path = (
        "USER: <|image|>What is it, and what does it mean? ASSISTANT: It is",
        golden / "images" / "00_rgb_landscape_97x61.png",
    )
    context = 64 if name == "dynamic_rope" else None
    owl = Owl2.load(target, context=context)
    made = owl.logits(prompt, images=path)
    ids = torch.tensor([owl._model.tokenizer.encode_prompt(prompt)])
    pixels = torch.from_numpy(preprocess(load_image(path), config.preprocess))[None]
    with torch.no_grad():
        expected = model(ids, pixels)[0].numpy()
    assert name != "dynamic_rope" or len(expected) > config.decoder.max_position_embeddings
    np.testing.assert_allclose(made, expected, atol=1e-3, rtol=0)


class TestFaults:
    """What an export must notice, planted."""

    def planted(self, a1: Path, tmp_path: Path, message: str) -> None:
        with pytest.raises(ParityError, match=message):
            export_bundle(ExportConfig(a1, tmp_path / "bundle", weights="fp32"))
        assert leftovers(tmp_path) == []

    def test_a_wrong_activation(self, a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            OrtDialect, "silu", lambda _, graph, x: graph.op("QuickGelu", x, domain="com.microsoft", alpha=1.01)
        )
        self.planted(a1, tmp_path, r"vision.onnx does not compute .* largest difference 0\.\d+ of the RMS, at most")

    def test_branches_exchanged(self, a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        original = decoder._gains
        monkeypatch.setattr(
            decoder, "_gains", lambda layer: {n: (image, text) for n, (text, image) in original(layer).items()}
        )
        self.planted(a1, tmp_path, "decoder.onnx does not compute")

    def test_a_wrong_position_in_cached_steps(self, a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from owl2.runtime.backends.ort.engine import OrtDecoder

        original = OrtDecoder.decode
        monkeypatch.setattr(OrtDecoder, "decode", lambda self, rows, past, kv: original(self, rows, past - 1, kv))
        self.planted(a1, tmp_path, "decoder.onnx does not compute")


@pytest.mark.slow
def test_calibration_passes_through_the_quantized_layers(
    a1: Path, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What calibrates layer 1 is what the stored layer 0 makes of the rows, not what the original one does."""
    seen: list[Stream] = []
    exact: list[Stream] = []
    layers: list[DecoderLayer] = []
    original = decoder.quantize_layer

    def watched(
        layer: DecoderLayer,
        unchanged: DecoderLayer,
        calibration: Calibration,
        config: QuantConfig,
        name: str,
        kept: Collection[str],
    ) -> dict[str, QuantizedLinear]:
        seen.append(calibration.quantized.copy())
        exact.append(calibration.original.copy())
        layers.append(layer)
        return original(layer, unchanged, calibration, config, name, kept)

    monkeypatch.setattr(decoder, "quantize_layer", watched)
    export_bundle(ExportConfig(a1, tmp_path / "bundle", calibration=photos, group_size=32))
    with Checkpoint(a1) as checkpoint:
        before = DecoderLayer(checkpoint.config.decoder)
        checkpoint.load_into(before, "model.layers.0.")
    rows = [sequence.rows for sequence in seen[1].sequences]
    for given, stored, unquantized, other in zip(
        rows, seen[0].outputs(layers[0]), seen[0].outputs(before), exact[1].sequences
    ):
        torch.testing.assert_close(given, stored)
        torch.testing.assert_close(other.rows, unquantized)
        assert float((given - unquantized).abs().max()) > 1e-3


@pytest.mark.slow
class TestTarget:
    def test_an_existing_bundle_is_kept_unless_overwritten(self, a1: Path, tmp_path: Path) -> None:
        target = tmp_path / "bundle"
        config = ExportConfig(a1, target, weights="fp32")
        export_bundle(config)
        with pytest.raises(ExportError, match="exists; give --overwrite to replace it"):
            export_bundle(replace(config, weights="fp16"))
        assert Bundle.open(target).manifest.weights.decoder == "fp32"
        export_bundle(replace(config, weights="fp16", overwrite=True))
        assert Bundle.open(target).manifest.weights.decoder == "fp16"
        assert leftovers(tmp_path) == ["bundle"]

    def test_a_folder_that_is_no_bundle_is_never_replaced(self, a1: Path, tmp_path: Path) -> None:
        (tmp_path / "photos").mkdir()
        (tmp_path / "photos" / "wedding.jpg").write_bytes(b"precious")
        with pytest.raises(ExportError, match="is no bundle; it is left alone"):
            export_bundle(ExportConfig(a1, tmp_path / "photos", overwrite=True))
        assert leftovers(tmp_path / "photos") == ["wedding.jpg"]

    def test_what_a_kill_between_the_renames_left_is_put_back(self, a1: Path, tmp_path: Path) -> None:
        target = tmp_path / "b[1]"  # brackets mean nothing here
        export_bundle(ExportConfig(a1, target, weights="fp32"))
        (tmp_path / ".b[1].partial" / "bundle").mkdir(parents=True)
        target.rename(tmp_path / ".b[1].partial" / "replaced")
        with pytest.raises(ExportError, match="exists; give --overwrite"):
            export_bundle(ExportConfig(a1, target, weights="fp16"))
        assert Bundle.open(target).manifest.weights.decoder == "fp32"
        export_bundle(ExportConfig(a1, target, weights="fp16", overwrite=True))
        assert leftovers(tmp_path) == ["b[1]"]

    def test_a_link_to_a_bundle_stays_a_link(self, a1: Path, tmp_path: Path) -> None:
        export_bundle(ExportConfig(a1, tmp_path / "real", weights="fp32"))
        (tmp_path / "link").symlink_to("real")
        export_bundle(ExportConfig(a1, tmp_path / "link", weights="fp16", overwrite=True))
        assert (tmp_path / "link").is_symlink()
        assert Bundle.open(tmp_path / "real").manifest.weights.decoder == "fp16"
        assert leftovers(tmp_path) == ["link", "real"]

    def test_the_root_folder_is_no_bundle(self, a1: Path) -> None:
        with pytest.raises(ExportError, match="is no bundle"):
            export_bundle(ExportConfig(a1, Path("/"), overwrite=True))

    def test_parents_are_made(self, tmp_path: Path) -> None:
        with Staging(tmp_path / "deep" / "er" / "bundle", overwrite=False) as staging:
            (staging.folder / "file").write_text("x")
            staging.publish()
        assert leftovers(tmp_path / "deep" / "er") == ["bundle"]

    def test_a_failed_overwrite_keeps_the_old_bundle(
        self, a1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        target = tmp_path / "bundle"
        export_bundle(ExportConfig(a1, target, weights="fp32"))
        monkeypatch.setattr(OrtDialect, "silu", lambda _, graph, x: graph.op("Neg", x))
        with pytest.raises(ParityError):
            export_bundle(ExportConfig(a1, target, weights="fp16", overwrite=True))
        assert Bundle.open(target).manifest.weights.decoder == "fp32"
        assert leftovers(tmp_path) == ["bundle"]

    def test_space_is_checked_first(self, tmp_path: Path) -> None:
        with (
            pytest.raises(
                ExportError, match=r"not enough space in .*: the export takes about 1\d{12} MB.* Nothing was"
            ),
            Staging(tmp_path / "bundle", overwrite=False) as staging,
        ):
            check_space(staging, 2**60)
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"weights": "int3"}, "weights 'int3': use one of int4, int8, fp16, fp32"),
            ({"vision": "int4"}, "vision 'int4': use one of int8, fp16, fp32"),
            ({"group_size": 100}, "group_size 100 is not supported"),
            ({"method": "awq"}, "method 'awq' is not known; use gptq or rtn"),
            ({"samples": 0}, "samples must be positive"),
            ({"device": "gpu"}, "device 'gpu': use cpu, cuda or cuda:N"),
        ],
    )
    def test_settings_are_checked(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            ExportConfig(Path("in"), Path("out"), **settings)

    def test_calibration_without_images(self, a1: Path, tmp_path: Path) -> None:
        talks = tmp_path / "talks.jsonl"
        turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
        talks.write_text(json.dumps({"conversations": turns}))
        with pytest.raises(CalibrationError, match=r"none of its 1 samples has an image.*image rows"):
            export_bundle(ExportConfig(a1, tmp_path / "bundle", calibration=talks))
        assert leftovers(tmp_path) == ["talks.jsonl"]


@pytest.mark.slow
class TestCommand:
    def run(self, *args: object, **options: object) -> "subprocess.CompletedProcess[str]":
        command = [*COMMAND, *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)

    def test_json(self, a1: Path, tmp_path: Path, photos: Path) -> None:
        result = self.run(a1, tmp_path / "bundle", "--json", "--calibration", photos, "--vision", "fp32")
        assert result.returncode == 0
        assert result.stderr == ""
        report = json.loads(result.stdout)
        assert report["recipe"]["weights"] == "int4"
        assert report["calibration"]["source"] == photos.name
        assert report["calibration"]["images"] == 3
        assert "2 of 3 images have no text" in report["calibration"]["notes"][0]
        assert report["size"] == sum(p.stat().st_size for p in (tmp_path / "bundle").iterdir()) - (
            (tmp_path / "bundle" / "owl2.json").stat().st_size + (tmp_path / "bundle" / "report.json").stat().st_size
        )

    def test_the_built_in_calibration_is_told(self, a1: Path, tmp_path: Path) -> None:
        result = self.run(a1, tmp_path / "bundle")
        assert result.returncode == 0
        assert "owl2-export: note: the built-in calibration set was used: drawn images" in result.stderr
        assert "equals torch within" in result.stdout
        notes = json.loads((tmp_path / "bundle" / "report.json").read_text())["calibration"]["notes"]
        assert notes[0].startswith("the built-in calibration set was used")

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (("nowhere", "out"), "nowhere is not a folder"),
            (("owner/model", "out"), "if it is a hub id, add --download"),
            ((".", "out"), "is not an official mPLUG-Owl2 checkpoint; missing: config.json"),
        ],
    )
    def test_errors_are_one_line(self, tmp_path: Path, args: tuple[str, ...], message: str) -> None:
        result = self.run(*args, cwd=tmp_path)
        assert result.returncode == 1
        assert message in result.stderr
        assert result.stderr.startswith("owl2-export: error: ")
        assert result.stderr.count("\n") == 1
        assert leftovers(tmp_path) == []

    def test_wrong_usage(self) -> None:
        assert self.run("one").returncode == 2
        assert "'int3' is not one of" in self.run("a", "b", "--weights", "int3").stderr

    def test_disk_full(self, a1: Path, tmp_path: Path) -> None:
        """The system refuses to let files grow beyond a limit, as it does when a quota is used up."""

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

        result = self.run(a1, tmp_path / "bundle", "--weights", "fp32", preexec_fn=limit)
        assert result.returncode == 1
        assert "not enough space in" in result.stderr
        assert "the export takes about" in result.stderr
        assert result.stderr.endswith("Nothing was left behind\n")
        assert leftovers(tmp_path) == []

    def test_disk_full_behind_finished_layers(self, a1: Path, tmp_path: Path) -> None:
        """They are kept, and with room the same command continues."""

        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (450_000, 450_000))

        options = ("--weights", "fp32", "--vision", "int8", "--samples", "1")
        result = self.run(a1, tmp_path / "bundle", *options, preexec_fn=limit)
        assert result.returncode == 1
        assert "not enough space in" in result.stderr
        kept = re.search(
            r"(\d) of 3 decoder layers are kept in .*/.bundle.partial \(\d MB\): the same command", result.stderr
        )
        assert kept is not None, result.stderr
        assert result.stderr.count("are kept in") == 1
        assert leftovers(tmp_path) == [".bundle.partial"]
        again = self.run(a1, tmp_path / "bundle", *options, "--json")
        assert again.stderr == f"owl2-export: continuing an interrupted export at layer {int(kept[1]) + 1} of 3\n"
        assert json.loads(again.stdout)["size"] > 450_000
        assert leftovers(tmp_path) == ["bundle"]

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_stopping_before_the_first_layer_leaves_nothing(
        self, sample_checkpoint: Path, tmp_path: Path, number: int, code: int
    ) -> None:
        with started(sample_checkpoint, tmp_path, "bundle/vision.onnx.data") as process:
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert "Traceback" not in errors
        assert number == signal.SIGTERM or errors.endswith("owl2-export: stopped\n")
        assert leftovers(tmp_path) == []

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_stopping_later_leaves_the_finished_layers(
        self, sample_checkpoint: Path, tmp_path: Path, number: int, code: int
    ) -> None:
        with started(sample_checkpoint, tmp_path, "journal/layer-2.graph") as process:
            process.send_signal(number)
            _, errors = process.communicate(timeout=60)
        assert process.returncode == code
        assert re.search(rf"owl2-export: \d of 5 decoder layers are kept in {tmp_path}/.bundle.partial", errors)
        assert "Traceback" not in errors
        assert number == signal.SIGTERM or errors.endswith("owl2-export: stopped\n")
        assert leftovers(tmp_path) == [".bundle.partial"]

    def test_a_killed_export_leaves_no_half_bundle(self, a1: Path, sample_checkpoint: Path, tmp_path: Path) -> None:
        with started(sample_checkpoint, tmp_path, "bundle/decoder.onnx.data") as process:
            process.kill()
            process.communicate(timeout=60)
        assert leftovers(tmp_path) == [".bundle.partial"]
        export_bundle(ExportConfig(a1, tmp_path / "bundle", weights="fp32"))
        assert leftovers(tmp_path) == ["bundle"]

    def test_a_gpu_that_torch_cannot_use(self, a1: Path, tmp_path: Path) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is a GPU here")
        result = self.run(a1, tmp_path / "bundle", "--device", "cuda")
        assert result.returncode == 1
        assert re.match(rf"owl2-export: error: device cuda: .*torch {re.escape(torch.__version__)}", result.stderr)
        assert leftovers(tmp_path) == []


def started(checkpoint: Path, folder: Path, file: str) -> "subprocess.Popen[str]":
    """An export that has begun to write ``file`` of its hidden folder."""
    process = subprocess.Popen(
        [*COMMAND, str(checkpoint), str(folder / "bundle"), "--samples", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    end = time.monotonic() + 120
    while not (folder / ".bundle.partial" / file).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)
    return process

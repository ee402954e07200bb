"""Devices and targets: which vendor and arch, which fp8 flavour, which device is current."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

import hwfuse
from hwfuse import _cuda, _device
from hwfuse.testing._pretend import pretend

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


@pytest.mark.parametrize(
    ("text", "vendor", "arch"),
    [
        ("cpu", "cpu", "cpu"),
        ("cuda:sm90", "nvidia", "sm90"),
        ("cuda:sm100a", "nvidia", "sm100a"),
        ("rocm:gfx942", "amd", "gfx942"),
        ("rocm:gfx90a", "amd", "gfx90a"),
    ],
)
def test_target_is_read_and_written_alike(text, vendor, arch):
    """A target has a vendor and an arch, each a word; gfx names are no numbers."""
    target = _device.parse(text)
    assert (target.vendor, target.arch, str(target)) == (vendor, arch, text)


@pytest.mark.parametrize("text", ["", "cuda", "cuda:0", "cuda:90", "rocm:sm90", "gpu:sm90", "sm90"])
def test_target_that_is_none_is_an_input_error(text):
    """Argument, found, needed."""
    with pytest.raises(hwfuse.InputError) as error:
        _device.parse(text)
    needed = "'cpu', 'cuda:sm90' or 'rocm:gfx950' style"
    assert str(error.value) == f"device: found {text!r}, needed {needed}"


@pytest.mark.parametrize(
    ("properties", "hip", "expected"),
    [
        ({"major": 9, "minor": 0}, None, "cuda:sm90"),
        ({"major": 12, "minor": 1}, None, "cuda:sm121"),
        ({"gcnArchName": "gfx942:sramecc+:xnack-"}, "7.0", "rocm:gfx942"),
    ],
)
def test_target_of_a_gpu_is_what_torch_says(properties, hip, expected):
    """On ROCm torch calls the device cuda too; the arch has suffixes to drop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.version, "hip", hip)
        patch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
        patch.setattr(_cuda, "vendor_and_arch", _cuda.vendor_and_arch.__wrapped__)
        assert str(_device.target_of(torch.device("cuda", 0))) == expected


def test_target_of_another_torch_device_is_its_type():
    """An outside backend serves it by that word."""
    assert _device.target_of(torch.device("xpu", 0)) == _device.Target("xpu", "xpu")


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", FN),
        (torch.device("cpu"), FN),
        ("meta", FN),
        ("cuda:sm90", FN),
        ("rocm:gfx942", FNUZ),
        ("rocm:gfx950", FN),
        ("rocm:gfx1201", FN),
    ],
)
def test_fp8_dtype_is_that_of_the_device(device, expected):
    """CDNA3 has the fnuz flavour, everyone else the OCP one."""
    assert hwfuse.fp8_dtype(device) == expected


def test_pretend_changes_the_cpu_and_meta_only_inside_the_block():
    """Nested blocks stack, and an exception leaves nothing behind."""
    with pretend("rocm:gfx942"):
        with contextlib.suppress(ZeroDivisionError), pretend("cuda:sm90"):
            assert str(_device.target_of(torch.device("meta"))) == "cuda:sm90"
            raise ZeroDivisionError
        assert hwfuse.fp8_dtype("cpu") == FNUZ
    assert hwfuse.fp8_dtype("cpu") == FN


def test_kernel_is_launched_with_its_device_current(monkeypatch):
    """A launcher uses the current device's stream, so the core makes the tensors' one current."""
    entered = []

    @contextlib.contextmanager
    def device(which):
        entered.append(str(which))
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", device)
    for name in ("cuda:1", "cuda:0"):
        assert _cuda.on(torch.device(name), max)(1, 2) == 2
    assert entered == ["cuda:1"]

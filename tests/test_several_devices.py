"""Models on several devices have the same measures as on the CPU.

No second device is needed: tests/on_several_devices.py runs on devices that only pretend, in a process of its own,
since they remain in it.

Covers: nrm_plugin.model.devices.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="devices written in Python"
)
def test_models_on_several_devices():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.pretend_devices", "tests/on_several_devices.py"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-1000:]
    assert torch._C._get_privateuse1_backend_name() == "privateuseone"  # nothing is left in this process

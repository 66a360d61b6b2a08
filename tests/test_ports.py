"""The model of a processor's ports: its pieces compile, and are of the length that their formulas have."""
import re
import shutil
import subprocess
import sys

import pytest


@pytest.mark.skipif(not (shutil.which("llvm-mca") and shutil.which("g++")), reason="needs llvm-mca and g++")
def test_the_pieces_of_the_model():
    text = subprocess.run([sys.executable, "-m", "benchmarks.ports"], check=True, capture_output=True, text=True).stdout
    rows = dict(re.findall(r"^(draw|sigma and KL|gradients from dW and noise) +(.+)$", text, re.MULTILINE))
    assert len(rows) == 3, text
    for numbers in rows.values():
        instructions, floor, scheduled = map(float, numbers.split())
        assert 3 < instructions < 8 and 0.5 < floor < scheduled < instructions

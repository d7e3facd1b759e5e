"""What the checksum and bringing a checkpoint to the disk cost: a pruned ResNet-18, beside safetensors alone.

pytest benchmarks/test_files.py
"""

import os

from s2ap_ext import _files, sparsify
from s2ap_ext.models import build_model


def test_saving_a_checkpoint(side_by_side, quick, tmp_path):
    from safetensors.torch import save_file

    net = sparsify(build_model("resnet18", num_classes=10, width=4 if quick else 64, seed=0), 0.9)
    tensors = {name: tensor.detach() for name, tensor in net.state_dict().items()}
    path, temporary = tmp_path / "x.safetensors", tmp_path / "x.tmp"

    def alone():
        """Copied, written and put in place, as before there were checksums."""
        save_file({name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, path)

    side_by_side(
        {"with checksum and fsync": lambda: _files.save(path, tensors, {}), "safetensors alone": alone},
        rounds=7,
        what="saving a pruned ResNet-18",
    )

"""Write golden bytes for codecs that have none yet: python tests/golden/make.py

A golden file is a codec's configuration with codes and params and what they decode to, for ever:
a file on disk must decode to the same bits in every release. So a file that is there is never
touched; a format that changes gets a new version and new files.
"""

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent.parent)]

import walk  # noqa: E402

from reality_stone import Packed  # noqa: E402
from reality_stone.codecs import from_config  # noqa: E402

SHAPE = (12, 72)  # padded on either side for most tiles, and several tiles across


def weight(rows: int, cols: int) -> torch.Tensor:
    """Bell-shaped weights from integers alone, so that any machine in any year has the same."""
    i = torch.arange(rows * cols, dtype=torch.int64)
    total = torch.zeros(rows * cols, dtype=torch.int64)
    for n in range(1, 5):
        x = (i * 2654435761 + n * 40503) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 2246822519) & 0xFFFFFFFF
        total += (x ^ (x >> 13)) & 0xFFFF
    return ((total - 131070).float() / 2**20).view(rows, cols)  # exact: 18 bits


def pack(tensor: torch.Tensor) -> dict:
    data = tensor.contiguous().numpy()
    little = data.astype(data.dtype.newbyteorder("<")).tobytes()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "base64": base64.b64encode(little).decode(),
    }


def unpack(entry: dict) -> torch.Tensor:
    data = bytearray(base64.b64decode(entry["base64"]))
    return torch.frombuffer(data, dtype=getattr(torch, entry["dtype"])).reshape(entry["shape"])


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(base64.b64decode(pack(tensor)["base64"])).hexdigest()


def describe(packed: Packed) -> dict:
    decoded = packed.decode()
    return {
        "config": packed.codec.to_config(),
        "shape": list(packed.shape),
        "codes": pack(packed.codes),
        "params": {name: pack(p) for name, p in packed.params.items()},
        "decode_sha256": digest(decoded),
        "decode_first": [value.hex() for value in decoded.flatten()[:4].tolist()],
    }


def load(path: Path) -> tuple[Packed, dict]:
    golden = json.loads(path.read_text())
    params = {name: unpack(p) for name, p in golden["params"].items()}
    codec = from_config(golden["config"])
    return Packed(codec, tuple(golden["shape"]), unpack(golden["codes"]), params), golden


def file_of(codec, kind: str) -> Path:
    text = re.sub(r"[^a-z0-9.=]+", "-", codec.spec.lower()).strip("-")
    return HERE / codec.name / f"{kind}-v{codec.version}-{text}.json"


def examples():
    """(path, layer): every usual setting as encoded, and the defaults on bytes no encoder wrote."""
    for codec in walk.FEW:
        yield file_of(codec, "encoded"), lambda c=codec: c.encode(weight(*SHAPE))
    for codec in walk.DEFAULTS:
        yield file_of(codec, "bytes"), lambda c=codec: walk.random_layer(c, SHAPE)


def main() -> None:
    for path, make in examples():
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(describe(make()), indent=1) + "\n")
        print(path.relative_to(HERE))


if __name__ == "__main__":
    main()

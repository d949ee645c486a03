"""A reader of packed checkpoints from docs/file-format.md alone: NumPy and JSON, nothing of ours.

It stands for a reader in another language. Section numbers are those of the page.
"""

import hashlib
import json
from math import factorial
from pathlib import Path

import numpy as np

F = np.float32
DTYPES = {"U8": "<u1", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "BOOL": "?",
          "F16": "<f2", "F32": "<f4", "F64": "<f8"}  # fmt: skip


# --- 1 and 2: files ---


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    digests = json.loads(metadata.get("sha256", "{}"))
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        data = raw[8 + length + begin : 8 + length + end]
        assert name not in digests or hashlib.sha256(data).hexdigest() == digests[name]
        if entry["dtype"] in DTYPES:
            tensors[name] = np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors, metadata


def read_checkpoint(directory: Path) -> dict[str, np.ndarray]:
    """{name: decoded weight} of every compressed layer."""
    index = directory / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    tensors, tied = {}, {}
    for name in names:
        found, metadata = read_safetensors(directory / name)
        tensors |= found
        tied |= json.loads(metadata.get("tied", "{}"))
    plan = json.loads((directory / "config.json").read_text())["quantization_config"]["plan"]
    weights = {}
    for layer in plan:
        prefix = f"{layer['name']}." if layer["name"] else ""
        own = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
        own |= {n[len(prefix) :]: tensors[t] for n, t in tied.items() if n.startswith(prefix)}
        codes = own.pop("codes")
        params = {n: p if p.dtype == np.uint8 else p.astype(F) for n, p in own.items()}
        weights[layer["name"]] = decode(layer["codec"], codes, params, tuple(layer["shape"]))
    return weights


# --- 4: the frame ---


def decode(codec: dict, codes: np.ndarray, params: dict, shape: tuple[int, int]) -> np.ndarray:
    if codec["name"] == "residual":
        rest = {n[5:]: p for n, p in params.items() if n.startswith("rest_")}
        rest_codes = rest.pop("codes")
        first = decode(codec["base"], codes, params, shape)
        return first + decode(codec["rest"], rest_codes, rest, shape)
    out, n = shape
    inner = globals()[codec["name"]](codec, codes, params)[:, :n]
    rotate = codec["name"] == "trellis" and codec["rotate"]
    w = hadamard(inner, n) if rotate else inner
    w = hadamard(w[:out].T, out).T if rotate else w[:out]
    if "out_scale" in params:
        w = w * params["out_scale"][:, None]
    if "in_scale" in params:
        w = w * params["in_scale"]
    if codec["name"] == "ultra" and codec["percent"]:
        rest = {n[5:]: p for n, p in params.items() if n.startswith("rest_")}
        w = w + sparse({}, rest.pop("codes"), rest)[:, :n]
    return w


def hadamard(x: np.ndarray, n: int) -> np.ndarray:
    block, step, shape = min(128, n & -n), 1, x.shape
    while step < block:
        y = x.reshape(-1, 2, step)
        x = np.stack((y[:, 0] + y[:, 1], y[:, 0] - y[:, 1]), 1)
        step *= 2
    return x.reshape(shape) * F(block**-0.5) if block > 1 else x


# --- 5: codecs. codes are (tiles down, tiles across, bytes); each gives T, padded to tiles ---


def bits_of(tile: np.ndarray, width: int, count: int) -> np.ndarray:
    """The first `count` fields of `width` bits, least significant bit first."""
    bits = np.unpackbits(tile, axis=-1, bitorder="little")[..., : width * count]
    bits = bits.reshape(*tile.shape[:-1], count, width).astype(np.int64)
    return (bits << np.arange(width)).sum(-1)


def words(codes: np.ndarray, size: int) -> np.ndarray:
    """Unsigned little-endian integers of `size` bytes."""
    return np.ascontiguousarray(codes).view(f"<u{size}").astype(np.int64)


def uniform(codec, codes, params):
    group = params["scale"][..., None]
    count = codec["group"] or codes.shape[-1] * 8 // codec["bits"]
    code = bits_of(codes, codec["bits"], count).astype(F)
    zero = F(2 ** (codec["bits"] - 1)) if codec["symmetric"] else params["zero"][..., None]
    return ((code - zero) * group).reshape(len(codes), -1)


def palette(codec, codes, params):
    book = params["codebook"]
    if codec["layout"] == "words":
        word = words(codes, 2)
        code = (word[..., None] >> np.arange(0, 15, 3) & 7).reshape(*codes.shape[:2], -1)
    elif codec["layout"] == "pair":
        code = bits_of(codes, 5, 8)
    else:
        count = codec["group"] or codes.shape[-1] * 8 // codec["bits"]
        code = bits_of(codes, codec["bits"], count)
    if codec["group"]:
        return np.take_along_axis(book, code, -1).reshape(len(codes), -1)
    return book[code].reshape(len(codes), -1)


def trellis(codec, codes, params):
    k = int(2 * codec["bits"])
    word = words(codes, 2)
    start = np.arange(128) * k
    high, low = word[..., start // 16], word[..., (start // 16 + 1) % (8 * k)]
    state = (high << 16 | low) >> (16 - start % 16) & 0xFFFF
    p = state * 0xC83918A1 & 0xFFFFFFFF
    x = params["angle"].astype(np.float64)
    cosine, sine, y = np.zeros_like(x), np.zeros_like(x), x * x
    for n in range(13, -1, -1):
        cosine = cosine * y + (-1.0) ** n / factorial(2 * n)
        sine = sine * y + (-1.0) ** n / factorial(2 * n + 1)
    phase, radius = p >> 27 & 15, params["radius"][p >> 21 & 63]
    u = radius * cosine.astype(F)[phase]
    v = radius * (sine * x).astype(F)[phase]
    pair = np.stack((np.where(p >> 31 & 1, -u, u), np.where(p >> 15 & 1, -v, v)), -1)
    tiles = pair.reshape(*codes.shape[:2], 16, 16)
    return tiles.swapaxes(1, 2).reshape(16 * codes.shape[0], 16 * codes.shape[1])


def sparse(codec, codes, params):
    kept = (codes.shape[-1] - 2) // 3
    count, column = words(codes[:, 0, :2], 2), words(codes[:, 0, 2 : 2 + 2 * kept], 2)
    value = np.ascontiguousarray(codes[:, 0, 2 + 2 * kept :]).view(np.int8).astype(F)
    w = np.zeros((len(codes), 1 << 16), F)
    for row in range(len(codes)):
        used = slice(int(count[row, 0]))
        w[row, column[row, used]] = value[row, used] * params["scale"][row]
    return w


def ultra(codec, codes, params):
    vector = params["codebook"]
    transform = int(params["transform"][0])
    if transform & 4:
        vector = vector[:, [2, 3, 0, 1]]
    if transform & 2:
        vector = vector[:, ::-1]
    if transform & 1:
        vector = -vector
    return vector[bits_of(codes, 10, 4)].reshape(len(codes), -1)


def vq_cyclic(codec, codes, params):
    code, p = bits_of(codes, 6, 4), params["prototypes"]
    rolled = np.where((code >> 4 & 1)[..., None], np.roll(p, codec["block"] // 4, 1)[code & 15],
                      p[code & 15])  # fmt: skip
    return np.where((code >> 5 & 1)[..., None], -rolled, rolled).reshape(len(codes), -1)


T = np.array([127, 117, 90, 49, 0, -49, -90, -117, -127, -117, -90, -49, 0, 49, 90, 117])


def hierarchical(codec, codes, params):
    word = words(codes, 2)
    base, delta = word[..., :1], word[..., 1:] >> np.arange(0, 16, 2) & 3
    if codec["mode"] == "mul":
        signed = np.where(base >= 1 << 15, base - (1 << 16), base).astype(F) / F(512)
        return (signed * params["multipliers"][delta]).reshape(len(codes), -1)
    code = base ^ np.array([0, 0x00F0, 0x0F00, 0x00FF])[delta]
    factor = T[(code >> 12) + 4 * (code >> 10 & 3) & 15] * ((code >> 4 & 63) + 1)
    return (factor.astype(F) / F(8192) * params["levels"][code & 15]).reshape(len(codes), -1)


def cyclic(codec, codes, params):
    word = words(codes, codec["word"] // 8)[..., 0]
    if codec["word"] == 32:
        turn, amp, index, shift = (
            (word >> 28) + 4 * (word >> 26 & 3),
            word >> 8 & 255,
            word & 255,
            14,
        )
    elif codec["compound"]:
        turn, amp, index, shift = (word >> 12) + 4 * (word >> 10 & 3), word >> 4 & 63, word & 15, 13
    else:
        turn, amp, index, shift = word >> 12, word & 15, word >> 4 & 255, 11
    factor = (T[turn & 15] * amp).astype(F) / F(2**shift)
    return (factor[..., None] * params["basis"][index]).reshape(len(codes), -1)


def turn_cosine(k: np.ndarray, n: int) -> np.ndarray:
    """cos(2 pi k / n) in float64 by the steps of section 6."""
    k = np.asarray(k, np.int64) % n
    k = np.where(2 * k > n, n - k, k)
    negative = 4 * k > n
    k = np.where(negative, n // 2 - k, k)
    high = 8 * k > n
    x = np.where(high, n // 4 - k, k).astype(np.float64) * (6.283185307179586 / n)
    y = x * x
    cosine, sine = np.full_like(y, 1 / factorial(16)), np.full_like(y, 1 / factorial(17))
    for i in range(7, -1, -1):
        cosine = cosine * y + (-1.0) ** i / factorial(2 * i)
        sine = sine * y + (-1.0) ** i / factorial(2 * i + 1)
    value = np.where(high, sine * x, cosine)
    return np.where(negative, -value, value)


TANH = [[-127, -124, -118, -110, -96, -77, -50, -17, 17, 50, 77, 96, 110, 118, 124, 127],
        [9, 15, 25, 39, 60, 85, 111, 127, 127, 111, 85, 60, 39, 25, 15, 9],
        [22, 36, 57, 84, 112, 127, 107, 43, -43, -107, -127, -112, -84, -57, -36, -22],
        [17, 26, 37, 45, 39, 2, -66, -127, -127, -66, 2, 39, 45, 37, 26, 17]]  # fmt: skip
SINH = [-127, -106, -87, -69, -52, -37, -22, -7, 7, 22, 37, 52, 69, 87, 106, 127]
COSH = [127, 115, 105, 98, 91, 87, 84, 82, 82, 84, 87, 91, 98, 105, 115, 127]
EXP = [17, 20, 22, 26, 29, 33, 38, 44, 50, 57, 65, 75, 85, 97, 111, 127]


def cyclic_scalar(codec, codes, params):
    if codec["bits"] == 8:
        trig = [np.roll(T, -4 * d) for d in range(4)]
        level = np.array([trig, [SINH, COSH, SINH, COSH], [EXP] * 4, TANH]).astype(F).reshape(256)
        step = params["scale"] * F(F(1) / F(127))
        return (level[codes] * step[..., None]).reshape(len(codes), -1)
    code = words(codes, 2)
    cosine = turn_cosine((code & 255) + 64 * (code >> 8 & 3), 256).astype(F)
    level = cosine * (((code >> 10) + 1).astype(F) / F(64))
    return (level * params["scale"][..., None]).reshape(len(codes), -1)


def adaptive_precision(codec, codes, params):
    groups = codec["window"] // 16
    first = -(-groups // 4)
    w = np.zeros((*codes.shape[:2], groups, 16), F)
    for row, col in np.ndindex(codes.shape[:2]):
        tile, at = codes[row, col], first
        for g, kind in enumerate(bits_of(tile[:first], 2, groups)):
            kind = min(kind, 2)
            bits = (2, 6, 12)[kind]
            top = 2**bits - 1
            if at + 2 * bits > len(tile):
                at = len(tile)
                continue
            code = bits_of(tile[at : at + 2 * bits], bits, 16)
            unit = (2 * code - top).astype(F) * (F(1) / F(top))
            w[row, col, g] = unit * params["scale"][row, col, kind]
            at += 2 * bits
    return w.reshape(len(codes), -1)


def block_sparse(codec, codes, params):
    scale = params["value_scale"][0]
    if codec["layout"] == "row":
        size = np.ascontiguousarray(codes[..., 1]).view(np.int8).astype(F) * scale
        wave = turn_cosine(codes[..., 2:].astype(np.int64) + 32 * np.arange(8), 256).astype(F)
        kept = codes[..., :1] >> np.arange(8) & 1
        return np.where(kept, size[..., None] * wave, F(0)).reshape(len(codes), -1)
    if codec["mask16"]:
        mask, value = words(codes[..., :2], 2)[..., 0], codes[..., 2:]
    else:
        mask = words(params["masks"], 2)[:, 0][codes[..., 0]]
        value = codes[..., 1:]
    kept = mask[..., None] >> np.arange(16) & 1
    number = np.minimum(np.cumsum(kept, -1) - kept, 3)
    kept = kept & (np.cumsum(kept, -1) <= 4)
    value = np.ascontiguousarray(value).view(np.int8).astype(F) * scale
    w = np.where(kept, np.take_along_axis(value, number, -1), F(0))
    tiles = w.reshape(*codes.shape[:2], 4, 4)
    return tiles.swapaxes(1, 2).reshape(4 * codes.shape[0], 4 * codes.shape[1])

#!/usr/bin/env python3
"""Writes grids.bin: blocks of every GGUF type and the f32 values that gguf-py gives for them.

Needs `pip install gguf numpy`. Run as `python grids.py` in this folder. The file is a run of records, all
little-endian: u8 length of the name, the name, u32 blocks, u32 block bytes, u32 block values, the bytes, the values.
"""

import numpy as np
from gguf import GGMLQuantizationType as T
from gguf.quants import dequantize

NAMES = {
    "q4_0": T.Q4_0, "q4_1": T.Q4_1, "q5_0": T.Q5_0, "q5_1": T.Q5_1, "q8_0": T.Q8_0, "q2_k": T.Q2_K,
    "q3_k": T.Q3_K, "q4_k": T.Q4_K, "q5_k": T.Q5_K, "q6_k": T.Q6_K, "iq4_nl": T.IQ4_NL,
    "iq4_xs": T.IQ4_XS, "mxfp4": T.MXFP4, "nvfp4": T.NVFP4, "iq1_s": T.IQ1_S, "iq1_m": T.IQ1_M,
    "iq2_xxs": T.IQ2_XXS, "iq2_xs": T.IQ2_XS, "iq2_s": T.IQ2_S, "iq3_xxs": T.IQ3_XXS, "iq3_s": T.IQ3_S,
    "tq1_0": T.TQ1_0, "tq2_0": T.TQ2_0,
}
# Where each layout keeps its f16 scales: random bytes there would give NaN, which no comparison holds.
HALVES = {
    "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "q2_k": [80, 82], "q3_k": [108],
    "q4_k": [0, 2], "q5_k": [0, 2], "q6_k": [208], "iq4_nl": [0],
    "iq4_xs": [0], "mxfp4": [], "nvfp4": [], "iq1_s": [0], "iq1_m": [], "iq2_xxs": [0], "iq2_xs": [0],
    "iq2_s": [0], "iq3_xxs": [0], "iq3_s": [0], "tq1_0": [52], "tq2_0": [64],
}
SIZES = {
    "q4_0": (18, 32), "q4_1": (20, 32), "q5_0": (22, 32), "q5_1": (24, 32), "q8_0": (34, 32), "q2_k": (84, 256),
    "q3_k": (110, 256), "q4_k": (144, 256), "q5_k": (176, 256), "q6_k": (210, 256), "iq4_nl": (18, 32),
    "iq4_xs": (136, 256), "mxfp4": (17, 32), "nvfp4": (36, 64), "iq1_s": (50, 256), "iq1_m": (56, 256),
    "iq2_xxs": (66, 256), "iq2_xs": (74, 256), "iq2_s": (82, 256), "iq3_xxs": (98, 256), "iq3_s": (110, 256),
    "tq1_0": (54, 256), "tq2_0": (66, 256),
}
# Ordinary scales of both signs, zeros, the least subnormal, the largest finite value.
SCALES = [0.0123, -0.0371, 1.0, -0.0, 0.0, 6e-8, 65504.0, 0.3333]


def main():
    random = np.random.default_rng(20)
    with open("grids.bin", "wb") as out:
        for name, kind in NAMES.items():
            size, values = SIZES[name]
            count = 10 if values == 32 else 4
            blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
            blocks[1] = 0
            blocks[2] = 255
            if name == "mxfp4":
                # Exponents whose values are finite, the subnormal ones among them.
                blocks[:, 0] = [0, 1, 2, 100, 118, 120, 127, 128, 200, 250]
            for b in range(count):
                for h, at in enumerate(HALVES[name]):
                    scale = np.float16(SCALES[(3 * h + b + (2 if values == 256 else 0)) % len(SCALES)])
                    blocks[b, at : at + 2] = np.frombuffer(scale.tobytes(), np.uint8)
            if name == "iq1_m":
                # The upper four bits of each 16-bit word of scales are a quarter of the f16 scale.
                for b in range(count):
                    scale = int(np.float16(SCALES[(b + 2) % len(SCALES)]).view(np.uint16))
                    for quarter in range(4):
                        blocks[b, 49 + 2 * quarter] = blocks[b, 49 + 2 * quarter] & 15 | (scale >> (4 * quarter) & 15) << 4
            decoded = dequantize(blocks, kind).astype("<f4").reshape(count, values)
            assert np.isfinite(decoded).all(), name
            out.write(bytes([len(name)]) + name.encode())
            out.write(np.array([count, size, values], "<u4").tobytes() + blocks.tobytes() + decoded.tobytes())


main()

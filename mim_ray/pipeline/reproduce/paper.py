"""What the paper reports (arXiv 2502.00321, Tables 2-7): numbers to be set beside ours. None: not readable, or not reported."""

from __future__ import annotations

BASE_AUC = 0.7024  # SIM on IDs, in Tables 3-5
MIM_AUC = 0.7062

TABLE_2: dict[str, tuple[float, float]] = {
    "average": (0.6965, 0.7030),
    "din": (0.7004, 0.7047),
    "dien": (0.7010, 0.7055),
    "bst": (0.6995, 0.7049),
    "twin": (0.7028, 0.7051),
    "sim": (0.7024, 0.7062),
}
"""AUC of base and base + MIM, all categories."""

TABLE_3: dict[str, float] = {"untrained": 0.7030, "dda": 0.7034, "pretraining": 0.7040, "csft": 0.7062}
"""AUC by what trained the encoder. Its first row starts from public weights ("plain FoM")."""

TABLE_4: dict[str, float | None] = {"v1": 0.7043, "v2": 0.7053, "v3": None, "v4": None, "v5": 0.7062}

TABLE_5: dict[str, float] = {
    "TFN": 0.7058,
    "ST-NSG": 0.7056,
    "multi-level InfoNCE": 0.7052,
    "C-SFT": 0.7040,
    "ID interest module": 0.7057,
    "content interest module": 0.7052,
    "fusion interest module": 0.7054,
}
"""AUC without the named part."""

TABLE_6_GFLOPS: dict[str, tuple[float, float]] = {
    "base": (0.114, 0.31),
    "mim": (0.182, 0.43),
    "no_center": (240.0, 240.0),
    "end_to_end": (720.0, 240.0),
}
"""Per sample, train and inference."""

TABLE_6_MEMORY: dict[str, tuple[float, float]] = {"mim": (0.01, 0.19)}
"""What +MIM adds to the GPU memory of base, as a part of it; the other cells cannot be read."""

TABLE_7: dict[str, float] = {
    "all": 0.0038,
    "Home Decoration": 0.0047,
    "Clothes": 0.0037,
    "Sports": 0.003,
    "Toys": 0.0024,
    "FMCG": 0.0028,
    "Pets": 0.0024,
    "Cars": 0.0028,
}
"""AUC gain by the paper's categories."""

FIGURE_5 = "ResNet50, Swin, ConvNeXt v1, v2 and v2-large, EVA-2; BERT, GPT-2, BEiT-3 base and large, BGE: stronger towers, more AUC"
FIGURE_6 = "gains are largest on the newest items, S1"

"""The numbers of the paper (Backdoor Attribution), each once."""

from __future__ import annotations

N_PAIRS = 96  # clean pairs that heads are attributed on
VECTOR_SHARE = 1 / 32  # of all heads make the vector: 32 of 1,024
TOP_SHARE = 0.03  # the same in words: "3 % of heads"
ABLATION_COUNTS = (0, 1, 2, 4, 8, 16, 32)  # heads switched off
PROBE_SPLIT = (0.6, 0.2, 0.2)  # train, validation, test

"""Settings that hold for every test: no network, two torch threads that do not spin, no program of an earlier run."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["AUTODEPLOY_CACHE_DIR"] = "off"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: its kernels run on the CPU
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # tests share the cores: threads that wait let others have theirs

import torch

torch.set_num_threads(2)

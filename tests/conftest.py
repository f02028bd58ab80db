"""Shared by all tests: the project root on sys.path, one thread (tiny tensors; see DESIGN's word on threads), no CUDA."""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test may need a network

import torch

torch.set_num_threads(1)

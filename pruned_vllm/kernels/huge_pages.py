"""Huge pages of memory for weights: with pages of 4 KiB, finding them takes a good part of the time of reading them."""

import ctypes
import mmap

import torch


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Asks the operating system for huge pages where a tensor's memory has no pages yet. Call before the first write.

    Does nothing on devices and systems without them (on Linux, where transparent_hugepage/enabled says "never").
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if advice is None or not tensor.is_cpu:
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = tensor.data_ptr() + tensor.nbytes - first
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), advice)

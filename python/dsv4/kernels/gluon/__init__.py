"""Kernels in Gluon, Triton's explicit dialect, for Hopper (sm_90) and in part for Blackwell (sm_100): warp roles,
barriers and layouts are written out."""

from __future__ import annotations

from dsv4.kernels.gluon.forms import FORMS

__all__ = ["FORMS"]

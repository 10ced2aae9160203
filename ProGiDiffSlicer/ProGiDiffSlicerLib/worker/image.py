"""A volume on its way to the worker: copied and hashed in portions, so that nothing stalls."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import numpy as np
import numpy.typing as npt
from slicer.i18n import tr as _

from progidiff.errors import InputError
from progidiff.wire.messages import SetImage, image_digest

Array = npt.NDArray[Any]

_PORTION = 1 << 20


class Image:
    """The voxels of a volume as they were when they were copied.

    Attributes:
        key: the content hash that the worker knows it by; empty until it is ``ready``.
        nbytes: size of the voxels.
        ready: whether the copy is complete.
    """

    def __init__(
        self, array_kji: Array, affine: Array, modality: str | None, plane: str | None, correct_values: bool = False
    ) -> None:
        """Check a volume of numbers (K, J, I) and its affine (4, 4), IJK -> RAS in mm.

        Raises:
            InputError: not such a volume.
        """
        source, affine = np.asarray(array_kji), np.array(affine, dtype=np.float64)
        if source.ndim != 3 or source.size == 0 or source.dtype.kind not in "iuf" or source.dtype.itemsize > 8:
            raise InputError(_("The volume must hold plain numbers on three axes; convert it to a scalar volume first."))
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise InputError(_("The volume's position in space is not known; check its spacing, origin and directions."))
        self.key = ""
        self.nbytes = source.nbytes
        self.ready = False
        self._source: Array | None = source
        self._copy: Array | None = None
        self._affine = affine
        self._modality = modality
        self._plane = plane
        self._correct_values = correct_values

    def prepare(self) -> Generator[None, None, None]:
        """Copy and hash it, about a megabyte per step.

        Raises:
            MemoryError: there is no room for the copy.
        """
        source = self._source
        assert source is not None
        dtype = source.dtype.newbyteorder("<")
        copy: Array = np.empty(source.shape, dtype)
        digest = image_digest(dtype, source.shape, self._affine, self._modality, self._plane, self._correct_values)
        slices, height, width = source.shape
        rows = max(1, _PORTION // (width * dtype.itemsize))
        done = 0
        for k in range(slices):
            for j in range(0, height, rows):
                part = copy[k, j : j + rows]
                part[...] = source[k, j : j + rows]
                digest.update(part.reshape(-1).view(np.uint8).data)
                done += part.nbytes
                if done >= _PORTION:
                    done = 0
                    yield
        self._source, self._copy = None, copy
        self.key = digest.hexdigest()
        self.ready = True

    def by_key(self) -> SetImage:
        """The request that sends no voxels."""
        return SetImage(None, None, self._modality, self._plane, self.key, self._correct_values)

    def with_voxels(self) -> SetImage:
        """The request that sends them."""
        return SetImage(self._copy, self._affine, self._modality, self._plane, self.key, self._correct_values)

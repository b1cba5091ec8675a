"""The windows of images as columns of matrices, gathered a chunk at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from coda_fast._geometry import format_of
from coda_fast.backends.factored import matrices

if TYPE_CHECKING:
    from coda_fast.backends.factored.layer import Layer

# The smallest size of a chunk, in multiples of the bytes of A, which every chunk reads; twice that if every
# chunk also adds to the gradient of A. It takes precedence over the budget.
CHUNK_PARAMETERS = 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive pixels: whole images, or some lines of one image."""

    images: slice
    lines: slice
    columns: slice  # of the [..., P] matrices


class Windows:
    """The windows of an image batch as columns of a matrix, gathered and scattered a chunk at a time."""

    def __init__(self, image: torch.Tensor, layer: Layer):
        g = layer.spec.geometry
        self.geometry, self.compute = g, layer.reduce.dtype
        self.batch, self.channels, height, width = image.shape
        self.out = g.output_size(height, width)
        self.pixels = self.batch * self.out[0] * self.out[1]
        left, right, top, bottom = g.padding
        padded_height, padded_width = height + top + bottom, width + left + right
        if any(g.padding):  # one copy from any layout and dtype
            self.padded = layer.reduce.new_zeros(self.batch, self.channels, padded_height, padded_width)
            self.padded[:, :, top : top + height, left : left + width] = image
        else:
            self.padded = image.to(self.compute).contiguous()
        plane = padded_height * padded_width
        taps = (g.dilation[0] * padded_width, g.dilation[1])
        steps = (self.channels * plane, g.stride[0] * padded_width, g.stride[1])
        self.windows = self.padded.as_strided(
            (self.channels, *g.kernel, self.batch, *self.out), (plane, *taps, *steps)
        )

    def chunks(self, numbers_per_pixel: int, parameters: int, factor: int = 1) -> Iterator[Chunk]:
        """As few chunks as the budget allows, of about equal size: whole images if they fit, else lines of
        one image.
        """
        size = self.padded.element_size()
        budget = (
            factor
            * max(matrices.chunk_bytes(self.padded), CHUNK_PARAMETERS * parameters * size)
            // (numbers_per_pixel * size)
        )
        height, width = self.out
        images, lines = _even(self.batch, budget // (height * width)), _even(height, budget // width)
        for i in range(0, self.batch, images):
            stop = min(i + images, self.batch)
            for h in range(0, height, lines):
                end = min(h + lines, height)
                first = (i * height + h) * width
                count = (stop - i) * (end - h) * width
                yield Chunk(slice(i, stop), slice(h, end), slice(first, first + count))

    def gather(self, chunk: Chunk) -> torch.Tensor:
        """Patches as columns, [d, p]."""
        part = self.windows[:, :, :, chunk.images, chunk.lines]
        # contiguous, because reshape may give a view of overlapping rows
        return part.reshape(-1, chunk.columns.stop - chunk.columns.start).contiguous()

    def scatter_add(self, padded: torch.Tensor, chunk: Chunk, patches: torch.Tensor) -> None:
        """Add patches [..., p, d] to a padded image [..., N, H, W, C], or to several."""
        g, (*many, _, height, width, channels) = self.geometry, padded.shape
        row = width * channels
        steps, taps = (
            (g.stride[0] * row, g.stride[1] * channels),
            (g.dilation[0] * row, g.dilation[1] * channels),
        )
        windows = padded.as_strided(
            (*many, self.batch, *self.out, channels, *g.kernel),
            (*padded.stride()[:-4], height * row, *steps, 1, *taps),
        )[..., chunk.images, chunk.lines, :, :, :, :]
        patches = patches.view(windows.shape)
        each_tap = lambda t: [tap for row in t.unbind(-2) for tap in row.unbind(-1)]
        # Windows overlap, so the taps must be added one after another. On a GPU they are too, because none of
        # these tensors is dense.
        torch._foreach_add_(each_tap(windows), each_tap(patches))

    def new_padded(self) -> torch.Tensor:
        """A padded image of zeros, with channels last, because gradients are added pixel by pixel."""
        batch, channels, height, width = self.padded.shape
        return self.padded.new_zeros(batch, height, width, channels)

    def rows_to_image(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """[n, P] -> [N, n, OH, OW]."""
        image = torch.empty(
            self.batch,
            len(rows),
            *self.out,
            dtype=like.dtype,
            device=like.device,
            memory_format=format_of(like),
        )
        return image.copy_(rows.view(len(rows), self.batch, *self.out).transpose(0, 1))

    def image_to_rows(self, image: torch.Tensor) -> torch.Tensor:
        """[N, n, OH, OW] -> [n, P]."""
        return image.transpose(0, 1).to(self.compute).reshape(image.shape[1], -1)

    def crop(self, padded: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A padded image [N, H', W', C] as [N, C, H, W], in the dtype and memory format of ``like``."""
        left, _, top, _ = self.geometry.padding
        image = padded[:, top : top + like.shape[2], left : left + like.shape[3]].permute(0, 3, 1, 2)
        return image.to(like.dtype).contiguous(memory_format=format_of(like))


def _even(count, most):
    """The size of nearly equal parts of ``count``: at most ``most``, at least 1."""
    parts = -(-count // max(1, min(count, most))) if count else 1
    return max(1, -(-count // parts))

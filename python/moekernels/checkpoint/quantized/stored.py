"""One quantised weight of a checkpoint: the tensors it consists of, and how they become its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from torch import Tensor

from moekernels.checkpoint.errors import CheckpointError
from moekernels.checkpoint.reader import Reader
from moekernels.quantization import Format


class StoredWeight(NamedTuple):
    """A quantised weight as a file holds it.

    Attributes:
        format: how it is stored.
        shape: ``[N, K]``, or ``[E, N, K]`` of a stack.
        names: of the tensors in the checkpoint, by what they are called in `parts_of`.
        parts_of: makes the parts of the format, flat, of those tensors.
        in_files: part -> the tensor whose bytes it is, or the number that all of it is; None if it has to be made.
    """

    format: Format
    shape: tuple[int, ...]
    names: Mapping[str, str]
    parts_of: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    in_files: Mapping[str, str | float] | None

    def checked_parts(self, tensors: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
        """The parts.

        Raises:
            CheckpointError: they are not those of a weight of that format and shape; the message begins with `where`.
        """
        try:
            parts = self.parts_of(tensors)
            self.format.check_parts(parts, self.shape, where)
        except CheckpointError:
            raise
        except (ValueError, RuntimeError) as error:
            message = str(error)
            raise CheckpointError(message if message.startswith(where) else f"{where}: {message}") from error
        return parts


def need(reader: Reader, name: str, weight: str) -> str:
    """That name, if the checkpoint has it.

    Raises:
        CheckpointError: it has not.
    """
    if name not in reader.tensors:
        file = reader.tensors[weight].file if weight in reader.tensors else reader.directory
        raise CheckpointError(f"{file}: {weight!r} is quantised, but {name!r} is missing")
    return name

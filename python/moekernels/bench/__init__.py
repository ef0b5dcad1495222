"""Measuring: kernels and layers at real sizes, beside what a PyTorch user has today.

:mod:`~moekernels.bench.clocks` times, :mod:`~moekernels.bench.roofs` says what the machine can do at most,
:mod:`~moekernels.bench.shapes` holds the real layers and their inputs. A :class:`~moekernels.bench.case.Case` is one
piece of work with all who do it; :mod:`~moekernels.bench.kernels`, :mod:`~moekernels.bench.layer`,
:mod:`~moekernels.bench.backward` and :mod:`~moekernels.bench.training` make them, and :mod:`~moekernels.bench.table`
shows what was measured.
"""

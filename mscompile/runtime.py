"""Running models with onnxruntime."""

from __future__ import annotations

import contextlib
import contextvars
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from mscompile.errors import ModelError, MscompileError, ResourceError, UnsupportedError
from mscompile.intake.vetting import all_nodes
from mscompile.machine import cores
from mscompile.providers import TITLES, absent, chosen
from mscompile.runs import shelf
from mscompile.verification.skeletons import Skeleton, skeleton_of

Arrays = dict[str, npt.NDArray[Any]]
Progress = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""Wraps an iterable to show progress: (iterable, description, total) -> the same items."""


def no_progress(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    """Show nothing."""
    del description, total
    return items


RUN_SECONDS = 600.0
"""Time that one batch may take in a model with loops, which may never end."""


LARGE = 1 << 30
"""Bytes of weights from which onnxruntime keeps no copies of its own, laid out anew or transposed, for speed. Of graphs run
as they are written, several are open at a time: there `shelf.LARGE` holds."""


_SPARING: contextvars.ContextVar[bool] = contextvars.ContextVar("sparing", default=False)


@contextlib.contextmanager
def sparing(memory: bool) -> Iterator[None]:
    """Open `lean` sessions alone meanwhile, if memory is to be spared."""
    token = _SPARING.set(memory or _SPARING.get())
    try:
        yield
    finally:
        _SPARING.reset(token)


class Session:
    """A model loaded into onnxruntime.

    Parameters
    ----------
    model
        Graph to run. Its weights are not copied on the way; those that are mapped from files onnxruntime maps from there.
    optimise
        Whether onnxruntime may rewrite the graph. Off wherever two graphs are compared for equality: its rewrites change
        rounding, and now and then more than that.
    threads
        Threads per operator; if None onnxruntime's own choice, one per core, or as many as this process may use where that
        is not all of them.
    spin
        Whether idle threads wait busily, as onnxruntime does by default: quick on an idle machine, on a busy one a waste of
        what others, and other sessions, could use.
    lean
        Whether memory goes back to the system as soon as a tensor is not needed any more. What onnxruntime keeps for the
        next one otherwise comes to twice of what is needed, and is quicker where tensors are small. Models with large
        weights are run so in any case.

    Raises
    ------
    UnsupportedError
        onnxruntime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model | onnx.ModelProto | Skeleton,
        *,
        optimise: bool = True,
        threads: int | None = None,
        spin: bool = True,
        lean: bool = False,
    ) -> None:
        self.provider = chosen()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimise else level.ORT_DISABLE_ALL
        if threads is None and cores() < (os.cpu_count() or 1):
            threads = cores()
        if threads is not None:
            options.intra_op_num_threads = threads
        if not spin:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        skeleton = skeleton_of(model) if isinstance(model, ir.Model) else model
        skeleton = Skeleton(skeleton) if isinstance(skeleton, onnx.ModelProto) else skeleton
        self._skeleton = skeleton  # holds the files that weights are mapped from, and the arrays given here
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", "/")
        given = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in skeleton.shared.items()}
        if given:
            options.add_external_initializers(list(given), list(given.values()))
        disabled = None
        large = skeleton.weight_bytes > (LARGE if optimise else shelf.LARGE)
        if large or lean or _SPARING.get():
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if large:
            options.add_session_config_entry("session.disable_prepacking", "1")
            disabled = ["ConstantFolding"]
        try:
            self._session = ort.InferenceSession(
                skeleton.proto.SerializeToString(),
                sess_options=options,
                providers=list(dict.fromkeys([TITLES[self.provider], TITLES["cpu"]])),
                disabled_optimizers=disabled,
            )
        except Exception as error:
            raise runtime_error("onnxruntime cannot load the model", error) from error
        if TITLES[self.provider] not in (opened := self._session.get_providers()):
            raise absent(self.provider, f"it could not be started: the session would run on {', '.join(opened)}")
        self._loops = any(node.op_type == "Loop" for node in all_nodes(skeleton.proto.graph.node))
        self.inputs: list[str] = [i.name for i in self._session.get_inputs()]
        self.outputs: list[str] = [o.name for o in self._session.get_outputs()]

    def run(self, feed: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] | None = None) -> Arrays:
        """Run one batch as far as the named outputs (all by default) need it."""
        names = list(self.outputs if outputs is None else outputs)
        options = ort.RunOptions()
        options.only_execute_path_to_fetches = outputs is not None
        watch = threading.Timer(RUN_SECONDS, lambda: setattr(options, "terminate", True)) if self._loops else None
        if watch is not None:
            watch.daemon = True
            watch.start()
        try:
            return dict(zip(names, self._session.run(names, dict(feed), options), strict=True))
        except Exception as error:
            if options.terminate:
                raise ResourceError(
                    "the model takes too long",
                    where=f"onnxruntime {ort.__version__}",
                    why=f"a loop in it has not ended after {RUN_SECONDS:g} s",
                    hint="bound the loop, or use a smaller --batch-size",
                ) from error
            raise runtime_error("onnxruntime fails on the model", error) from error
        finally:
            if watch is not None:
                watch.cancel()

    def step(self, feed: Mapping[str, npt.NDArray[Any]], state: Mapping[str, ort.OrtValue]) -> dict[str, ort.OrtValue]:
        """Run one batch with values that stay on the provider's device: `state` in, all outputs back, nothing copied."""
        values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for name, array in feed.items()}
        try:
            binding = self._session.io_binding()
            for name, value in {**values, **state}.items():
                binding.bind_ortvalue_input(name, value)
            for name in self.outputs:
                binding.bind_output(name, self.provider)
            self._session.run_with_iobinding(binding)
            return dict(zip(self.outputs, binding.get_outputs(), strict=True))
        except Exception as error:
            raise runtime_error("onnxruntime fails on the model", error) from error

    def run_all(self, batches: Iterable[Mapping[str, npt.NDArray[Any]]], outputs: Sequence[str] | None = None) -> Arrays:
        """Run many batches and join each output along axis 0."""
        parts = [self.run(batch, outputs) for batch in batches]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


WRONG_TYPE = re.compile(r"Type \(tensor\((\w+)\)\) of output arg \((.*)\) of node .* expected type \(tensor\((\w+)\)\)")


def runtime_error(what: str, error: Exception) -> MscompileError:
    """An onnxruntime exception as one of ours, its text cut to the first line."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:400]
    if re.search("[Ff]ailed to allocate|bad_alloc|bad allocation", reason):
        return ResourceError(
            "the model takes too much memory",
            where=f"onnxruntime {ort.__version__}",
            why=reason,
            hint="use a smaller --batch-size, or a machine with more memory",
        )
    if wrong := WRONG_TYPE.search(reason):
        said, name, found = wrong.groups()
        return ModelError(
            "the model was rejected",
            where=f"tensor {name!r}",
            why=f"{name!r} is declared to be of type {said}, and is of type {found}",
            hint="export it again",
        )
    return UnsupportedError(
        what,
        where=f"onnxruntime {ort.__version__}",
        why=reason,
        hint="run the model in onnxruntime alone; if that works, please report this as a bug",
    )

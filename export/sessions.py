"""Graphs of an exported folder as callables: ONNX Runtime, TensorRT and TensorRT-RTX alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.libraries import ExportError, library
from mimdit.errors import first_line

# TensorRT's number types by the names that all its versions share.
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}


class Session:
    """One graph in ONNX Runtime.

    exchanged: arrays that take the place of weights in the file; the graph then runs as it is
    written, without ONNX Runtime's rewriting.

    Raises:
        ExportError: no provider for the device, or a graph that ONNX Runtime cannot load or run.
    """

    def __init__(
        self,
        path: Path,
        device: str = "cpu",
        threads: int = 0,
        exchanged: Mapping[str, Any] | None = None,
        rewritten: bool = True,
    ) -> None:
        ort = library("onnxruntime")
        name = _provider(device)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Notices about graph rewriting are not for users.
        options.log_severity_level = 3
        if exchanged or not rewritten:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # ONNX Runtime keeps no copy of them.
        self._exchanged = dict(exchanged or {})
        for weight, value in self._exchanged.items():
            options.add_initializer(weight, value)
        providers = [name] if device == "cpu" else [name, "CPUExecutionProvider"]
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        # Its errors share no class but Exception.
        except Exception as error:
            reason = first_line(error)
            raise ExportError(f"{path.name}: onnxruntime cannot load it ({reason})") from error
        # Where CUDA's libraries do not load, ONNX Runtime goes on without them.
        if self.session.get_providers()[0] != name:
            raise ExportError(f"{path.name}: onnxruntime cannot use {device}; see its messages")
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.value, self.device, self.name = ort.OrtValue, device, path.name

    def resident(self, array: np.ndarray) -> Any:
        """An input where the graph runs, for many calls."""
        return self.value.ortvalue_from_numpy(np.ascontiguousarray(array), self.device, 0)

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray]:
        """All outputs by name; inputs are tensors on the CPU, arrays or `resident` values."""
        values = {}
        for name in self.inputs:
            x = inputs[name]
            x = x.detach().numpy() if isinstance(x, Tensor) else x
            values[name] = self.resident(x) if isinstance(x, np.ndarray) else x
        try:
            out = self.session.run_with_ort_values(self.outputs, values)
        except Exception as error:
            reason = first_line(error)
            raise ExportError(f"{self.name}: onnxruntime cannot run it ({reason})") from error
        return {name: x.numpy() for name, x in zip(self.outputs, out, strict=True)}


class EngineSession:
    """One graph in TensorRT or TensorRT-RTX, called as `Session` is.

    library_name: tensorrt or tensorrt_rtx.

    Torch holds inputs and outputs on the GPU; TensorRT sees their addresses.

    Raises:
        ExportError: no GPU, an engine that does not load, or sizes that it was not built for.
    """

    def __init__(self, path: Path, library_name: str, device: str = "cuda") -> None:
        trt = library(library_name)
        self.device, self.name = torch.device(device), path.name
        # Kept: TensorRT does not own what it is given.
        self._logger = Messages.of(trt)
        self._runtime = trt.Runtime(self._logger)
        self.engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        self.context: Any = self.engine and self.engine.create_execution_context()
        if not self.context:
            raise ExportError(
                f"{path.name}: {library_name} cannot load it ({self._logger.reason()})"
            )
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        kinds = {name: self.engine.get_tensor_mode(name) for name in names}
        self.inputs = [name for name in names if kinds[name] == trt.TensorIOMode.INPUT]
        self.outputs = [name for name in names if kinds[name] == trt.TensorIOMode.OUTPUT]

    def resident(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray]:
        held: dict[str, Tensor] = {}
        for name in self.inputs:
            x = inputs[name]
            x = self.resident(x) if isinstance(x, np.ndarray) else x.detach()
            held[name] = x.to(self.device, self._dtype(name)).contiguous()
            if not self.context.set_input_shape(name, tuple(held[name].shape)):
                low, _, high = self.engine.get_tensor_profile_shape(name, 0)
                raise ExportError(
                    f"{self.name}: {name}: expected shapes from {_shape(low)} to {_shape(high)}, "
                    f"got {_shape(held[name].shape)}"
                )
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            held[name] = torch.empty(shape, dtype=self._dtype(name), device=self.device)
        for name, x in held.items():
            self.context.set_tensor_address(name, x.data_ptr())
        if not self.context.execute_async_v3(self._stream()):
            raise ExportError(f"{self.name}: cannot run it ({self._logger.reason()})")
        # Copies to the CPU wait for the stream; NumPy has no bfloat16.
        out = {name: held[name].cpu() for name in self.outputs}
        return {
            name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in out.items()
        }

    def _dtype(self, name: str) -> torch.dtype:
        kind = self.engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            expected = ", ".join(_DTYPES)
            raise ExportError(f"{self.name}: {name}: expected a type of {expected}, got {kind}")
        return _DTYPES[kind]

    def _stream(self) -> int:
        if self.device.type != "cuda":
            return 0
        return torch.cuda.current_stream(self.device).cuda_stream


AnySession = Session | EngineSession


def require_precision(precision: str, device: str, opset: int) -> None:
    """ExportError unless ONNX Runtime has plain products and convolutions of a precision.

    For CPUs it has them in float32 and float16 alone, and a graph of many nodes would fail late.
    """
    onnx, ort = library("onnx"), library("onnxruntime")
    kinds = {"fp32": "FLOAT", "fp16": "FLOAT16", "bf16": "BFLOAT16"}
    kind, make = getattr(onnx.TensorProto, kinds[precision]), onnx.helper
    nodes = [
        make.make_node("MatMul", ["x", "x"], ["y"]),
        make.make_node("Conv", ["y", "x"], ["z"]),
    ]
    values = [make.make_tensor_value_info(name, kind, [1, 1, 1, 1]) for name in ("x", "z")]
    graph = make.make_graph(nodes, "probe", values[:1], values[1:])
    # Of a format that every ONNX Runtime reads.
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", opset)], ir_version=8)
    options = ort.SessionOptions()
    # Its failure is reported below.
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=[_provider(device)])
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"precision: expected one that onnxruntime {ort.__version__} computes in on {device}, "
            f"got {precision} ({first_line(error)})"
        ) from error


def _provider(device: str) -> str:
    """ONNX Runtime's name of what runs graphs on a device."""
    found = library("onnxruntime").get_available_providers()
    name = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if name not in found:
        raise ExportError(
            f"device: expected an onnxruntime with {name} for {device}, got one with "
            f"{', '.join(found)}; onnxruntime-gpu has it"
        )
    return name


class Messages:
    """TensorRT's messages, kept instead of printed."""

    layers: str
    errors: list[str]

    @staticmethod
    def of(trt: Any) -> Any:
        """A logger of this module (tensorrt or tensorrt_rtx), whose class it must inherit."""

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []
                self.layers = ""

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                    self.errors.append(message)
                elif message.startswith("Layers:"):
                    self.layers = message

            def reason(self) -> str:
                """The first error, or that there was none."""
                return first_line(Exception(self.errors[0])) if self.errors else "no reason given"

        return Logger()


def _shape(sizes: Any) -> str:
    return "×".join(map(str, sizes))

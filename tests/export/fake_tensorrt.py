"""A stand-in for the part of TensorRT's Python interface that is used, after its documentation.

It records calls, and "engines" run their ONNX file in ONNX Runtime over the addresses they are
given, so that shapes, types and memory are those of the caller. It proves nothing about TensorRT.
"""

import ctypes
import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort


def module(version: str) -> Any:
    """Names of TensorRT `version`: 10 has a flag for strong typing, 11 takes it for granted."""
    calls: list[tuple[Any, ...]] = []
    flags = {"STRONGLY_TYPED": 1} if version.startswith("10.") else {}

    class Network:
        def __init__(self, flags: int) -> None:
            calls.append(("create_network", flags))
            self.path, self.inputs, self.num_layers = "", [], 0

        @property
        def num_inputs(self) -> int:
            return len(self.inputs)

        def get_input(self, i: int) -> Any:
            return self.inputs[i]

    class Parser:
        def __init__(self, network: Network, logger: Any) -> None:
            self.network, self.num_errors = network, 0

        def parse_from_file(self, path: str) -> bool:
            self.network.path = path
            for value in onnx.load(path, load_external_data=False).graph.input:
                dims = value.type.tensor_type.shape.dim
                shape = tuple(-1 if d.dim_param else d.dim_value for d in dims)
                self.network.inputs.append(SimpleNamespace(name=value.name, shape=shape))
            return True

    class Config:
        def add_optimization_profile(self, profile: Any) -> None:
            calls.append(("profile", profile.shapes))

        def clear_flag(self, flag: Any) -> None:
            calls.append(("clear_flag", flag.name))

        def set_flag(self, flag: Any) -> None:
            calls.append(("set_flag", flag.name))

        def set_memory_pool_limit(self, pool: Any, size: int) -> None:
            calls.append(("limit", pool.name, size))

    class Profile:
        def __init__(self) -> None:
            self.shapes: dict[str, Any] = {}

        def set_shape(self, name: str, *shapes: Any) -> None:
            self.shapes[name] = shapes

    class Builder:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        create_network = staticmethod(Network)
        create_builder_config = staticmethod(Config)
        create_optimization_profile = staticmethod(Profile)

        def build_serialized_network(self, network: Network, config: Any) -> bytes | None:
            calls.append(("build", Path(network.path).name))
            monitor = config.progress_monitor
            monitor.phase_start("Building engine", None, 2)
            going = all(monitor.step_complete("Building engine", i) for i in range(2))
            monitor.phase_finish("Building engine")
            self.logger.log(Logger.VERBOSE, "Layers:\nName: a\nName: b")
            return Path(network.path).read_bytes() if going else None

    class Engine:
        def __init__(self, data: bytes) -> None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            self.session = ort.InferenceSession(data, options)
            self.values = [*self.session.get_inputs(), *self.session.get_outputs()]
            self.num_io_tensors = len(self.values)

        def get_tensor_name(self, i: int) -> str:
            return self.values[i].name

        def get_tensor_mode(self, name: str) -> Any:
            inputs = {value.name for value in self.session.get_inputs()}
            return Mode.INPUT if name in inputs else Mode.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            kind = next(value.type for value in self.values if value.name == name)
            return {"tensor(float)": Type.FLOAT, "tensor(int64)": Type.INT64}[kind]

        def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
            return (1, 1), (1, 1), (2, 2)

        def create_execution_context(self) -> Any:
            return Context(self)

        def create_engine_inspector(self) -> Any:
            return SimpleNamespace(get_engine_information=lambda _: '{"Layers": ["inspected"]}')

    class Context:
        def __init__(self, engine: Engine) -> None:
            self.engine, self.shapes, self.places = engine, {}, {}
            # Shapes of outputs by those of inputs.
            self.known: dict[Any, dict[str, tuple[int, ...]]] = {}

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            self.shapes[name] = shape
            return max(shape) < 10**4

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            # Real engines know it without running; zeros of these shapes tell it here.
            given = tuple(sorted(self.shapes.items()))
            if given not in self.known:
                feeds = {k: np.zeros(v, np.float32) for k, v in self.shapes.items()}
                names = [value.name for value in self.engine.session.get_outputs()]
                found = self.engine.session.run(None, feeds)
                self.known[given] = {k: x.shape for k, x in zip(names, found, strict=True)}
            return self.known[given][name]

        def set_tensor_address(self, name: str, place: int) -> bool:
            self.places[name] = place
            return True

        def execute_async_v3(self, stream: int) -> bool:
            feeds = {}
            for name, shape in self.shapes.items():
                feeds[name] = np.empty(shape, np.float32)
                ctypes.memmove(feeds[name].ctypes.data, self.places[name], feeds[name].nbytes)
            names = [value.name for value in self.engine.session.get_outputs()]
            for name, x in zip(names, self.engine.session.run(None, feeds), strict=True):
                ctypes.memmove(self.places[name], np.ascontiguousarray(x).ctypes.data, x.nbytes)
            return True

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, data: bytes) -> Engine | None:
            if not bytes(data):
                self.logger.log(Logger.ERROR, "no engine in 0 bytes")
                return None
            return Engine(bytes(data))

    class Logger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Monitor:
        pass

    Mode = enum.Enum("Mode", ["NONE", "INPUT", "OUTPUT"])
    Type = enum.Enum("Type", ["FLOAT", "HALF", "BF16", "INT64"])
    return SimpleNamespace(
        __version__=version,
        calls=calls,
        NetworkDefinitionCreationFlag=enum.IntEnum("Flag", flags),
        Builder=Builder,
        OnnxParser=Parser,
        Runtime=Runtime,
        ILogger=Logger,
        IProgressMonitor=Monitor,
        BuilderFlag=enum.Enum("BuilderFlag", ["TF32", "REFIT"]),
        MemoryPoolType=enum.Enum("Pool", ["WORKSPACE"]),
        ProfilingVerbosity=enum.Enum("Verbosity", ["DETAILED"]),
        LayerInformationFormat=enum.Enum("Format", ["JSON"]),
        LayerType=enum.Enum("LayerType", ["CONSTANT"]),
        TensorIOMode=Mode,
        DataType=Type,
    )

"""MiM-DiT as files that restore pictures without its torch model: ONNX graphs and a runtime."""

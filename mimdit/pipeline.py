from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
class MiMDiTPipeline(DiffusionPipeline):
    pass
def assemble(model):
    from types import SimpleNamespace
    from mimdit.presets import pixel_codec
    return SimpleNamespace(vae=pixel_codec())

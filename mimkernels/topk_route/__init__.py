from mimkernels.topk_route.op import Route, topk_route
from mimkernels.topk_route.reference import topk_route_reference

__all__ = ["Route", "topk_route", "topk_route_reference"]

"""What vLLM and torchvision need on a CPU. Installed with the stand-in `vllm`: runs at the start of every process."""

from types import ModuleType

import wrapt


@wrapt.when_imported("vllm._custom_ops")
def without_onednn(operators: ModuleType) -> None:
    """OneDNN computes with a packed copy of a weight, made when the model is loaded: new weights do not get there."""
    operators._supports_onednn = False


@wrapt.when_imported("torch")
def declare_torchvision_operators(torch: ModuleType) -> None:
    """Torchvision's wheel is compiled for a torch with CUDA; beside another it is imported if it finds these declared.

    Without the code behind them: Qwen-VL's processors only resize.
    """
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch._torchvision_operators = library  # dropped, they would be gone

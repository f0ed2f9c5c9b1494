"""An allocation for another engine, with what that costs: `python -m allocator.export`.

targets             which schemes a form can say, and which of them an engine's fused experts load
projection          the best allocation that can be exported, and its price
names               linears as checkpoints name them
compressed_tensors, gptq, modelopt    the configurations
"""

from allocator.export.projection import Projection, project
from allocator.export.targets import Engine, Form, Target

__all__ = ["Engine", "Form", "Projection", "Target", "project"]

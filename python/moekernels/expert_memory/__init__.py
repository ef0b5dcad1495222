"""Experts that stay in the checkpoint's files, and are read when a token is routed to them, into a cache with a budget.

Where an expert's bytes lie (`layout`), files that are read past the page cache (`files`), the memory of one expert
(`memory`), all that are in memory (`cache`), and the module that stands for a layer's experts (`experts`). `streaming`
puts them into a model, `budget` says how much memory there is.
"""

from moekernels.expert_memory.budget import ExpertMemory, parse_expert_memory
from moekernels.expert_memory.cache import ExpertCache, ExpertCacheStats
from moekernels.expert_memory.experts import StreamedExperts
from moekernels.expert_memory.files import ExpertReadError
from moekernels.expert_memory.streaming import find_experts, is_streamed, stream_experts

__all__ = [
    "ExpertCache",
    "ExpertCacheStats",
    "ExpertMemory",
    "ExpertReadError",
    "StreamedExperts",
    "find_experts",
    "is_streamed",
    "parse_expert_memory",
    "stream_experts",
]

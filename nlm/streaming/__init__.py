"""Merging checkpoints chunk by chunk, in memory of a fixed size. Imports no torch."""

from nlm.streaming.engine import Report, run
from nlm.streaming.masks import write_task
from nlm.streaming.methods import STREAMED
from nlm.streaming.plan import MEMORY, SHARD_BYTES, Plan, problems

__all__ = ["MEMORY", "SHARD_BYTES", "STREAMED", "Plan", "Report", "problems", "run", "write_task"]

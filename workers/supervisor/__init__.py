"""Processes of one attempt: start, listen, beat, stop, limit. Never imports torch.

supervisor.py   what a worker keeps: settings, the warm spare, the attempt that runs
attempt.py      one attempt, from a claim to the write that ends it
phases.py       one phase: a process that is given an order, heard, watched, and ended
processes.py    sessions and groups of processes: start, suspend, end
messages.py     what processes say, checked
reporter.py     … turned into progress, stages, warnings and events
progress.py     weights of phases, time left
lease.py        the thread that beats, polls and writes
request.py      what the processes find in their folder
folders.py      work folders and what dead workers left
"""

from workers.supervisor.supervisor import Supervisor

__all__ = ["Supervisor"]

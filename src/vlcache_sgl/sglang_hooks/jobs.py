"""Where a request's job is: on SGLang's request object."""

from __future__ import annotations

from vlcache_sgl.compression.job import CompressionJob
from vlcache_sgl.sglang_hooks.facades import Req

_JOB_ATTRIBUTE = "vlcache_job"


def job_of(req: Req) -> CompressionJob | None:
    """The job of SGLang's request `req`; None when it is served uncompressed."""
    job: CompressionJob | None = getattr(req, _JOB_ATTRIBUTE, None)
    return job


def give_job(req: Req, job: CompressionJob) -> None:
    """Let `req` be compressed as `job` says."""
    setattr(req, _JOB_ATTRIBUTE, job)

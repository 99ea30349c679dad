"""Where a request's job is: on SGLang's request object."""

from __future__ import annotations

from typing import Any

from vlcache_sgl.compression.job import CompressionJob

_JOB_ATTRIBUTE = "vlcache_job"


def job_of(req: Any) -> CompressionJob | None:
    """The job of SGLang's request `req`; None when it is served uncompressed."""
    job: CompressionJob | None = getattr(req, _JOB_ATTRIBUTE, None)
    return job


def give_job(req: Any, job: CompressionJob) -> None:
    """Let `req` be compressed as `job` says."""
    setattr(req, _JOB_ATTRIBUTE, job)

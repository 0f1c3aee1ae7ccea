"""The render side: Celery app, executor, backends (one file an engine) and the keeper."""

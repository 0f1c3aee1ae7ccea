"""What the API, the workers and the client agree on. Imports neither `api` nor `worker`."""

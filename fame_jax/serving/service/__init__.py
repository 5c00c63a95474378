"""An HTTP server of recommendations: `fame_jax serve --export=FOLDER`. Needs starlette and uvicorn.

Read in this order:
  command.py       the command line: flags, token, start and stop
  app.py           the routes and their answers
  bodies.py        bodies of requests, checked for types and limits
  batching.py      requests that wait become one batch
  versions.py      exports: the newest whole one is served, and changed without a pause
  guard.py         tokens, other web pages, headers, durations
  connections.py   silent, slow and too many connections
  metrics.py       counts and durations as Prometheus text
  openapi.py       the description of the routes, as JSON and as a page
"""

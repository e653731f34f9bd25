"""An endpoint in OpenAI's form on the client's own machine, in front of one session or several.

bodies    what requests may ask for
tasks     the tasks of requests, which count tokens
workers   the sessions, one for each worker, and the requests that wait for them
writing   a text that a worker writes, piece by piece
answers   answers and errors in OpenAI's form
metrics   numbers for Prometheus
page      a page for people, and its numbers
app       routes, the token, and the bounds of requests
hosted    the HTTP service
"""

"""The telemetry of a role, for its operator: numbers, log lines and traces, of times and sizes, never of contents.

names     names of sessions and queries that tell nothing about them
events    events at a role, and who listens to them
counting  an interceptor that hears of calls, refusals and bytes
metrics   the numbers, as Prometheus reads them
port      the HTTP port on which they are read
logs      log lines as text or JSON
spans     spans of OpenTelemetry
telemetry what listens at one role, as its options say
"""

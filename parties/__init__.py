"""Client, server and dealer as processes over gRPC: the only place where bytes move.

In dependency order, one line a module:

errors       what can go wrong between parties, in words for the person at the keyboard
endpoints    host:port, the loopback rule, channels
calls        errors of gRPC calls, in words on both ends
frames       byte strings as parts of about 1 MB; one round as a frame
sessions     seeds, query keys, and what a session has burnt
files        once-per-model files: masked weights, token table; the client's cache
traces       one party's timeline of a query as a file
merging      both parties' traces on one time line
watchdog     deadlines for waits
dealer       the dealer's service
model        loading and compiling what a server serves; the weight-mask seed
server       the server's service
client       the client: connect, prepare, embed
evaluators   processes that evaluate on ciphertexts
keystore     clients' evaluation keys on the server's disk
encrypted_server, encrypted_client    the two sides of the CKKS deployment
options      options that several commands take
hosting      starting a service: ports, start-up line, shutdown
encrypted_hosting    what the commands do for that deployment
demo         three processes on loopback
reports      costs as tables and JSON
answers      what ``unseen embed`` prints
three_party/ the deployment among three servers
measured     a client's queries as they ran, next to what was predicted
transport    what a round takes between two processes of this machine
html_report  a profile as one HTML page with charts
encrypted_profiling    what a model costs on ciphertexts
profiling    the command ``unseen profile``
comparing    variants of a model, side by side
accuracy     the command ``unseen accuracy``
training     the command ``unseen train``
digits       the demonstration on images of digits
cli          the command ``unseen``
"""

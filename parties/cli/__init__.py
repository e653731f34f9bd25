"""The command ``unseen``, one file a verb.

check        ``unseen check``
installed    the files of this installation, for ``unseen check``
needs        what a command will use, for ``unseen check``
console      the two consoles, threads, progress
config       settings: the TOML file, environment variables, --show-config
core_log     lines of gRPC's core about refused handshakes, in words
options      options that several commands take, and those of deployments
output       reports in a file or on the terminal
profile      ``unseen profile``
plan         ``unseen plan``
compare      ``unseen compare``
accuracy     ``unseen accuracy``
train        ``unseen train``
timeline     ``unseen timeline``
token        ``unseen token``
compiled     compiled models: made, kept, found, and what is said of them
compile      ``unseen compile``
serve        ``unseen serve`` and ``unseen dealer``
party        ``unseen share-model`` and ``unseen party``
asking       what commands that ask a served model have in common
embed        ``unseen embed``
generate     ``unseen generate``
proxy        ``unseen proxy``
tasks        ``unseen classify``, ``tag``, ``answer``, ``rerank`` and ``search``
index        ``unseen index``
certs        ``unseen certs``
demo         ``unseen demo``
verify       ``unseen verify``
streams      standard streams that are closed, or lack characters
verbs        where each command stands, and how it is made when it is used
main         the commands put together
"""

from parties.services.allocator import reuse_memory

reuse_memory()  # before torch, whose first threads would get arenas of their own

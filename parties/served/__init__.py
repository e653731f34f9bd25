"""The public description and files of a service: how a service publishes them, and how a client reads them.

files           once-per-model files: write, announce, fetch, check, cache
compiled_files  compiled models on disk, and a cache of them
published       Describe and Download, for every service
described       the description and files as a client receives and checks them
"""

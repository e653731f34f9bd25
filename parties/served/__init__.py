"""What a service publishes.

files        once-per-model files: written, announced, fetched, checked, cached
published    Describe and Download, for every service
described    what a client gets of them, checked
"""

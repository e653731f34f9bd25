"""What a service publishes.

files        once-per-model files: written, announced, fetched, checked, cached
"""

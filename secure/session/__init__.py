"""The one client of every deployment.

link       a connection to one served Program
queries    the choice of queries for inputs of several lengths
links      the links of a session, one for each size of its model
generation the sizes that a text takes which a decoder writes
session    tasks, streams and single queries, over links
"""

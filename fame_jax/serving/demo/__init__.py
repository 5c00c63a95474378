"""A web page on this machine: build a history, see what is recommended and why.

server.py answers five routes, search.py finds items by words, index.html is the page.
"""
